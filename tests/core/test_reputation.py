"""Probation, the falling rate of checks, bans by a sequential test, amnesty."""

from __future__ import annotations

import random

import pytest

from daaswarm.core.reputation import (
    BAN_S,
    COMPARED,
    ENTRIES,
    EXACT,
    HALF_LIFE_S,
    PROBATION,
    REFUSED,
    Reputation,
    Standing,
)
from daaswarm.core.verify import OFF, Verify, parse_verify
from daaswarm.errors import ConfigError
from daaswarm.types import ModelRoot, PeerId

PEER, OTHER = PeerId("peer"), PeerId("other")
MODEL, ANOTHER = ModelRoot("a" * 64), ModelRoot("b" * 64)
NOW = 1_800_000_000.0


def pass_all(reputation: Reputation, count: int, peer: PeerId = PEER, false_alarm: float = EXACT) -> None:
    for _ in range(count):
        reputation.note(peer, MODEL, NOW, right=True, false_alarm=false_alarm)


def test_everything_is_checked_on_probation_and_never_nothing_after_it() -> None:
    reputation = Reputation()
    rates = []
    for _ in range(PROBATION + 200):
        rates.append(reputation.get_rate(PEER, MODEL, 0.05, NOW))
        pass_all(reputation, 1)
    assert rates[:PROBATION] == [1.0] * PROBATION and rates[PROBATION + 1] < 1
    assert rates == sorted(rates, reverse=True) and rates[-1] == 0.05
    assert reputation.get_rate(PEER, ANOTHER, 0.05, NOW) == 1.0  # another model, another probation
    assert reputation.get_rate(OTHER, MODEL, 0.05, NOW) == 1.0


def test_one_wrong_answer_bans_where_honest_hosts_give_none() -> None:
    reputation = Reputation()
    pass_all(reputation, 10_000)  # a sleeper
    noted = reputation.note(PEER, MODEL, NOW, right=False, false_alarm=EXACT, why="a lie")
    assert noted.is_ban and reputation.get_banned(NOW)[PEER].reason == "a lie"
    assert not reputation.note(PEER, MODEL, NOW, right=False, false_alarm=EXACT).is_ban  # it is already
    assert OTHER not in reputation.get_banned(NOW)


@pytest.mark.parametrize(("false_alarm", "least"), [(COMPARED, 2), (REFUSED, 4)])
def test_weaker_signs_take_more_of_them(false_alarm: float, least: int) -> None:
    reputation = Reputation()
    pass_all(reputation, 1_000)
    count = 1
    while not reputation.note(PEER, MODEL, NOW, right=False, false_alarm=false_alarm).is_ban:
        assert reputation.get_rate(PEER, MODEL, 0.05, NOW) == 1.0  # under suspicion
        count += 1
    assert count >= least


def test_an_honest_host_is_not_banned_for_what_happens_to_honest_hosts() -> None:
    """A host that refuses at the rate assumed of honest ones, for 20,000 checked calls, a hundred times."""
    rng = random.Random(1)
    banned = 0
    for _ in range(100):
        reputation = Reputation()
        for _ in range(20_000):
            right = rng.random() >= REFUSED
            banned += reputation.note(PEER, MODEL, NOW, right=right, false_alarm=REFUSED).is_ban
    assert banned == 0


def test_a_ban_ends_in_probation() -> None:
    reputation = Reputation()
    pass_all(reputation, 500)
    reputation.note(PEER, MODEL, NOW, right=False, false_alarm=EXACT)
    assert PEER in reputation.get_banned(NOW + BAN_S - 1)
    assert PEER not in reputation.get_banned(NOW + BAN_S)
    assert reputation.get_rate(PEER, MODEL, 0.05, NOW + BAN_S) == 1.0


def test_amnesty() -> None:
    reputation = Reputation()
    reputation.note(PEER, MODEL, NOW, right=False, false_alarm=EXACT)
    assert reputation.forgive(PEER) and not reputation.get_banned(NOW)
    assert reputation.get_rate(PEER, MODEL, 0.05, NOW) == 1.0
    assert not reputation.forgive(OTHER)


def test_trust_fades() -> None:
    reputation = Reputation()
    pass_all(reputation, 400)
    [before] = [each.trust for each in reputation.get_standings(NOW)]
    [after] = [each.trust for each in reputation.get_standings(NOW + 10 * HALF_LIFE_S)]
    assert before > 0.99 and 0.5 < after < 0.7
    assert reputation.get_rate(PEER, MODEL, 0.05, NOW + 10 * HALF_LIFE_S) == 1.0


def test_what_is_written_down_is_what_changed_and_comes_back() -> None:
    reputation = Reputation()
    pass_all(reputation, 3)
    reputation.note(OTHER, MODEL, NOW, right=False, false_alarm=EXACT, why="a lie")
    changed = reputation.take_changed()
    assert {each.peer_id for each in changed} == {PEER, OTHER} and not reputation.take_changed()
    again = Reputation(changed)
    assert set(again.get_banned(NOW)) == {OTHER}
    again.mark_changed([(PEER, MODEL)])
    assert [each.peer_id for each in again.take_changed()] == [PEER]


def test_the_banned_come_first_and_a_bound() -> None:
    reputation = Reputation(
        Standing(peer_id=PeerId(f"p{n}"), model_root=MODEL, updated_at=float(n)) for n in range(ENTRIES)
    )
    reputation.note(OTHER, MODEL, NOW, right=False, false_alarm=EXACT)
    standings = reputation.get_standings(NOW)
    assert len(standings) == ENTRIES and standings[0].peer_id == OTHER
    assert PeerId("p0") not in {each.peer_id for each in standings}


@pytest.mark.parametrize(
    ("text", "verify"),
    [
        ("off", OFF),
        ("sample", Verify("sample", 0.05)),
        (" Sample=0.25 ", Verify("sample", 0.25)),
        ("every", Verify("every", 1.0)),
        ("twin", Verify("twin", 0.05)),
        ("twin=1", Verify("twin", 1.0)),
    ],
)
def test_ways_to_verify(text: str, verify: Verify) -> None:
    assert parse_verify(text) == verify and parse_verify(str(verify)) == verify


@pytest.mark.parametrize("text", ["", "on", "sample=", "sample=0", "sample=1.1", "sample=nan", "every=1", "off=0"])
def test_no_way_to_verify(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_verify(text)
