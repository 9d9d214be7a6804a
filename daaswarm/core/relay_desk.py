"""What a relay grants: reservations, meetings and circuits, with every limit. Sans-IO; ``now`` in s, monotonic."""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

import msgspec

from daaswarm.core.quotas import Quotas
from daaswarm.errors import Busy, RelayRefused, RemoteProtocolError
from daaswarm.types import PeerId

RESERVATION_S = 600.0  # a reservation lasts; renewed at half of it, so that one lost renewal costs nothing
RESERVATIONS = 256  # a quarter of the connections that a node may have: the rest are for its own work
RESERVATIONS_PER_ORIGIN = 16  # of one IP address: a household or a small office behind one NAT
RESERVE_RETRY_S = 30.0  # full: somebody else's reservation has to end first

CIRCUITS = 128  # open or about to be; each costs two file descriptors and 128 KiB of copying
CIRCUITS_PER_PEER = 16  # of one peer, on either end: one for each peer that it talks to
CIRCUITS_PER_ORIGIN = 32  # that askers of one IP address have: PeerIds cost nothing, and others want to meet too
CIRCUITS_PER_ORIGIN_AND_TARGET = 8  # half of what a target has: nobody alone makes it unreachable
CIRCUIT_RETRY_S = 2.0
MEETS_PER_S = 1.0  # of one asker, and as many of one origin as four askers have
MEET_BURST = 16.0  # a requester meets all hosts of a model at once
ORIGIN_SHARE = 4.0
PAIR_MEETS_PER_S = 1.0  # that one origin asks for with one target: a quarter of what a target answers
PAIR_MEET_BURST = 24.0

Key = TypeVar("Key", bound=str)

TOKEN_S = 10.0  # from the meeting until both ends have opened their circuit: two round trips and a reverse dial


class Reservation(msgspec.Struct):
    origin: str
    until: float


class Circuit(msgspec.Struct, eq=False):
    """``origin``: the asker's. ``waiting``: the tokens that have not been shown yet."""

    asker: PeerId
    origin: str
    target: PeerId
    waiting: set[bytes]
    made_at: float


class RelayDesk:
    """Decides what :class:`daaswarm.net.relaying.Relay` does."""

    def __init__(self) -> None:
        self._reservations: dict[PeerId, Reservation] = {}
        self._by_origin: Counter[str] = Counter()  # reservations
        self._circuits: dict[int, Circuit] = {}  # by id(circuit)
        self._by_token: dict[bytes, Circuit] = {}  # tokens not shown yet
        self._by_peer: Counter[PeerId] = Counter()  # circuits, on either end
        self._by_asking: Counter[str] = Counter()  # circuits, by the asker's origin
        self._by_pair: Counter[str] = Counter()  # ... and the target
        self._meets = Quotas(MEETS_PER_S, MEET_BURST)
        self._origin_meets = Quotas(MEETS_PER_S * ORIGIN_SHARE, MEET_BURST * ORIGIN_SHARE)
        self._pair_meets = Quotas(PAIR_MEETS_PER_S, PAIR_MEET_BURST)

    @property
    def reservations(self) -> list[PeerId]:
        return list(self._reservations)

    @property
    def circuits(self) -> int:
        return len(self._circuits)

    # -- reservations -------------------------------------------------------------------------------------------

    def reserve(self, peer: PeerId, origin: str, now: float) -> float:
        """For how long (s) ``peer`` can be met here.

        Raises:
            Busy: all reservations, or those of this origin, are taken.
        """
        self.tick(now)
        self.release(peer)
        if len(self._reservations) >= RESERVATIONS:
            raise Busy(f"all {RESERVATIONS} reservations of this relay are taken", retry_after_s=RESERVE_RETRY_S)
        if self._by_origin[origin] >= RESERVATIONS_PER_ORIGIN:
            text = f"{RESERVATIONS_PER_ORIGIN} peers of one address hold reservations"
            raise Busy(text, retry_after_s=RESERVE_RETRY_S)
        self._reservations[peer] = Reservation(origin, now + RESERVATION_S)
        self._by_origin[origin] += 1
        return RESERVATION_S

    def release(self, peer: PeerId) -> None:
        """``peer`` can't be met here any more."""
        reservation = self._reservations.pop(peer, None)
        if reservation is not None:
            _count_down(self._by_origin, reservation.origin)

    # -- circuits -----------------------------------------------------------------------------------------------

    def meet(self, asker: PeerId, origin: str, target: PeerId, tokens: tuple[bytes, bytes], now: float) -> Circuit:
        """A circuit that both ends may open with their token, until :data:`TOKEN_S` has passed.

        Args:
            origin: the asker's.
            tokens: the asker's and the target's, 32 random bytes each.

        Raises:
            RelayRefused: ``target`` holds no reservation here.
            Busy: too many meetings of the asker, or circuits.
        """
        self.tick(now)
        pair = _get_pair(origin, target)
        wait_s = self._meets.take(asker, now) or self._origin_meets.take(PeerId(origin), now)
        if wait_s:
            raise Busy("too many meetings were asked for", retry_after_s=wait_s)
        if asker == target or target not in self._reservations:
            raise RelayRefused(f"{target} holds no reservation at this relay", hint="look its addresses up again")
        if len(self._circuits) >= CIRCUITS:
            raise Busy(f"all {CIRCUITS} circuits of this relay are in use", retry_after_s=CIRCUIT_RETRY_S)
        for peer in (asker, target):
            if self._by_peer[peer] >= CIRCUITS_PER_PEER:
                text = f"{peer} has {CIRCUITS_PER_PEER} circuits through this relay"
                raise Busy(text, retry_after_s=CIRCUIT_RETRY_S)
        for count, limit in (
            (self._by_asking[origin], CIRCUITS_PER_ORIGIN),
            (self._by_pair[pair], CIRCUITS_PER_ORIGIN_AND_TARGET),
        ):
            if count >= limit:
                raise Busy(
                    f"peers of your address have {limit} circuits through this relay", retry_after_s=CIRCUIT_RETRY_S
                )
        if wait_s := self._pair_meets.take(PeerId(pair), now):
            raise Busy(f"too many meetings with {target} were asked for", retry_after_s=wait_s)
        circuit = Circuit(asker, origin, target, set(tokens), now)
        self._circuits[id(circuit)] = circuit
        for token in tokens:
            self._by_token[token] = circuit
        for peer in (asker, target):
            self._by_peer[peer] += 1
        self._by_asking[origin] += 1
        self._by_pair[pair] += 1
        return circuit

    def claim(self, token: bytes, now: float) -> Circuit:
        """The circuit that a token opens one end of; once.

        Raises:
            RemoteProtocolError: made up, used before, or too late.
        """
        self.tick(now)
        circuit = self._by_token.pop(token, None)
        if circuit is None:
            raise RemoteProtocolError("the circuit's token is unknown, used, or too old")
        circuit.waiting.discard(token)
        return circuit

    def close(self, circuit: Circuit) -> None:
        """It has ended, or will not be opened. More than once does no harm."""
        if self._circuits.pop(id(circuit), None) is None:
            return
        for token in circuit.waiting:
            del self._by_token[token]
        circuit.waiting = set()
        for peer in (circuit.asker, circuit.target):
            _count_down(self._by_peer, peer)
        _count_down(self._by_asking, circuit.origin)
        _count_down(self._by_pair, _get_pair(circuit.origin, circuit.target))

    def tick(self, now: float) -> None:
        """Drop what is over."""
        for peer in [peer for peer, reservation in self._reservations.items() if reservation.until <= now]:
            self.release(peer)
        for circuit in list({id(c): c for c in self._by_token.values()}.values()):
            if circuit.made_at + TOKEN_S <= now:
                if len(circuit.waiting) == 2:
                    self.close(circuit)  # nobody came
                else:
                    for token in circuit.waiting:  # one end waits; its own deadline ends that
                        del self._by_token[token]
                    circuit.waiting = set()

    def validate(self) -> None:
        """Asserts the invariants."""
        assert len(self._reservations) <= RESERVATIONS and len(self._circuits) <= CIRCUITS
        assert self._by_origin == Counter(r.origin for r in self._reservations.values())
        ends = Counter(peer for c in self._circuits.values() for peer in (c.asker, c.target))
        assert self._by_peer == ends and all(count <= CIRCUITS_PER_PEER for count in ends.values())
        assert self._by_asking == Counter(c.origin for c in self._circuits.values())
        assert self._by_pair == Counter(_get_pair(c.origin, c.target) for c in self._circuits.values())
        assert max(self._by_asking.values(), default=0) <= CIRCUITS_PER_ORIGIN
        assert max(self._by_pair.values(), default=0) <= CIRCUITS_PER_ORIGIN_AND_TARGET
        assert self._by_token == {token: c for c in self._circuits.values() for token in c.waiting}
        self._meets.validate()
        self._origin_meets.validate()
        self._pair_meets.validate()


def _get_pair(origin: str, target: PeerId) -> str:
    return f"{origin} {target}"


def _count_down(counter: Counter[Key], key: Key) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
