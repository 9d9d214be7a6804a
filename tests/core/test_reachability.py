"""Whose word counts on whether a node can be dialled."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daaswarm.core.reachability import ORIGINS, RECHECK_S, RETRY_S, VOTE_S, Reachability, Sight, get_sight

OWN = {"10.0.0.2", "127.0.0.1"}
NAT = "203.0.113.7"


def make(*votes: tuple[str, str, list[int]]) -> Reachability:
    reach = Reachability()
    for origin, host, ports in votes:
        reach.note(origin, host, ports, OWN, 0.0)
    reach.validate()
    return reach


@pytest.mark.parametrize(
    ("votes", "verdict", "verified"),
    [
        ([], "unknown", []),
        ([("a", "10.0.0.2", [1])], "reachable", []),
        ([("a", "10.0.0.2", [])], "unreachable", []),
        ([("a", "10.0.0.2", [1]), ("b", "10.0.0.2", [])], "unreachable", []),
        ([("a", "10.0.0.2", [1]), ("b", "10.0.0.2", [1]), ("c", "10.0.0.2", [])], "reachable", []),
        # Peers on the same network say nothing of those beyond the NAT.
        ([("a", "10.0.0.2", [1]), ("b", "10.0.0.2", [1]), ("c", NAT, [])], "unreachable", []),
        ([("a", "127.0.0.1", [1]), ("b", "10.0.0.2", [])], "unreachable", []),
        # A forwarded port: believed when two say so, and not where as many say the contrary.
        ([("a", NAT, [1])], "unknown", []),
        ([("a", NAT, [1]), ("b", NAT, [1])], "reachable", [(NAT, 1)]),
        ([("a", NAT, [1]), ("b", NAT, [2])], "unknown", []),
        ([("a", NAT, [1]), ("b", "198.51.100.1", [1])], "unknown", []),
        ([("a", NAT, [1]), ("b", NAT, [1]), ("c", NAT, [])], "reachable", [(NAT, 1)]),
        ([("a", NAT, [1]), ("b", NAT, [1]), ("c", NAT, []), ("d", NAT, [])], "unreachable", []),
    ],
)
def test_verdicts(votes, verdict, verified) -> None:
    reach = make(*votes)
    assert reach.get_verdict(1.0) == verdict
    assert reach.get_verified(1.0) == verified
    assert reach.get_verdict(VOTE_S) == "unknown"


PUBLIC = "8.8.4.4"  # an own address of the internet


@pytest.mark.parametrize(
    ("votes", "verdict", "beyond"),
    [
        # One or a few that make a NAT up are votes like others'.
        ([("a", PUBLIC, [1]), ("b", PUBLIC, [1]), ("liar", NAT, [])], "reachable", False),
        ([("a", PUBLIC, [1]), ("b", PUBLIC, [1]), ("liar", NAT, [1])], "reachable", False),
        ([("a", PUBLIC, [1]), ("liar", NAT, [])], "unreachable", False),
        ([("a", PUBLIC, []), ("b", PUBLIC, []), ("c", NAT, [1])], "unreachable", False),
        # As long as they are fewer; a node that also has a NAT of its own (IPv4 and IPv6) is what most see.
        ([("a", PUBLIC, [1]), ("b", NAT, []), ("c", NAT, [])], "unreachable", True),
        ([("a", PUBLIC, []), ("b", NAT, [1]), ("c", NAT, [1])], "reachable", True),
        # Neighbours in the same house still say nothing of the world.
        ([("a", "10.0.0.2", []), ("b", "10.0.0.2", []), ("c", PUBLIC, [1])], "reachable", False),
    ],
)
def test_one_liar_makes_no_nat(votes, verdict, beyond) -> None:
    reach = Reachability()
    for origin, host, ports in votes:
        reach.note(origin, host, ports, OWN | {PUBLIC}, 0.0)
    assert (reach.get_verdict(1.0), reach.is_beyond_nat(1.0)) == (verdict, beyond)


def test_liars_are_not_asked_before_others() -> None:
    reach = Reachability()
    for origin in "abc":
        reach.note(origin, NAT, [], {PUBLIC}, 0.0)
    claims = [(origin, Sight.BEYOND_NAT) for origin in "abc"] + [("d", Sight.OWN_PUBLIC)]
    assert reach.choose(claims, 1.0)[0] == "d"


def test_one_origin_has_one_vote_and_the_last_one_counts() -> None:
    reach = make(("a", NAT, [1]), ("a", NAT, [1]))
    assert reach.get_verdict(1.0) == "unknown"
    reach.note("a", NAT, [], OWN, 1.0)
    assert reach.get_verdict(1.0) == "unreachable" and reach.is_beyond_nat(1.0) and reach.get_hosts(1.0) == [NAT]
    reach.clear()
    assert reach.get_verdict(1.0) == "unknown" and not reach.is_beyond_nat(1.0)


def test_when_to_ask_again() -> None:
    reach = Reachability()
    assert reach.is_due(0.0)
    reach.note_round(0.0)
    assert not reach.is_due(RETRY_S - 1) and reach.is_due(RETRY_S)
    reach.note("a", "10.0.0.2", [1], OWN, 0.0)
    assert not reach.is_due(RETRY_S) and reach.is_due(RECHECK_S)
    reach.clear()
    assert reach.is_due(1.0)


def test_who_is_asked() -> None:
    reach = make(("a", NAT, []), ("b", NAT, []))
    far, near = Sight.BEYOND_NAT, Sight.OWN_ADDRESS
    assert reach.choose([("l", near), ("a", far), ("c", far), ("c", None), ("d", None)], 1.0) == ["c", "a", "l"]
    assert reach.choose([("a", None), ("b", None), ("c", None), ("c", None)], 1.0)[0] == "c"
    assert reach.choose([], 1.0) == []


def test_sights() -> None:
    assert get_sight("127.0.0.1", OWN) is Sight.SAME_MACHINE and get_sight("::1", OWN) is Sight.SAME_MACHINE
    assert get_sight("10.0.0.2", OWN) is Sight.OWN_ADDRESS
    assert get_sight(PUBLIC, {PUBLIC}) is Sight.OWN_PUBLIC and get_sight(PUBLIC, OWN) is Sight.BEYOND_NAT
    assert get_sight(NAT, OWN) is Sight.BEYOND_NAT and get_sight("what?", OWN) is Sight.BEYOND_NAT


hosts = st.sampled_from([NAT, "198.51.100.1", "10.0.0.2", "127.0.0.1"])
vote = st.tuples(st.integers(0, 40).map(str), hosts, st.lists(st.integers(1, 3), max_size=2))


@given(st.lists(vote, max_size=60))
def test_one_liar_never_makes_a_node_announce_anything(votes) -> None:
    """Whatever was said before: an address that this machine lacks is announced only if two others reached it."""
    reach = make(*votes)
    assert len(reach._votes) <= ORIGINS
    for host, port in reach.get_verified(1.0):
        assert host not in OWN
        assert sum(v.host == host and port in v.open_ports for v in reach._votes.values()) >= 2
