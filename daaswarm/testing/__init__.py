"""Tools for tests: tiny checkpoints. The product never imports this."""
