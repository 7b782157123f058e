"""The TensorRT target: what its parser and builder ask of a graph."""
