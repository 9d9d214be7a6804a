"""The core at ten thousand nodes: the very classes of a node on one seeded heap of events, with a world around them."""
