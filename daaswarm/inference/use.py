"""What hosts did for an answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from daaswarm.types import PeerId

LATENCIES = 100_000  # kept per host and answer for the median


@dataclass
class HostUse:
    """One host's part. Rows and bytes are fractions where several answers shared a call."""

    calls: int = 0
    rows: float = 0
    bytes_sent: float = 0
    bytes_received: float = 0
    coded_calls: int = 0  # whose rows or sums went in the codec asked for
    latencies_s: list[float] = field(default_factory=list)

    def add(self, other: HostUse, share: float) -> None:
        """Count ``share`` of another's rows and bytes, and each of its calls."""
        self.calls += other.calls
        self.coded_calls += other.coded_calls
        self.rows += other.rows * share
        self.bytes_sent += other.bytes_sent * share
        self.bytes_received += other.bytes_received * share
        self.latencies_s += other.latencies_s[: LATENCIES - len(self.latencies_s)]


@dataclass
class AuditUse:
    """Audits since the last time that somebody asked."""

    sketched: int = 0  # calls that were checked by sketches
    compared: int = 0  # with another host's answer
    recomputed: int = 0  # here
    unchecked: int = 0  # drawn, and there was no way to
    wrong: dict[PeerId, int] = field(default_factory=dict)

    def add(self, other: AuditUse) -> None:
        self.sketched += other.sketched
        self.compared += other.compared
        self.recomputed += other.recomputed
        self.unchecked += other.unchecked
        for peer, count in other.wrong.items():
            self.wrong[peer] = self.wrong.get(peer, 0) + count
