"""Training of pruned and quantized models, in torch."""
