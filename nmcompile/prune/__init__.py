"""Pruning on a graph: which layers, how many zeros each, and weights fitted to what the dense model computes."""
