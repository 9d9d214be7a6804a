"""``bench byzantine``: requests to honest and hostile hosts, and how many wrong rows get through.

Real nodes on real sockets, several in a process; the requester is the product's own (``SwarmExperts`` and auditor),
and every answer that it goes on with is compared with the truth, outside the measured time. In the same run: nobody
checking, and a vote of three.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trio
from torch import Tensor

from daaswarm.bench.child import Child, start_process
from daaswarm.bench.expert_calls import ROOT, START_S
from daaswarm.bench.hostile import HONEST, NAME, make_layer, make_weights
from daaswarm.config import Config
from daaswarm.core.reputation import Reputation
from daaswarm.core.verify import OFF, Verify
from daaswarm.errors import DaaswarmError
from daaswarm.inference.auditing import Auditor, Ledger, is_near
from daaswarm.inference.hedged import Sent
from daaswarm.inference.plan import HostPlan
from daaswarm.inference.requester import SharedRouter
from daaswarm.inference.shares import Share
from daaswarm.inference.swarm_experts import SwarmExperts
from daaswarm.messages import Contact, ExpertCall
from daaswarm.models.secrets import Form, Secrets, save_secrets
from daaswarm.net.network import Network, connect_all
from daaswarm.node.life import open_node
from daaswarm.node.reporting import Emit
from daaswarm.store.data_dir import DataDir
from daaswarm.types import ExpertId, PeerId

PROCESSES = 2  # that hosts are spread over
CANDIDATES = 4  # hosts that a request may go to, drawn anew for each
VOTERS = 3
ROWS_KEPT = 4_096  # different rows that are asked for
CONFIDENCE = 3.0  # -ln 0.05: with no event in n, the rate is below 3 / n with 95 %


@dataclass
class Tally:
    """What came of one way of checking."""

    requests: int = 0
    failed: int = 0
    rows: int = 0
    wrong_rows: int = 0
    wrong_before_last_ban: int = 0
    wall_s: float = 0.0
    host_s: float = 0.0
    check_s: float = 0.0
    nbytes: int = 0
    answered: Counter[PeerId] = field(default_factory=Counter)
    banned_after: dict[PeerId, int] = field(default_factory=dict)  # calls that it had answered
    wrong: Counter[PeerId] = field(default_factory=Counter)  # audits that it failed


class CountedExperts(SwarmExperts):
    """Counts all that it sends and receives, audits included."""

    tally: Tally

    def submit(self, layer: int, peer: PeerId, share: Share, *, codec: str = "", opened: bool = False) -> Sent:
        sent = super().submit(layer, peer, share, codec=codec, opened=opened)
        self.tally.nbytes += sent.sent_bytes
        return sent

    def wait(self, call: Any) -> Any:
        reply, body = super().wait(call)
        self.tally.host_s += reply.service_us / 1e6
        self.tally.nbytes += len(body)
        return reply, body


class TimedAuditor(Auditor):
    """Notes what judging takes."""

    tally: Tally

    def judge(self, *args: Any, **kwargs: Any) -> int:
        started = time.perf_counter()
        try:
            return super().judge(*args, **kwargs)
        finally:
            self.tally.check_s += time.perf_counter() - started

    def recompute(self, *args: Any, **kwargs: Any) -> Tensor | None:
        started = time.perf_counter()
        try:
            return super().recompute(*args, **kwargs)
        finally:
            self.tally.check_s += time.perf_counter() - started


class Requests:
    """The requester's side. Lives in the model's thread.

    Args:
        contacts: of the hosts.
        secrets: made of the true weights.
    """

    def __init__(
        self,
        network: Network,
        contacts: dict[PeerId, Contact],
        secrets: Secrets,
        truth: Any,
        *,
        dim: int,
        batch: int,
        seed: int,
    ) -> None:
        self._network = network
        self._contacts = contacts
        self._secrets = secrets
        self._truth = truth
        generator = torch.Generator().manual_seed(seed)
        self._rows = torch.randn(max(ROWS_KEPT, batch), dim, generator=generator)
        with torch.inference_mode():
            self._right: Tensor = truth.compute_slices(self._rows, [0])
        self._batch = batch
        self._seed = seed

    def run(self, verify: Verify, count: int) -> Tally:
        """Requests, one after the other, each to hosts drawn anew."""
        rng, tally = random.Random(self._seed), Tally()
        ledger = Ledger(Reputation())
        auditor = TimedAuditor(verify, ledger, ROOT, self._secrets, self._recompute)
        auditor.tally = tally
        experts = CountedExperts(
            self._make_plan(list(self._contacts)),
            self._network,
            SharedRouter(rng),
            refresh=lambda: self._make_plan(list(self._contacts)),
            call_timeout_s=10.0,
            model_name=NAME,
            auditor=auditor if verify != OFF else None,
        )
        experts.tally = tally
        for _ in range(count):
            living = [peer for peer in self._contacts if peer not in tally.banned_after]
            experts.use_plan(self._make_plan(rng.sample(living, min(CANDIDATES, len(living)))))
            at = rng.randrange(len(self._rows) - self._batch + 1)
            started = time.perf_counter()
            try:
                sums = experts(0, self._rows[at : at + self._batch], None, None)
            except DaaswarmError:
                tally.failed += 1
                sums = None
            tally.wall_s += time.perf_counter() - started
            tally.requests += 1
            if sums is not None:
                self._compare(sums, at, tally)
            use, _ = experts.take_use()
            for peer, part in use.items():
                tally.answered[peer] += part.calls
            tally.wrong.update(experts.take_audits().wrong)
            for peer in ledger.get_banned() - tally.banned_after.keys():
                tally.banned_after[peer] = tally.answered[peer]
                tally.wrong_before_last_ban = tally.wrong_rows
        return tally

    def run_majority(self, count: int) -> Tally:
        """Three hosts compute each request, and what two of them say is taken."""
        rng, tally = random.Random(self._seed), Tally()
        experts = CountedExperts(
            self._make_plan(list(self._contacts)),
            self._network,
            SharedRouter(rng),
            refresh=lambda: self._make_plan(list(self._contacts)),
            call_timeout_s=10.0,
            model_name=NAME,
        )
        experts.tally = tally
        for _ in range(count):
            at = rng.randrange(len(self._rows) - self._batch + 1)
            rows = self._rows[at : at + self._batch]
            started = time.perf_counter()
            sent = [experts.submit(0, p, Share([0], rows, None)) for p in rng.sample(list(self._contacts), VOTERS)]
            said = [experts.read(item) for item in sent]
            pairs = ((a, b) for i, a in enumerate(said) for b in said[i + 1 :])
            taken = next((a for a, b in pairs if is_near(a, b, rows.dtype)), said[0])
            tally.wall_s += time.perf_counter() - started
            tally.requests += 1
            self._compare(taken, at, tally)
        return tally

    def _compare(self, sums: Tensor, at: int, tally: Tally) -> None:
        right = self._right[at : at + self._batch]
        away = (sums - right).norm(dim=1) > 1e-4 * right.norm(dim=1)
        tally.rows += self._batch
        tally.wrong_rows += int((away | ~sums.isfinite().all(1)).sum())

    def _recompute(self, call: ExpertCall, share: Share) -> Tensor:
        with torch.inference_mode():
            return self._truth.compute_slices(share.rows, [0])

    def _make_plan(self, peers: list[PeerId]) -> HostPlan:
        return HostPlan(ROOT, "f32", {0: 1}, {ExpertId(0, 0): peers}, self._contacts, kind="dense")


async def run_byzantine(
    data_dir: DataDir,
    config: Config,
    *,
    hosts: int,
    fraction: float,
    requests: int,
    strategy: str,
    verify: Verify,
    dim: int,
    width: int,
    batch: int,
    seed: int,
    folder: Path,
    emit: Emit,
) -> dict[str, Any]:
    """Raises:
    DaaswarmError: a process didn't start.
    """
    rng = random.Random(seed)
    strategies = [strategy] * round(fraction * hosts)
    strategies += [HONEST] * (hosts - len(strategies))
    rng.shuffle(strategies)
    weights = make_weights(dim, width, seed)
    truth = make_layer(weights)
    path = folder / "secrets.safetensors"
    save_secrets([(0, Form(truth.activation, [weights]))], ROOT, "f32", path)
    async with AsyncExitStack() as stack:
        contacts: dict[PeerId, Contact] = {}
        liars: set[PeerId] = set()
        children: list[Child] = []
        for number in range(PROCESSES):
            mine = ",".join(strategies[number::PROCESSES])
            options = ["--strategies", mine, "--dim", f"{dim}", "--width", f"{width}", "--seed", f"{seed}"]
            options += ["--data-dir", f"{folder / f'hosts{number}'}"]
            child = Child(await start_process("bench", "serve-byzantine", *options))
            stack.push_async_callback(child.close)
            children.append(child)
        for child in children:
            event = None
            with trio.move_on_after(START_S):
                event = await child.read()
            if event is None or "hosts" not in event:
                raise DaaswarmError("the hosts' process did not start", hint="its messages are above")
            for host in event["hosts"]:
                contacts[PeerId(host["peer_id"])] = Contact(peer_id=host["peer_id"], addrs=host["addrs"])
                if host["strategy"] not in (HONEST, "slow"):
                    liars.add(PeerId(host["peer_id"]))
        node = await stack.enter_async_context(open_node(data_dir, config, listen=False, libp2p=False))
        await connect_all(node.network, contacts.values())
        asked = Requests(node.network, contacts, Secrets(path, ROOT, "f32"), truth, dim=dim, batch=batch, seed=seed)

        async def measure(what: str, work: Any) -> Tally:
            await emit({"event": "progress", "what": what, "done": 0, "total": 0})
            return await trio.to_thread.run_sync(work, abandon_on_cancel=True)

        checked = await measure(f"{verify}", lambda: asked.run(verify, requests))
        few = max(1, min(requests, 2_000))
        unchecked = await measure("nobody checks", lambda: asked.run(OFF, few))
        majority = await measure("three vote", lambda: asked.run_majority(max(1, min(requests, 1_000))))
    return {
        "hosts": hosts,
        "fraction": fraction,
        "strategy": strategy,
        "verify": str(verify),
        "dim": dim,
        "width": width,
        "batch": batch,
        "seed": seed,
        **describe(checked, liars, unchecked),
        "none": describe_rows(unchecked),
        "majority_of_three": describe_rows(majority),
    }


def describe_rows(tally: Tally) -> dict[str, Any]:
    """How much that is wrong was delivered."""
    rate = (tally.wrong_rows + (0 if tally.wrong_rows else CONFIDENCE)) / max(1, tally.rows)
    upper = {} if tally.wrong_rows else {"wrong_rate_upper_95": round(rate, 7)}
    return {"requests": tally.requests, "rows": tally.rows, "wrong_delivered": tally.wrong_rows, **upper}


def describe(tally: Tally, liars: set[PeerId], unchecked: Tally) -> dict[str, Any]:
    """The figures of the checked run, beside those of the run in which nobody checked."""
    accused = (set(tally.wrong) | set(tally.banned_after)) - liars
    calls_to_ban = [count for peer, count in tally.banned_after.items() if peer in liars]

    def per_request(value: float, of: Tally) -> float:
        return value / max(1, of.requests)

    compute = per_request(tally.host_s + tally.check_s, tally) / per_request(unchecked.host_s, unchecked)
    return {
        **describe_rows(tally),
        "failed": tally.failed,
        "false_accusations": len(accused),
        "liars": len(liars),
        "banned": len(calls_to_ban),
        "wrong_before_last_ban": tally.wrong_before_last_ban,
        "median_calls_to_ban": statistics.median(calls_to_ban) if calls_to_ban else None,
        "compute_ratio": round(compute, 3),
        "wall_ratio": round(per_request(tally.wall_s, tally) / per_request(unchecked.wall_s, unchecked), 3),
        "bytes_ratio": round(per_request(tally.nbytes, tally) / per_request(unchecked.nbytes, unchecked), 3),
    }
