"""RecordStore against a plain model, and each refusal by name."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from swarm_driver import NOW, SWARM, make_key, make_peer

from daaswarm.core.record_store import POINTER_KIND, RecordStore
from daaswarm.core.signing import MAX_TTL_S, seal
from daaswarm.errors import RemoteProtocolError
from daaswarm.messages import Pointer, Signed

KEYS = [bytes([i]) * 32 for i in range(3)]
PER_KEY, PER_SIGNER, TOTAL = 3, 2, 6


def make(n: int, key: bytes, seq: int, expires_at: float, addr: str = "a") -> Signed:
    pointer = Pointer(key=key, peer_id=make_peer(n), addrs=[addr], seq=seq, expires_at=expires_at)
    return seal(pointer, POINTER_KIND, make_key(n), SWARM)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store = RecordStore(SWARM, records=TOTAL, records_per_key=PER_KEY, records_per_signer=PER_SIGNER)
        self.model: dict[tuple[bytes, int], tuple[int, float, Signed]] = {}
        self.now = NOW

    @rule(
        n=st.integers(1, 4),
        key=st.sampled_from(KEYS),
        seq=st.integers(0, 3),
        ttl=st.sampled_from([-1, 0, 5, 20, 900, 999]),
    )
    def put(self, n: int, key: bytes, seq: int, ttl: float) -> None:
        signed = make(n, key, seq, self.now + ttl)
        # Expired records of this key go when it is touched; those of others wait for tick.
        fresh = 0 < ttl <= MAX_TTL_S + 60
        if fresh:
            self._expire(key)
        known = self.model.get((key, n))
        if known:
            wanted = fresh and (seq > known[0] or (seq == known[0] and signed == known[2]))
        else:
            room = (
                len(self.model) < TOTAL
                and sum(k == key for k, _ in self.model) < PER_KEY
                and sum(m == n for _, m in self.model) < PER_SIGNER
            )
            wanted = fresh and room
        if wanted:
            self.store.put(signed, self.now)
            self.model[key, n] = (seq, self.now + ttl, signed)
        else:
            with pytest.raises(RemoteProtocolError) as caught:
                self.store.put(signed, self.now)
            assert not caught.value.reject

    @rule(seconds=st.sampled_from([1, 10, 400]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def tick(self) -> None:
        self.store.tick(self.now)
        for key in KEYS:
            self._expire(key)

    @rule(key=st.sampled_from(KEYS))
    def read(self, key: bytes) -> None:
        self._expire(key)
        found = {pointer.peer_id: signed for pointer, signed in self.store.get(key, self.now)}
        assert found == {make_peer(n): v[2] for (k, n), v in self.model.items() if k == key}

    @invariant()
    def valid(self) -> None:
        self.store.validate()
        assert len(self.store) == len(self.model)

    def _expire(self, key: bytes) -> None:
        self.model = {k: v for k, v in self.model.items() if k[0] != key or v[1] > self.now}


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_each_refusal_says_why() -> None:
    store = RecordStore(SWARM, records=3, records_per_key=2, records_per_signer=2)
    good = make(1, KEYS[0], 5, NOW + 60)
    store.put(good, NOW)
    store.put(good, NOW)  # twice is fine
    forged = seal(
        Pointer(key=KEYS[0], peer_id=make_peer(1), addrs=[], seq=9, expires_at=NOW + 60),
        POINTER_KIND,
        make_key(2),
        SWARM,
    )
    wrong_kind = seal(
        Pointer(key=KEYS[0], peer_id=make_peer(1), addrs=[], seq=9, expires_at=NOW + 60), "advert", make_key(1), SWARM
    )
    large = Signed(public_key=good.public_key, signature=good.signature, payload=bytes(4097))
    for signed, reason, reject in [
        (make(1, KEYS[0], 4, NOW + 60), "older", False),
        (make(1, KEYS[0], 5, NOW + 60, "b"), "conflicts", False),
        (make(1, KEYS[0], 6, NOW), "expired", False),
        (make(1, KEYS[0], 6, NOW + 2 * MAX_TTL_S), "too long", False),
        (forged, "another key", True),
        (wrong_kind, "bad signature", True),
        (large, "4097 bytes", True),
    ]:
        with pytest.raises(RemoteProtocolError, match=reason) as caught:
            store.put(signed, NOW)
        assert caught.value.reject is reject
    store.put(make(2, KEYS[0], 1, NOW + 60), NOW)
    with pytest.raises(RemoteProtocolError, match="key has 2"):
        store.put(make(3, KEYS[0], 1, NOW + 60), NOW)
    store.put(make(1, KEYS[1], 1, NOW + 60), NOW)
    with pytest.raises(RemoteProtocolError, match="full"):
        store.put(make(3, KEYS[2], 1, NOW + 60), NOW)
    assert next(signed for _, signed in store.get(KEYS[0], NOW)) == good
    assert store.get(KEYS[0], NOW + 60) == []


def test_one_peer_brings_so_many_records_of_whichever_signers() -> None:
    store = RecordStore(SWARM, records_per_giver=2)
    store.put(make(1, KEYS[0], 1, NOW + 60), NOW, make_peer(9))
    store.put(make(2, KEYS[0], 1, NOW + 30), NOW, make_peer(9))
    with pytest.raises(RemoteProtocolError, match="you brought 2 records") as caught:
        store.put(make(3, KEYS[0], 1, NOW + 60), NOW, make_peer(9))
    assert not caught.value.reject and len(caught.value.message) <= 64
    store.put(make(1, KEYS[0], 2, NOW + 60), NOW, make_peer(9))  # a newer one takes no more room
    store.put(make(3, KEYS[0], 1, NOW + 60), NOW, make_peer(8))
    store.put(make(4, KEYS[0], 1, NOW + 60), NOW)  # this node's own
    store.validate()
    store.tick(NOW + 30)
    store.validate()
    store.put(make(5, KEYS[1], 1, NOW + 60), NOW + 30, make_peer(9))
    assert store.get_keys() == KEYS[:2]
    store.validate()
