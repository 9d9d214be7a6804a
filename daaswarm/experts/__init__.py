"""Hosting: what this node computes for others."""
