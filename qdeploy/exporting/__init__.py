"""From whatever came in to one prepared float32 ONNX graph, proved equal to it."""
