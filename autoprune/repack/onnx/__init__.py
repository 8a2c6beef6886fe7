"""Export to ONNX, and the form each layer has there."""
