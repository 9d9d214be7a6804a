"""What a relay grants, against every limit; and any order of events against the invariants."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from daaswarm.core import relay_desk
from daaswarm.core.relay_desk import CIRCUITS_PER_PEER, MEET_BURST, RESERVATION_S, TOKEN_S, Circuit, RelayDesk
from daaswarm.errors import Busy, DaaswarmError, RelayRefused, RemoteProtocolError
from daaswarm.types import PeerId


def peer(number: int) -> PeerId:
    return PeerId(f"peer{number}")


def tokens(number: int) -> tuple[bytes, bytes]:
    return b"a%31d" % number, b"b%31d" % number


def test_reservations_are_few_by_origin_and_end_by_themselves() -> None:
    desk = RelayDesk()
    for number in range(relay_desk.RESERVATIONS_PER_ORIGIN):
        assert desk.reserve(peer(number), "house", 0.0) == RESERVATION_S
    with pytest.raises(Busy):
        desk.reserve(peer(99), "house", 1.0)
    desk.reserve(peer(0), "house", 1.0)  # a renewal takes no more room
    desk.reserve(peer(99), "elsewhere", 1.0)
    desk.validate()
    desk.reserve(peer(98), "house", RESERVATION_S)  # all but the renewed and the later ones are over
    assert sorted(desk.reservations) == [peer(0), peer(98), peer(99)]
    desk.validate()


def test_reservations_of_many_origins_are_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_desk, "RESERVATIONS", 3)
    desk = RelayDesk()
    for number in range(3):
        desk.reserve(peer(number), f"house{number}", 0.0)
    with pytest.raises(Busy, match="all 3 reservations") as caught:
        desk.reserve(peer(3), "house3", 0.0)
    assert caught.value.retry_after_s > 0


def test_who_asks_for_too_many_meetings_waits_and_others_do_not() -> None:
    desk = RelayDesk()
    desk.reserve(peer(0), "house", 0.0)
    for number in range(int(MEET_BURST)):
        desk.close(desk.meet(peer(1), "o", peer(0), tokens(number), 0.0))
    with pytest.raises(Busy, match="too many meetings"):
        desk.meet(peer(1), "o", peer(0), tokens(100), 0.0)
    desk.meet(peer(2), "o", peer(0), tokens(101), 0.0)
    desk.meet(peer(1), "o", peer(0), tokens(102), 5.0)
    # PeerIds cost nothing: one address gets no more than a few askers' share.
    with pytest.raises(Busy):
        for number in range(200):
            desk.close(desk.meet(peer(1000 + number), "o", peer(0), tokens(1000 + number), 6.0))


def test_circuits_of_one_peer_are_limited_on_either_end(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = RelayDesk()
    desk.reserve(peer(0), "house", 0.0)
    made = [desk.meet(peer(1 + n), f"o{n}", peer(0), tokens(n), 0.0) for n in range(CIRCUITS_PER_PEER)]
    with pytest.raises(Busy, match="circuits through this relay"):
        desk.meet(peer(99), "o", peer(0), tokens(99), 0.0)
    desk.close(made[0])
    desk.close(made[0])
    desk.meet(peer(99), "o", peer(0), tokens(99), 0.0)
    desk.validate()
    monkeypatch.setattr(relay_desk, "CIRCUITS", 3)
    with pytest.raises(Busy, match="all 3 circuits"):
        desk.meet(peer(98), "o", peer(0), tokens(98), 0.0)


def test_one_address_takes_neither_a_relay_nor_a_target() -> None:
    """With as many PeerIds as it likes."""
    desk = RelayDesk()
    for number in range(20):
        desk.reserve(peer(number), f"house{number}", 0.0)
    made: list[Circuit] = []
    now = 0.0
    for number in range(400):
        now += 0.5  # patient enough for every quota
        with contextlib.suppress(Busy):
            made.append(desk.meet(peer(1000 + number), "attacker", peer(number % 20), tokens(number), now))
            for token in list(made[-1].waiting):
                desk.claim(token, now)
    assert len(made) == relay_desk.CIRCUITS_PER_ORIGIN
    for number in range(20):
        desk.meet(peer(500 + number), f"o{number}", peer(number), tokens(500 + number), now)
    desk.validate()
    for circuit in made:
        desk.close(circuit)
    taken = 0
    for number in range(100):
        now += 1.0
        with contextlib.suppress(Busy):
            circuit = desk.meet(peer(2000 + number), "attacker", peer(0), tokens(2000 + number), now)
            for token in list(circuit.waiting):
                desk.claim(token, now)
            taken += 1
    assert taken == relay_desk.CIRCUITS_PER_ORIGIN_AND_TARGET
    desk.meet(peer(600), "o", peer(0), tokens(3000), now)
    desk.validate()


def test_one_address_does_not_use_up_what_a_target_answers() -> None:
    desk = RelayDesk()
    desk.reserve(peer(0), "house", 0.0)
    invited = 0
    for number in range(800):  # 100 s of all that the address may ask for
        with contextlib.suppress(Busy):
            desk.close(desk.meet(peer(1000 + number), "attacker", peer(0), tokens(number), number / 8))
            invited += 1
    assert invited <= relay_desk.PAIR_MEET_BURST + 101 * relay_desk.PAIR_MEETS_PER_S
    desk.validate()


def test_tokens_open_one_end_each_once_and_soon() -> None:
    desk = RelayDesk()
    with pytest.raises(RelayRefused):
        desk.meet(peer(1), "o", peer(0), tokens(0), 0.0)
    desk.reserve(peer(0), "house", 0.0)
    with pytest.raises(RelayRefused):
        desk.meet(peer(0), "o", peer(0), tokens(0), 0.0)
    one, other = tokens(1)
    circuit = desk.meet(peer(1), "o", peer(0), (one, other), 0.0)
    assert desk.claim(one, 1.0) is circuit
    for bad in (one, b"x" * 32, b""):
        with pytest.raises(RemoteProtocolError):
            desk.claim(bad, 1.0)
    with pytest.raises(RemoteProtocolError):
        desk.claim(other, TOKEN_S)
    assert desk.circuits == 1  # the end that came waits; it closes the circuit when that is over
    desk.close(circuit)
    desk.meet(peer(1), "o", peer(0), tokens(2), 20.0)
    desk.tick(20.0 + TOKEN_S)
    assert desk.circuits == 0  # nobody came
    desk.validate()


class Desk(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.desk = RelayDesk()
        self.now = 0.0
        self.made: list[Circuit] = []
        self.tokens: list[bytes] = []
        self.count = 0

    @rule(number=st.integers(0, 4), origin=st.sampled_from(["a", "b"]))
    def reserve(self, number: int, origin: str) -> None:
        try:
            self.desk.reserve(peer(number), origin, self.now)
        except Busy:
            raise AssertionError("five peers are few") from None

    @rule(asker=st.integers(0, 4), other=st.integers(0, 4))
    def meet(self, asker: int, other: int) -> None:
        self.count += 1
        try:
            self.made.append(self.desk.meet(peer(asker), "o", peer(other), tokens(self.count), self.now))
        except DaaswarmError:
            return
        self.tokens += tokens(self.count)

    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(self.tokens)) if self.tokens else b"x" * 32
        try:
            circuit = self.desk.claim(token, self.now)
        except RemoteProtocolError:
            return
        self.tokens.remove(token)
        assert self.now - circuit.made_at < TOKEN_S and token not in circuit.waiting

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        if self.made:
            self.desk.close(data.draw(st.sampled_from(self.made)))

    @rule(number=st.integers(0, 4))
    def release(self, number: int) -> None:
        self.desk.release(peer(number))

    @rule(seconds=st.sampled_from([0.5, TOKEN_S / 2, TOKEN_S, RESERVATION_S]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def holds(self) -> None:
        self.desk.validate()


TestDesk = Desk.TestCase
TestDesk.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
