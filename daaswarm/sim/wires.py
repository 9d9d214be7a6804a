"""The network of a simulation: how long a message takes, and whether it arrives.

One way takes ``(rtt(region, region) / 2 + last mile of both) x jitter``. Bytes travel over TCP, so a lost packet costs
time and not the message: it is sent again after two round trips (200 ms at least), then after twice as long, and so
on. Between the sides of a cut nothing passes. The first message to a peer waits for a connection: four round trips
(TCP, TLS 1.3, and the two of :mod:`daaswarm.net.handshake`).
"""

from __future__ import annotations

import itertools
import math
import random
from statistics import NormalDist

from daaswarm.limits import IDLE_PING_S
from daaswarm.sim.scenario import Scenario

DIAL_ROUNDS = 4
DIAL_BYTES = 3_600  # both ways: two TLS flights with one certificate, and three messages
PACKET_BYTES = 1_400  # payload of one packet on a path with an MTU of 1,500
RESEND_S = 0.2  # Linux's shortest retransmission timeout
KEEP_MINUTES = 10  # a node has 1,024 connections at most; in a large swarm they are pushed out about so soon
PING_BYTES = 2 * (16 + 9 + 22 + 40)  # a ping and its answer on an idle connection: frame, message, TLS, TCP and IP
NEVER = math.inf

_TABLE = 4_096  # steps of the jitter's distribution
_OPEN = 1  # the first minute that a link may bear: 0 is never


class Wires:
    """Args:

    size: nodes that there will ever be; they are known by their numbers.
    """

    def __init__(self, scenario: Scenario, rng: random.Random, size: int) -> None:
        self._scenario = scenario
        self._rng = rng
        self._draw = rng.random
        self._loss = scenario.loss
        self._regions = [0] * size
        self._miles = [0.0] * size
        self._sides = [0] * size
        self._half = [[ms / 2_000 for ms in region.rtt_ms] for region in scenario.regions]
        normal = NormalDist()
        self._jitter = [
            math.exp(scenario.jitter * normal.inv_cdf((i + 0.5) / _TABLE)) if scenario.jitter else 1.0
            for i in range(_TABLE)
        ]
        # The minute in which two nodes last talked, at the smaller one's number: one byte a pair.
        self._links = [bytearray(size - i) for i in range(size)]
        self._minute = _OPEN
        self.dialled = 0

    def place(self, node: int) -> None:
        """Puts a node somewhere."""
        at = self._rng.random()
        last = len(self._scenario.regions) - 1
        below = itertools.accumulate(region.share for region in self._scenario.regions)
        self._regions[node] = next((i for i, share in enumerate(below) if at < share), last)
        self._miles[node] = self._scenario.last_mile_ms / 1_000 * math.exp(0.6 * self._rng.gauss(0, 1))

    def copy_side(self, node: int, other: int) -> None:
        """A node that replaces another is on its side of a cut."""
        self._sides[node] = self._sides[other]

    def set_side(self, node: int, side: int) -> None:
        self._sides[node] = side

    def is_cut(self, a: int, b: int) -> bool:
        return self._sides[a] != self._sides[b]

    def set_minute(self, minute: int) -> None:
        """Minutes since the start; links age by it."""
        self._minute = (minute + _OPEN - 1) % 255 + 1

    def note_link(self, a: int, b: int) -> None:
        """The two have a connection."""
        if a > b:
            a, b = b, a
        self._links[a][b - a] = self._minute

    def get_rtt_s(self, a: int, b: int) -> float:
        """Without jitter and loss."""
        return 2 * (self._half[self._regions[a]][self._regions[b]] + self._miles[a] + self._miles[b])

    def ask(self, a: int, b: int, size: int) -> float:
        """Seconds until a request of ``size`` bytes is there, the connection included; NEVER across a cut."""
        seconds = self.carry(a, b, size)
        first, second = (a, b) if a < b else (b, a)
        at = self._links[first][second - first]
        if not at or (self._minute - at) % 255 > KEEP_MINUTES:
            if seconds != NEVER:
                self.dialled += 1
                seconds += DIAL_ROUNDS * self.get_rtt_s(a, b) * self._jitter[int(self._rng.random() * _TABLE)]
                self._links[first][second - first] = self._minute
        elif at != self._minute:
            self._links[first][second - first] = self._minute
        return seconds

    def carry(self, a: int, b: int, size: int) -> float:
        """Seconds until a message is there over a connection that exists."""
        if self._sides[a] != self._sides[b]:
            return NEVER
        way = self._half[self._regions[a]][self._regions[b]] + self._miles[a] + self._miles[b]
        drawn = self._draw() * _TABLE
        step = int(drawn)
        seconds = way * self._jitter[step]
        loss, left = self._loss, drawn - step  # what is left is as random as another draw
        if loss:
            packets = 1 + size // PACKET_BYTES
            wait = max(RESEND_S, 4 * way)
            while left < (loss if packets == 1 else 1 - (1 - loss) ** packets):
                seconds += wait
                wait *= 2
                packets, left = 1, self._draw()
        return seconds

    def count_links(self) -> int:
        """Connections that exist now, roughly: those used within :data:`KEEP_MINUTES`."""
        fresh = {(self._minute - age - 1) % 255 + 1 for age in range(KEEP_MINUTES + 1)}
        return sum(row.count(minute) for row in self._links for minute in fresh)


def get_idle_bytes_s(links: int) -> float:
    """What keeping so many connections alive takes a second, both ends together."""
    return links * PING_BYTES / IDLE_PING_S
