"""daaswarm: run a model whose experts live on other people's machines, and know that the answer is right."""

__version__ = "0.1.0"
