"""Reference models: committed small ONNX files and the scripts that made them; not part of the package."""
