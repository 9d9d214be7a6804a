"""The key of a private swarm: its id, its text, typos, and that no use of it says anything about another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daaswarm.core.allow_list import MAX_ALLOWED, AllowList
from daaswarm.core.signing import get_peer_id, get_swarm_id
from daaswarm.core.swarm_keys import (
    MAX_TEXT,
    NAME_CHARS,
    TEXT_PREFIX,
    SwarmKey,
    is_private_id,
    parse_swarm_key,
)
from daaswarm.errors import ConfigError

NAMES = st.from_regex(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{NAME_CHARS - 1}}}", fullmatch=True)
KEYS = st.builds(SwarmKey, NAMES, st.binary(min_size=32, max_size=32))
KEY = SwarmKey("home", bytes(range(32)))
PEERS = [get_peer_id(bytes([n]) * 32) for n in range(3)]


@given(KEYS)
def test_the_text_is_read_back(key: SwarmKey) -> None:
    assert parse_swarm_key(f"  {key.text}\r\n", source="it") == key
    prefix, name, encoded = key.text.split(":")
    assert parse_swarm_key(f"{prefix}:{name}:{encoded.upper()}", source="it") == key
    assert is_private_id(key.swarm_id) and key.swarm_id.startswith(f"{key.name}@")
    assert len(key.text) <= MAX_TEXT and len(key.swarm_id) <= 64


def test_these_bytes_stay() -> None:
    # What is printed once must be readable for good; what is on the wire must be the same on both sides.
    assert KEY.swarm_id == "home@y6ygsqqszou5dwwo"
    assert KEY.text == "daaswarm-key:home:aaaqeayeaudaocajbifqydiob4ibceqtcqkrmfyydenbwha5dyp67z5e3e"
    assert KEY.prove_server(bytes(32), bytes(32), PEERS[0]).hex()[:16] == "5fbd5d37c6861bd6"
    assert KEY.prove_client(bytes(32), bytes(32), PEERS[0], PEERS[1]).hex()[:16] == "706d7641cd87aa24"


@given(st.data())
def test_a_typo_is_told_and_the_key_is_not(data: st.DataObject) -> None:
    start = len(TEXT_PREFIX) + 1
    place = data.draw(st.integers(start, len(KEY.text) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz234567:01 "))
    wrong = KEY.text[:place] + letter + KEY.text[place + 1 :]
    swapped = KEY.text[: place - 1] + KEY.text[place] + KEY.text[place - 1] + KEY.text[place + 1 :]
    for text in (wrong, swapped, KEY.text[:place], KEY.text + letter.strip() + "a"):
        if text == KEY.text:
            continue
        with pytest.raises(ConfigError) as caught:
            parse_swarm_key(text, source="it")
        assert caught.value.hint
        assert KEY.text[-40:-20] not in f"{caught.value.message}{caught.value.hint}"


@given(st.text(max_size=2 * MAX_TEXT))
def test_garbage_is_no_key(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_swarm_key(f"{TEXT_PREFIX}:{text}", source="it")


@pytest.mark.parametrize("name", ["", "a" * (NAME_CHARS + 1), ".x", "-x", "a/b", "a@b", "a:b", "ä", "a\n", "a b"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        SwarmKey(name, bytes(32))


@pytest.mark.parametrize(
    "swarm", ["main", "home", "home@", "home@K3X7Q2M4A5BCD2EF", "home@k3x7q2m4a5bcd2e", "@k3x7q2m4a5bcd2ef", "x" * 64]
)
def test_a_public_name_is_no_private_id(swarm: str) -> None:
    assert not is_private_id(swarm)


def test_swarms_called_alike_differ_in_all_that_counts() -> None:
    other = SwarmKey("home", bytes(32))
    renamed = SwarmKey("work", KEY.secret)
    assert len({KEY.swarm_id, other.swarm_id, renamed.swarm_id.replace("work", "home")}) == 3
    assert len({KEY.realm, other.realm, renamed.realm, get_swarm_id("home"), get_swarm_id(KEY.swarm_id)}) == 5


def test_the_key_is_not_shown() -> None:
    assert KEY.secret.hex() not in repr(KEY) and "secret" not in repr(KEY)


def test_an_empty_list_admits_all() -> None:
    allowed = AllowList()
    assert allowed.admits(PEERS[0]) and allowed.peers == []
    allowed.replace([PEERS[1], PEERS[1]])
    assert not allowed.admits(PEERS[0]) and allowed.admits(PEERS[1]) and allowed.peers == [PEERS[1]]
    for bad in ([PEERS[0], "12D3KooWnobody"], [*PEERS, *map(str, range(MAX_ALLOWED))]):
        with pytest.raises(ConfigError, match=r"network\.allow"):
            allowed.replace(bad)
        assert allowed.peers == [PEERS[1]]
