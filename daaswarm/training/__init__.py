"""Experts on other peers as parts of a plain torch model."""
