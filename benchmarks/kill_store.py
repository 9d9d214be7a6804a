"""Kills a process that writes ``node.db`` with SIGKILL, again and again, and looks what is left.

    python -m benchmarks.kill_store                100 kills
    python -m benchmarks.kill_store --kills 5

The writer is a running node, connected to nobody, that writes numbered rows to every table of its store and, each time
that a write has returned, says the number: that is acknowledged. It is killed at a random moment. Then the file must
open as a node opens it, pass SQLite's full integrity check, and hold every number acknowledged in this round and in
those before; at most the one write that was under way may be there beyond. As many processes again are killed while
they make the file.

Exit code 1 if anything is lost. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio

from daaswarm.config import Config
from daaswarm.core.signing import get_peer_id
from daaswarm.errors import StorageError
from daaswarm.messages import Signed
from daaswarm.node.life import open_node
from daaswarm.store.data_dir import DataDir
from daaswarm.store.database import Database
from daaswarm.store.files import Damaged
from daaswarm.store.records import AdvertRecord, Deployment, ModelRecord, PeerRecord
from daaswarm.types import ModelRoot, PeerId

ROOT = ModelRoot("ab" * 32)
NEVER = 4e9  # Unix time, s; of adverts that don't expire meanwhile
LIVED_S = 0.5  # a writer lives up to this long after its first write; then thousands of rows are in a checkpoint's way
MADE_S = 0.02  # making the file takes about that long
LAST = 200  # rows that are checked one by one; older ones may have been pruned

HOME = Path(__file__).resolve().parent.parent
MAKER = """
import sys
from pathlib import Path
from daaswarm.store.database import Database
print(flush=True)
Database.open(Path(sys.argv[1])).close()
"""


def make_peer_id(number: int) -> PeerId:
    return get_peer_id(number.to_bytes(32, "big"))


async def write(path: Path, number: int) -> None:
    """Be a node that writes ``number``, ``number + 1``, … until killed; each is acknowledged on standard output."""
    data_dir = DataDir(path.parent)
    with data_dir.lock():
        async with open_node(data_dir, Config(), listen=True, libp2p=False, is_owner=True) as node:
            store = node.memory.store
            while True:
                peer, now = make_peer_id(number), float(number)
                store.tally.note("served", peer, ROOT, now, calls=1)
                store.tally.note("asked", "", ROOT, 0.0, calls=1)
                signed = Signed(public_key=bytes(32), signature=bytes(64), payload=number.to_bytes(8, "big") * 100)
                is_saved = await store.save(
                    [PeerRecord(peer_id=peer, addrs=["/ip4/192.0.2.1/tcp/1"], first_seen=now, last_seen=now)],
                    [AdvertRecord(peer_id=peer, model_root=ROOT, seq=number, expires_at=NEVER + number, signed=signed)],
                )
                assert is_saved
                print("saved", number, flush=True)
                await store.put_deployment(
                    Deployment(
                        model_root=ROOT,
                        dtype="f32",
                        name=f"{number}",
                        source="/m",
                        held=get_held(number),
                        created_at=0.0,
                    )
                )
                print("deployed", number, flush=True)
                await store.put_model(
                    ModelRecord(folder=f"/m/{number}", model_root=ROOT, name="m", kind="moe", used_at=now)
                )
                print("used", number, flush=True)
                number += 1


def get_held(number: int) -> dict[int, list[int]]:
    """What deployment ``number`` holds, so that one can't be taken for another."""
    return {0: [number % 64], 1: [bit for bit in range(32) if number >> bit & 1]}


def run_round(path: Path, first: int, lived_s: float, acknowledged: dict[str, list[int]]) -> None:
    """Start a writer, kill it, and add what it had acknowledged, by kind of write."""
    writer = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kill_store", "--write", str(path), "--first", str(first)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=HOME,
    )
    assert writer.stdout is not None
    with writer, writer.stdout as said:
        lines = [said.readline()]  # the first write is done: from here on it writes all the time
        time.sleep(lived_s)
        writer.kill()
        lines += said  # what it had said before it died
    for line in lines:
        if line.endswith("\n"):
            kind, number = line.split()
            acknowledged[kind].append(int(number))


def check(path: Path, acknowledged: dict[str, list[int]]) -> list[str]:
    """What is wrong; nothing, if all is well."""
    wrong: list[str] = []
    database = Database.open(path)
    try:
        found = database._connection.execute("PRAGMA integrity_check").fetchall()
        if found != [("ok",)]:
            wrong.append(f"integrity_check: {found}")
        saved = acknowledged["saved"][-1]
        counted = count_saves(database)
        if not saved <= counted <= saved + 1:
            wrong.append(f"{saved} saves acknowledged, {counted} counted")
        peers = {peer.peer_id for peer in database.get_peers()}
        adverts = {advert.peer_id: advert.seq for advert in database.get_adverts(0.0)}
        for number in acknowledged["saved"][-LAST:]:
            if make_peer_id(number) not in peers or adverts.get(make_peer_id(number)) != number:
                wrong.append(f"peer or advert {number} is lost")
        deployments = {int(deployment.name): deployment.held for deployment in database.get_deployments()}
        if acknowledged["deployed"]:
            last = acknowledged["deployed"][-1]
            if len(deployments) != 1 or any(
                not last <= number <= counted or held != get_held(number) for number, held in deployments.items()
            ):
                wrong.append(f"deployment {last} acknowledged, found {deployments}")
        folders = {model.folder for model in database.get_models()}
        wrong += [f"model {number} is lost" for number in acknowledged["used"][-LAST:] if f"/m/{number}" not in folders]
    finally:
        database.close()
    if aside := list(path.parent.glob("*corrupt*")):
        wrong.append(f"set aside: {aside}")
    return wrong


def run(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """All rounds on one file; the figures."""
    rng = random.Random(seed)
    path = folder / "node.db"
    acknowledged: dict[str, list[int]] = {"saved": [], "deployed": [], "used": []}
    wrong: list[str] = []
    next_number = 1
    beyond = 0
    started = time.monotonic()
    for kill in range(kills):
        run_round(path, next_number, rng.random() ** 2 * LIVED_S, acknowledged)
        wrong += [f"kill {kill}: {text}" for text in check(path, acknowledged)]
        database = Database.open(path)
        next_number = count_saves(database) + 1  # after the one that was under way, if it is there
        database.close()
        beyond += next_number - 1 - acknowledged["saved"][-1]
    return {
        "kills": kills,
        "seed": seed,
        "acknowledged_writes": sum(map(len, acknowledged.values())),
        "lost_or_damaged": len(wrong),
        "wrong": wrong[:20],
        "there_but_not_yet_acknowledged": beyond,
        "database_bytes": path.stat().st_size,
        "seconds": round(time.monotonic() - started, 1),
    }


def run_creations(folder: Path, kills: int, seed: int) -> list[str]:
    """Kill a process while it makes the file; what is wrong with what it left."""
    rng = random.Random(seed)
    wrong: list[str] = []
    for kill in range(kills):
        path = folder / f"{kill}" / "node.db"
        path.parent.mkdir()
        maker = subprocess.Popen([sys.executable, "-c", MAKER, str(path)], stdout=subprocess.PIPE, cwd=HOME)
        assert maker.stdout is not None
        with maker, maker.stdout as said:
            said.readline()  # everything is imported
            time.sleep(rng.random() * MADE_S)
            maker.kill()
        left = {file.name: file.stat().st_size for file in path.parent.iterdir()}
        try:
            database = Database.open(path)
        except (Damaged, StorageError) as error:
            wrong.append(f"creation {kill}: {error}: {left}")
        else:
            database.close()
    return wrong


def count_saves(database: Database) -> int:
    return sum(row.calls for row in database.get_calls() if row.direction == "asked")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        trio.run(write, arguments.write, arguments.first)
        return 0
    with tempfile.TemporaryDirectory(prefix="daaswarm-") as folder:
        result = run(Path(folder), arguments.kills, arguments.seed)
    with tempfile.TemporaryDirectory(prefix="daaswarm-") as folder:
        wrong = run_creations(Path(folder), arguments.kills, arguments.seed)
    print(json.dumps({**result, "creations_killed": arguments.kills, "creations_wrong": wrong}))
    return 1 if result["wrong"] or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
