"""The network: frames, sessions, TLS, the pool, the libp2p door and the in-memory network. The only room that opens sockets."""
