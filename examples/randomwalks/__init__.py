"""Shortest walks on a random graph: the example that needs no GPU and no download."""
