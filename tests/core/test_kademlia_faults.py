"""The DHT against a plain model, with a nemesis: lost, late, doubled and reordered messages, cuts, kills, restarts.

What is asserted at every step: a lookup ends; what it returns, and what any node keeps, was published by whom it
names and has not expired. What is asserted of a swarm that was left in peace: every node finds exactly what is
published. Hypothesis prints the steps and the seed of a failure.
"""

from __future__ import annotations

import hashlib

from faulty_swarm import FaultySwarm
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from swarm_driver import make_peer

from daaswarm.core.signing import MAX_TTL_S

COUNT = 9
K = 4  # so that nine nodes are a swarm in which not everybody keeps everything
KEYS = [hashlib.sha256(bytes([n])).digest() for n in range(3)]

numbers = st.integers(0, COUNT - 1)
keys = st.sampled_from(KEYS)


class Swarm(RuleBasedStateMachine):
    swarm: FaultySwarm

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.swarm = FaultySwarm(seed, COUNT, K)

    @rule(n=numbers, some=st.sets(keys, min_size=1))
    def publish(self, n: int, some: set[bytes]) -> None:
        if n in self.swarm.nodes:
            self.swarm.publish(n, sorted(some))

    @rule(n=numbers, key=keys)
    def unpublish(self, n: int, key: bytes) -> None:
        if n in self.swarm.nodes:
            self.swarm.unpublish(n, key)

    @rule(n=numbers, key=keys)
    def look_up(self, n: int, key: bytes) -> None:
        if n in self.swarm.nodes:
            self.swarm.look_up(n, key)

    @rule(n=numbers)
    @precondition(lambda self: len(self.swarm.nodes) > COUNT // 2)
    def kill(self, n: int) -> None:
        if n in self.swarm.nodes:
            self.swarm.kill(n)

    @rule()
    def restart_all(self) -> None:
        for n in range(COUNT):
            if n not in self.swarm.nodes:
                self.swarm.start(n, [])

    @rule(loss=st.sampled_from([0.0, 0.1, 0.5]), twice=st.sampled_from([0.0, 0.3]), slow_s=st.sampled_from([0, 0.6, 4]))
    def disturb(self, loss: float, twice: float, slow_s: float) -> None:
        self.swarm.loss, self.swarm.twice, self.swarm.slow_s = loss, twice, slow_s

    @rule(some=st.sets(numbers))
    def cut(self, some: set[int]) -> None:
        self.swarm.cut = {make_peer(n + 1) for n in some}

    @rule(seconds=st.sampled_from([0.2, 3.0, 40.0, 300.0]))
    def wait(self, seconds: float) -> None:
        self.swarm.run(seconds)

    @rule()
    def leave_in_peace(self) -> None:
        """Everything that was withdrawn or lost its node has expired after this, and everything else is known."""
        self.swarm.calm()
        self.restart_all()
        self.swarm.run(MAX_TTL_S + 60)
        for key in KEYS:
            for n in self.swarm.nodes:
                assert self.swarm.find(n, key) == {m for k, m in self.swarm.records if k == key}

    @invariant()
    def valid(self) -> None:
        if hasattr(self, "swarm"):
            self.swarm.validate()

    def teardown(self) -> None:
        if hasattr(self, "swarm"):
            self.leave_in_peace()


TestSwarm = Swarm.TestCase
TestSwarm.settings = settings(
    max_examples=10, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
