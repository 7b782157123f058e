"""Fuzz targets: one per reader of files and values that may come from strangers."""
