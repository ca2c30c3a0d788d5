"""ONNX messages as they are: every part of one, and the bytes of those of any size."""
