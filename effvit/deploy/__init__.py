"""Trained models outside PyTorch: ONNX files, int8 weights, and what they cost on one thread."""
