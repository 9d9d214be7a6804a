"""Requesting: running a model whose experts are elsewhere."""
