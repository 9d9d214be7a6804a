"""``bench dht``: a swarm of processes on this machine; storing and getting one after the other, before and after a part
of them is killed.

Each peer is a whole node behind a pipe: one line of JSON asks it for one operation, one line tells how it went. Times
are taken here, so they hold the way through the pipe as well, as hivemind's benchmark does (``benchmarks/hivemind``).
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import trio

from daaswarm.bench.child import Child, start_process
from daaswarm.config import Config
from daaswarm.core.health import State
from daaswarm.errors import DaaswarmError
from daaswarm.node.life import open_node
from daaswarm.node.reporting import Emit
from daaswarm.store.data_dir import DataDir
from daaswarm.types import ModelRoot, PeerId

START_S = 120.0  # for one wave of processes on a busy machine
OPERATION_S = 60.0  # anything slower is a failure, and counted as one
WAVE = 8  # processes started at the same time
BOOTSTRAPS = 4  # earlier peers that a new one is told, so that none of them carries the swarm
GONE_S = 60.0  # after this nobody may be told of a killed peer


class Peer(Child):
    """One node in a process of its own, that does what it is asked."""

    def __init__(self, process: trio.Process) -> None:
        super().__init__(process)
        self.peer_id = ""
        self.addrs: list[str] = []
        self._unread = 0  # answers to what was asked so far

    async def join(self) -> None:
        """Wait until it is one of the swarm.

        Raises:
            DaaswarmError: it didn't start.
        """
        hint = "its messages are above; try fewer --peers"
        contact = await self.wait_ready(START_S, DaaswarmError("a peer's process did not start", hint=hint))
        self.peer_id, self.addrs = contact.peer_id, contact.addrs

    async def ask(self, operation: str, root: ModelRoot) -> tuple[dict[str, Any] | None, float]:
        """Its answer, ``None`` if there was none in time, and the seconds it took."""
        assert self.process.stdin is not None
        line = msgspec.json.encode({"operation": operation, "root": root}) + b"\n"
        started = time.perf_counter()
        answer = None
        with trio.move_on_after(OPERATION_S):
            self._unread += 1
            await self.process.stdin.send_all(line)
            while self._unread:  # also those that came too late: they answer something else
                answer = await self.read()
                self._unread -= 1
            return answer, time.perf_counter() - started
        return None, time.perf_counter() - started


async def serve(data_dir: DataDir, config: Config, pipe: trio.abc.ReceiveStream, emit: Emit) -> None:
    """One peer's side, until its pipe ends."""
    async with open_node(data_dir, config, listen=True, libp2p=False) as node:
        await node.bootstrap(config.network.bootstrap)
        await emit({"event": "ready", "peer_id": node.peer_id, "addrs": node.addrs})
        discovery = node.discovery
        async for line in _read_lines(pipe):
            asked = msgspec.json.decode(line, type=dict[str, str])
            root = ModelRoot(asked["root"])
            if asked["operation"] == "store":
                discovery.advertise(root, "bench", "dense", {0: [0]}, "f32")
                done = await discovery.wait_published(root)
                await emit({"stored": done.stored, "asked": done.asked})
            elif asked["operation"] == "get":  # what the DHT says
                pointed = await discovery.finder.get_pointed(root)
                await emit({"peers": [contact.peer_id for contact in pointed]})
            elif asked["operation"] == "known":  # what it has heard of, without asking anybody
                known = [PeerId(each.advert.peer_id) for each in discovery.book.get_adverts(root, time.time())]
                up = [peer for peer in known if discovery.membership.get_state(peer) is State.UP]
                await emit({"peers": known, "up": up})
            else:  # what a requester is offered: each was asked, and answers now
                await emit({"peers": [known.advert.peer_id for known in await discovery.find_adverts(root)]})


async def _read_lines(pipe: trio.abc.ReceiveStream) -> AsyncGenerator[bytes, None]:
    data = bytearray()
    while piece := await pipe.receive_some(65_536):
        data += piece
        while b"\n" in data:
            line, _, rest = bytes(data).partition(b"\n")
            data = bytearray(rest)
            yield line


async def run_dht(*, peers: int, keys: int, kill: float, seed: int, folder: Path, emit: Emit) -> dict[str, Any]:
    """``keys`` models, each stored by a random peer and got by another; then ``kill`` of all peers die.

    Raises:
        DaaswarmError: a process didn't start.
    """
    rng = random.Random(seed)
    started = time.perf_counter()
    async with open_peers(peers, rng, folder, emit) as swarm:
        result: dict[str, Any] = {"peers": peers, "keys": keys, "seed": seed, "wall_start_s": _since(started)}
        result["rss_mb_per_peer"] = round(_get_memory(swarm) / len(swarm) / 1e6, 1)
        owners: dict[ModelRoot, Peer] = {}
        result["before"] = await _measure(swarm, owners, _make_roots(rng, keys), rng, emit, "all peers are there")
        victims = rng.sample(swarm[1:], round(kill * peers))
        result["killed"] = len(victims)
        if not victims:
            return result
        for victim in victims:
            victim.process.kill()
        killed_at = time.perf_counter()
        live = [peer for peer in swarm if peer not in victims]
        old = await _get_all(live, owners, rng, emit, "after the kill, old keys")
        result["after_old_keys"] = old
        fresh: dict[ModelRoot, Peer] = {}
        result["after_new_keys"] = await _measure(
            live, fresh, _make_roots(rng, keys), rng, emit, "after the kill, new keys"
        )
        await _tell(emit, f"waiting until {GONE_S:g} s after the kill", 0, 0)
        await trio.sleep(max(0.0, GONE_S - (time.perf_counter() - killed_at)))
        result["after_60_s"] = await _look_for_dead(live, owners, victims, rng, emit)
    return result


def _make_roots(rng: random.Random, keys: int) -> list[ModelRoot]:
    return [ModelRoot(rng.randbytes(32).hex()) for _ in range(keys)]


async def _measure(
    live: list[Peer], owners: dict[ModelRoot, Peer], roots: list[ModelRoot], rng: random.Random, emit: Emit, text: str
) -> dict[str, Any]:
    times: list[float] = []
    stored = 0
    for i, root in enumerate(roots):
        await _tell(emit, f"{text}: storing", i + 1, len(roots))
        owner = rng.choice(live)
        answer, seconds = await owner.ask("store", root)
        times.append(seconds)
        stored += answer is not None and answer["stored"] > 0
        owners[root] = owner
    gets = await _get_all(live, owners, rng, emit, text)
    return {"store_success": _share(stored, len(roots)), **_describe("store", times), **gets}


async def _get_all(
    live: list[Peer], owners: dict[ModelRoot, Peer], rng: random.Random, emit: Emit, text: str
) -> dict[str, Any]:
    times: list[float] = []
    right = 0
    for i, (root, owner) in enumerate(owners.items()):
        await _tell(emit, f"{text}: getting", i + 1, len(owners))
        answer, seconds = await rng.choice(live).ask("get", root)
        times.append(seconds)
        right += answer is not None and answer["peers"] == [owner.peer_id]
    return {"get_success": _share(right, len(owners)), **_describe("get", times)}


async def _look_for_dead(
    live: list[Peer], owners: dict[ModelRoot, Peer], victims: list[Peer], rng: random.Random, emit: Emit
) -> dict[str, Any]:
    """What requesters are offered. Whoever lives has to be, and whoever was killed must not."""
    dead = {victim.peer_id for victim in victims}
    times: list[float] = []
    alive = found = offered_dead = 0
    for i, (root, owner) in enumerate(owners.items()):
        await _tell(emit, "looking for dead peers", i + 1, len(owners))
        answer, seconds = await rng.choice(live).ask("find", root)
        times.append(seconds)
        offered: list[str] = answer["peers"] if answer is not None else []
        offered_dead += bool(dead.intersection(offered))
        if owner.peer_id not in dead:
            alive += 1
            found += offered == [owner.peer_id]
    return {
        "offers_of_dead_peers": offered_dead,
        "find_success_of_live_hosts": _share(found, alive),
        **_describe("find", times),
    }


def _describe(name: str, times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        f"{name}_p50_ms": round(statistics.median(ordered) * 1000, 2),
        f"{name}_p99_ms": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1000, 2),
        f"{name}_max_ms": round(ordered[-1] * 1000, 2),
    }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 1.0


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 1)


def _get_memory(swarm: Iterable[Peer]) -> int:
    return sum(psutil.Process(peer.process.pid).memory_info().rss for peer in swarm)


@asynccontextmanager
async def open_peers(peers: int, rng: random.Random, folder: Path, emit: Emit) -> AsyncIterator[list[Peer]]:
    """Starts them in waves, each told a few that run already; kills them at the end.

    Raises:
        DaaswarmError: a process didn't start.
    """
    swarm: list[Peer] = []
    try:
        while len(swarm) < peers:
            await _tell(emit, "starting peers", len(swarm), peers)
            seeds = [peer.addrs[0] for peer in rng.sample(swarm, min(BOOTSTRAPS, len(swarm)))]
            wave: list[Peer] = []
            for _ in range(min(WAVE if swarm else 1, peers - len(swarm))):
                wave.append(await _start(folder / str(len(swarm)), seeds))
                swarm.append(wave[-1])
            for peer in wave:
                await peer.join()
        await _tell(emit, "starting peers", peers, peers)
        yield swarm
    finally:
        for peer in swarm:  # all at once, before any is waited for
            peer.process.kill()
        for peer in swarm:
            await peer.close()


async def _start(folder: Path, seeds: list[str]) -> Peer:
    options = [word for seed in seeds for word in ("--bootstrap", seed)]
    return Peer(await start_process("bench", "serve-dht", "--data-dir", str(folder), *options))


async def _tell(emit: Emit, what: str, done: int, total: int) -> None:
    await emit({"event": "progress", "what": what, "done": done, "total": total})
