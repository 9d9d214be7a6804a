"""AdvertBook against a plain model; bitmaps; what is missing and how that is said; which dtype an answer has."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from swarm_driver import NOW, SWARM, make_key, make_peer

from daaswarm.core.adverts import (
    ADVERT_KIND,
    AdvertBook,
    choose_dtype,
    format_missing,
    from_bitmap,
    get_missing,
    rank_dtypes,
    to_bitmap,
)
from daaswarm.core.signing import MAX_TTL_S, seal
from daaswarm.errors import RemoteProtocolError
from daaswarm.messages import Advert, Signed
from daaswarm.types import ExpertId

ROOTS = ["a" * 64, "b" * 64]


def make(
    n: int, held: dict[int, list[int]], *, root: str = ROOTS[0], seq: int = 1, signer: int | None = None, **more: object
) -> Signed:
    fields: dict[str, object] = {
        "peer_id": make_peer(n),
        "model_root": root,
        "model_name": "tiny",
        "kind": "dense",
        "held": {layer: to_bitmap(experts) for layer, experts in held.items()},
        "dtype": "f32",
        "device": "cpu",
        "addrs": [],
        "seq": seq,
        "expires_at": NOW + 600,
        **more,
    }
    return seal(Advert(**fields), ADVERT_KIND, make_key(signer or n), SWARM)  # type: ignore[arg-type]


@given(st.sets(st.integers(0, 5000)))
def test_bitmaps_round_trip(numbers: set[int]) -> None:
    assert from_bitmap(to_bitmap(numbers)) == sorted(numbers)


def test_bitmap_layout_is_that_of_the_wire() -> None:
    assert to_bitmap([0, 9]) == b"\x01\x02" and to_bitmap([]) == b"" and from_bitmap(b"\x80\x00") == [7]


class BookMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.book = AdvertBook(SWARM, adverts=5, adverts_per_peer=2)
        self.model: dict[tuple[str, int], list] = {}  # (root, peer) -> [seq, expires_at, experts or None when unseen]
        self.now = NOW

    @rule(
        n=st.integers(1, 4),
        root=st.sampled_from([*ROOTS, "c" * 64]),
        seq=st.integers(0, 4),
        ttl=st.sampled_from([-5, 10, 300]),
        experts=st.lists(st.integers(0, 20), min_size=1, max_size=4),
        withdrawn=st.booleans(),
    )
    def put(self, n: int, root: str, seq: int, ttl: float, experts: list[int], withdrawn: bool) -> None:
        signed = make(n, {3: experts}, root=root, seq=seq, expires_at=self.now + ttl, withdrawn=withdrawn)
        known = self.model.get((root, n))
        full = len(self.model) >= 5 or sum(m == n for _, m in self.model) >= 2
        if ttl <= 0 or (known is None and full):
            with pytest.raises(RemoteProtocolError):
                self.book.put(signed, self.now)
            return
        newer = known is None or seq > known[0]
        assert self.book.put(signed, self.now) is newer
        if newer:
            self.model[root, n] = [seq, self.now + ttl, None if withdrawn else set(experts)]

    @rule(n=st.integers(1, 4), root=st.sampled_from(ROOTS))
    def withdraw(self, n: int, root: str) -> None:
        self.book.withdraw(make_peer(n), root)
        if (root, n) in self.model:
            self.model[root, n][2] = None

    @rule(seconds=st.sampled_from([1, 20, 200]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def tick(self) -> None:
        self.book.tick(self.now)
        self.model = {k: v for k, v in self.model.items() if v[1] > self.now}

    @invariant()
    def agrees(self) -> None:
        self.book.validate()
        assert len(self.book) == len(self.model)
        for root in ROOTS:
            expected: dict[ExpertId, list[str]] = {}
            for (r, n), (_, expires_at, experts) in self.model.items():
                if r == root and experts is not None and expires_at > self.now:
                    for expert in experts:
                        expected.setdefault(ExpertId(3, expert), []).append(make_peer(n))
            assert self.book.holders(root, self.now, "f32") == {k: sorted(v) for k, v in expected.items()}
            assert (root in self.book.get_models(self.now)) == bool(expected)


TestBook = BookMachine.TestCase
TestBook.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def test_bad_adverts_are_refused_by_name() -> None:
    book = AdvertBook(SWARM)
    good = make(1, {0: [0]})
    cases: list[tuple[Signed, str, bool]] = [
        (make(1, {0: [0]}, signer=2), "another key", True),
        (msgspec.structs.replace(good, signature=bytes(64)), "bad signature", True),
        (make(1, {0: [0]}, expires_at=NOW), "expired", False),
        (make(1, {0: [0]}, expires_at=NOW + 2 * MAX_TTL_S), "too long", False),
        (make(1, {0: [0]}, price=float("nan")), "price", True),
        (make(1, {0: [0]}, capacity_rows_per_s=-1.0), "capacity", True),
        (make(1, {0: [0], 1: []}), "holds nothing", True),
        (make(1, {70_000: [0]}), "undecodable", True),
        (make(1, {0: [70_000]}), "undecodable", True),
        (msgspec.structs.replace(good, payload=bytes(16_385)), "16385 bytes", True),
    ]
    for signed, reason, reject in cases:
        with pytest.raises(RemoteProtocolError, match=reason) as caught:
            book.put(signed, NOW)
        assert caught.value.reject is reject
        book.validate()
    assert len(book) == 0 and book.put(good, NOW)


def test_a_withdrawn_advert_is_not_revived_by_a_replay() -> None:
    book = AdvertBook(SWARM)
    old = make(1, {0: [0]}, seq=1)
    book.put(old, NOW)
    book.put(make(1, {}, seq=2, withdrawn=True), NOW)
    assert book.put(old, NOW) is False
    assert book.get_adverts(ROOTS[0], NOW) == []


def test_holders_never_mix_dtypes_and_hand_on_what_was_signed() -> None:
    book = AdvertBook(SWARM)
    f32, bf16 = make(1, {0: [0, 1]}), make(2, {0: [1, 2]}, dtype="bf16")
    book.put(f32, NOW)
    book.put(bf16, NOW)
    assert book.holders(ROOTS[0], NOW, "f32") == {(0, 0): [make_peer(1)], (0, 1): [make_peer(1)]}
    assert book.holders(ROOTS[0], NOW, "bf16") == {(0, 1): [make_peer(2)], (0, 2): [make_peer(2)]}
    assert {msgspec.msgpack.encode(k.signed) for k in book.get_adverts(ROOTS[0], NOW)} == {
        msgspec.msgpack.encode(s) for s in (f32, bf16)
    }


def test_the_dtype_covers_most_and_ties_go_to_the_exact() -> None:
    def choose(*adverts: Signed, requested: str | None = None) -> str:
        book = AdvertBook(SWARM)
        for signed in adverts:
            book.put(signed, NOW)
        return choose_dtype(book.get_adverts(ROOTS[0], NOW), requested)  # type: ignore[arg-type]

    assert choose() == "f32"
    assert choose(make(1, {0: [0]}), make(2, {0: [1]}, dtype="bf16")) == "f32"
    assert choose(make(1, {0: [0]}), make(2, {0: [1, 2]}, dtype="bf16")) == "bf16"
    # Replicas of the same expert don't count twice.
    assert choose(make(1, {0: [0, 1]}), make(2, {0: [2]}, dtype="f16"), make(3, {0: [2]}, dtype="f16")) == "f32"
    assert choose(make(1, {0: [0, 1]}), requested="f16") == "f16"


def test_one_peer_that_claims_everything_does_not_decide() -> None:
    layers = {0: 4, 1: 4}
    every = {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}
    halves = [{0: [0, 1, 2, 3]}, {1: [0, 1, 2, 3]}]

    def rank(*adverts: Signed, **more: Any) -> list[str]:
        book = AdvertBook(SWARM)
        for signed in adverts:
            book.put(signed, NOW)
        return list(rank_dtypes(book.get_adverts(ROOTS[0], NOW), layers, **more))

    honest = [make(n, halves[n % 2], dtype="bf16") for n in range(1, 5)]  # each expert twice
    assert rank(*honest, make(9, every)) == ["bf16", "f32", "f16"]
    # One host each: the more exact, and the other is the next to try.
    assert rank(*honest[:2], make(9, every)) == ["f32", "bf16", "f16"]
    # The rarest expert counts, and what is incomplete comes last, by how much of it there is.
    assert rank(*honest[:3], make(8, every), make(9, every), make(7, {0: [1]}, dtype="f16")) == ["f32", "bf16", "f16"]
    assert rank(make(1, {0: [0]}), make(2, {0: [0, 1]}, dtype="f16"), make(3, every, dtype="bf16")) == [
        "bf16",
        "f16",
        "f32",
    ]
    assert rank() == ["f32", "bf16", "f16"]
    # Hosts past the eighth, or of another kind of model, make nothing safer.
    nine, eight = [make(n, every, dtype="f16") for n in range(10, 19)], [make(n, every) for n in range(20, 28)]
    assert rank(*nine, *eight)[0] == "f32" and rank(*nine, *eight[:7])[0] == "f16"
    others = [make(n, every, dtype="f16", kind="moe") for n in range(30, 34)]
    assert rank(make(1, every), *others)[0] == "f16" and rank(make(1, every), *others, kind="dense")[0] == "f32"


def test_claims_to_experts_that_the_model_lacks_count_for_nothing() -> None:
    book = AdvertBook(SWARM)
    book.put(make(1, {0: [0, 1]}), NOW)
    book.put(make(2, {0: [1, 8, 9, 10], 7: [0]}, dtype="f16"), NOW)
    layers = {0: 8, 1: 8}
    assert book.holders(ROOTS[0], NOW, "f16", layers) == {(0, 1): [make_peer(2)]}
    assert len(book.holders(ROOTS[0], NOW, "f16")) == 5
    known = book.get_adverts(ROOTS[0], NOW)
    assert choose_dtype(known) == "f16" and choose_dtype(known, layers=layers) == "f32"
    assert {k.advert.peer_id: k.experts for k in known}[make_peer(2)] == {0: [1, 8, 9, 10], 7: [0]}


def test_missing_experts_are_found_and_said_briefly() -> None:
    layers = dict.fromkeys(range(30), 8)
    holders = {ExpertId(layer, e): ["p"] for layer in range(15) for e in range(8)}
    for expert in (0, 1, 2, 7):
        holders[ExpertId(3, expert)] = []
    missing = get_missing(layers, holders)  # type: ignore[arg-type]
    assert missing == {3: [0, 1, 2, 7], **{layer: list(range(8)) for layer in range(15, 30)}}
    assert format_missing(missing, layers, kind="dense") == "layers 15-29 (all 8 slices); layer 3: slices 0-2,7"
    assert format_missing({3: [5]}, layers) == "layer 3: expert 5"
    assert format_missing({}, layers) == ""
    scattered = {layer: from_bitmap(bytes([layer + 1])) for layer in range(30)}
    assert "more" in format_missing(scattered, layers) and len(format_missing(scattered, layers)) < 600
