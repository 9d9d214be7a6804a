"""Decisions, sans-IO: nothing here touches a socket, a clock, a tensor or a global random number generator.

Time arrives as ``now`` (Unix time, s) and randomness as a :class:`daaswarm.core.rng.Rng`, so every decision can be
replayed in a test. A machine is a class with ``handle(event, now) -> list[Effect]``; a shell carries the effects out.
"""
