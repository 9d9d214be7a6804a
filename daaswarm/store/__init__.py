"""What a node keeps on disk: its key, its lock, the peers it knows."""
