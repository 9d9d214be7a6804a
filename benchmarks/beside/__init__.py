"""What ``benchmarks.beside_hivemind`` is made of."""
