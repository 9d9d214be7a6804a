"""Records to write and a database to write them to."""

from __future__ import annotations

from pathlib import Path

from nacl.signing import SigningKey

from daaswarm.core.reputation import Standing
from daaswarm.core.signing import get_peer_id
from daaswarm.messages import Signed
from daaswarm.store.database import Database
from daaswarm.store.records import AdvertRecord, CallSummary, Deployment, ModelRecord, PeerRecord
from daaswarm.types import ModelRoot, PeerId

ROOT = ModelRoot("ab" * 32)
NOW = 1_800_000_000.0


def make_key(number: int) -> SigningKey:
    return SigningKey(number.to_bytes(32, "big"))


def make_peer_id(number: int) -> PeerId:
    return get_peer_id(make_key(number).verify_key.encode())


def make_peer(number: int, **changes: object) -> PeerRecord:
    values: dict[str, object] = {"first_seen": NOW, "last_seen": NOW + number, "agent": f"test/{number}"}
    addrs = [f"/ip4/192.0.2.{number % 256}/tcp/4001"]
    return PeerRecord(**{"peer_id": make_peer_id(number), "addrs": addrs, **values, **changes})  # type: ignore[arg-type]


def make_advert(number: int, *, seq: int = 1, expires_at: float = NOW + 600) -> AdvertRecord:
    # Nothing in a real advert, which other tests have: what is written here must not change when its fields do.
    signed = Signed(public_key=bytes(32), signature=bytes(64), payload=b"advert of %d" % number)
    return AdvertRecord(peer_id=make_peer_id(number), model_root=ROOT, seq=seq, expires_at=expires_at, signed=signed)


def make_calls(**changes: object) -> CallSummary:
    values: dict[str, object] = {"hour": 500_000, "direction": "served", "peer_id": make_peer_id(1), "model_root": ROOT}
    return CallSummary(**{**values, "calls": 1, "rows": 2, "bytes_in": 3, "bytes_out": 4, "failures": 5, **changes})  # type: ignore[arg-type]


def make_deployment(**changes: object) -> Deployment:
    values: dict[str, object] = {"model_root": ROOT, "dtype": "f32", "name": "m", "source": "/models/m"}
    return Deployment(**{**values, "held": {0: [0, 9], 3: [2]}, "created_at": NOW, **changes})  # type: ignore[arg-type]


def make_model(folder: str = "/models/m", used_at: float = NOW) -> ModelRecord:
    return ModelRecord(folder=folder, model_root=ROOT, name="m", kind="moe", used_at=used_at)


def make_standing(number: int, **changes: object) -> Standing:
    values: dict[str, object] = {"passed": 3.5, "failed": 1.0, "suspicion": 0.5, "updated_at": NOW + number}
    return Standing(**{"peer_id": make_peer_id(number), "model_root": ROOT, "reason": "late", **values, **changes})  # type: ignore[arg-type]


def fill(path: Path) -> None:
    """Something in each table."""
    database = Database.open(path)
    database.save([make_peer(n) for n in range(1, 30)], [make_advert(1), make_advert(2)], [make_calls()], NOW)
    database.put_model(make_model())
    database.put_deployment(make_deployment())
    database.put_standings([make_standing(1), make_standing(2, banned_at=NOW)])
    database.close()


def read_all(database: Database) -> list[object]:
    """All that is in it."""
    return [
        database.get_peers(),
        database.get_adverts(NOW),
        database.get_calls(),
        database.get_models(),
        database.get_deployments(),
        database.get_standings(),
    ]
