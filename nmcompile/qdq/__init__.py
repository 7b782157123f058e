"""Quantization on a graph: quantize/dequantize pairs, and what eight bits do to layers' outputs."""
