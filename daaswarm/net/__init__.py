"""The network: frames, sessions, TLS, the pool, the libp2p door, the in-memory network. Sole importer of libp2p."""
