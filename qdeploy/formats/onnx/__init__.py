"""A stranger's ONNX message: its rules, one walk over all it holds, bounded reading."""
