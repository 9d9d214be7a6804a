"""daaswarm: run a model whose experts live on other people's machines."""

__version__ = "0.1.0"
