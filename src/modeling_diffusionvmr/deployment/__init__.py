"""Export to ONNX, and running what was exported with ONNX Runtime."""
