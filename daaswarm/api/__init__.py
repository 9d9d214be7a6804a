"""Doors into a running node: the local control socket (later OpenAI HTTP, gRPC, MCP, metrics, dashboard)."""
