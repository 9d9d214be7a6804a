"""A swarm for plain torch code: the node and its event loop run in a thread beside it."""

from __future__ import annotations

import random
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import trio
from torch import Tensor

from daaswarm.config import get_cache_dir, load_config
from daaswarm.errors import (
    Busy,
    DaaswarmError,
    LocalProtocolError,
    RemoteProtocolError,
    TooLarge,
    unwrap_groups,
)
from daaswarm.inference.plan import HostPlan
from daaswarm.inference.swarm_experts import TORCH_DTYPES, as_bytes
from daaswarm.messages import ExpertCall, ExpertReply
from daaswarm.models.sources import LocalModel, find_model
from daaswarm.node.coordinator import SwarmCoordinator
from daaswarm.node.life import open_node
from daaswarm.store.data_dir import DataDir
from daaswarm.types import Dtype, PeerId

OPEN_S = 60.0  # until the swarm is met; each dial has a shorter deadline of its own
CLOSE_S = 30.0  # for the goodbye
ROWS_PER_CALL = 512  # more travel as several calls, so that no host has others wait for long
BUSY_RETRIES = 20  # times that a call waits for a busy host, 2 s at most each, before another one is asked
BUSY_WAIT_S = 2.0
VALUE_BYTES = 4  # of sums and gradients: f32


@dataclass(frozen=True)
class Work:
    """What experts shall compute.

    Attributes:
        rows: (n, hidden) of the wire's dtype.
        row_index, expert_index, weights: (pairs,) each; ``None`` for slices of a dense layer.
        upstream: (n, hidden) f32, the gradient of the sums, where gradients are wanted.
    """

    layer: int
    experts: list[int]
    rows: Tensor
    row_index: Tensor | None = None
    expert_index: Tensor | None = None
    weights: Tensor | None = None
    upstream: Tensor | None = None


class TrainingSwarm:
    """What :func:`open_swarm` opens. All methods block, and are for any thread but the event loop's."""

    def __init__(self, node: SwarmCoordinator, token: trio.lowlevel.TrioToken) -> None:
        self._node = node
        self._token = token
        self._rng = random.Random()

    def find_model(self, name_or_path: str) -> LocalModel:
        """A model by name or folder; only its manifest is read.

        Raises:
            ModelError, Offline: as ``models.sources.find_model``.
        """
        return find_model(name_or_path, get_cache_dir())

    def find_hosts(self, model: LocalModel, dtype: Dtype) -> HostPlan:
        """Who serves the model in ``dtype`` now."""
        try:
            return trio.from_thread.run(self._node.answering.find_hosts, model, dtype, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled) as error:
            raise _closed() from error

    def compute(self, plan: HostPlan, work: Work) -> tuple[Tensor, Tensor | None]:
        """Sums, or with ``upstream`` the gradients of the rows and the weights.

        Returns:
            (n, hidden) f32; gradients of the weights, (pairs,) f32, where there are both.

        Raises:
            NoPeerCouldServe: an expert that is needed has no host in the plan.
            DaaswarmError: what the last of its hosts answered, where all refused or failed.
        """
        try:
            return trio.from_thread.run(self._compute, plan, work, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled) as error:
            raise _closed() from error

    async def _compute(self, plan: HostPlan, work: Work) -> tuple[Tensor, Tensor | None]:
        out = torch.zeros(work.rows.shape, dtype=torch.float32)
        has_pairs = work.weights is not None
        of_weights = torch.zeros(len(work.weights)) if work.weights is not None and work.upstream is not None else None
        for start in range(0, len(work.rows), ROWS_PER_CALL):
            part = slice(start, start + ROWS_PER_CALL)
            experts, failed, last = set(work.experts), set[PeerId](), None
            if has_pairs:
                assert work.expert_index is not None
                experts &= set(work.expert_index[_get_places(work, part, experts)].tolist())
            while experts:
                left: set[int] = set()
                shares = [
                    (peer, chosen, _get_places(work, part, set(chosen)) if has_pairs else None)
                    for peer, chosen in self._choose(plan, work.layer, experts, failed, last)
                ]
                answers = await self._ask(plan, work, part, shares)
                # In the order they were chosen, whoever answered first: sums of floats depend on it.
                for (peer, chosen, places), answer in zip(shares, answers, strict=True):
                    if isinstance(answer, TooLarge | LocalProtocolError):  # ours; nobody would be sent anything else
                        raise answer
                    if isinstance(answer, DaaswarmError):
                        failed.add(peer)
                        left |= set(chosen)
                        last = answer
                        continue
                    rows, weights = answer
                    out[part] += rows
                    if of_weights is not None and weights is not None and places is not None:
                        of_weights[places] = weights
                experts = left
        return out, of_weights

    def _choose(
        self, plan: HostPlan, layer: int, experts: set[int], failed: set[PeerId], last: DaaswarmError | None
    ) -> list[tuple[PeerId, list[int]]]:
        """As few hosts as a greedy choice finds, each with its share; replicas take turns by chance."""
        left, chosen = set(experts), list[tuple[PeerId, list[int]]]()
        holders = plan.by_layer.get(layer, {})
        while left:
            held: dict[PeerId, list[int]] = {}
            for expert in sorted(left):
                for peer in holders.get(expert, ()):
                    if peer not in failed:
                        held.setdefault(peer, []).append(expert)
            if not held:
                raise last or plan.describe_missing({layer: sorted(left)}, f"model {plan.root[:12]}")
            most = max(map(len, held.values()))
            peer = self._rng.choice([peer for peer in held if len(held[peer]) == most])
            chosen.append((peer, held[peer]))
            left -= set(held[peer])
        return chosen

    async def _ask(
        self, plan: HostPlan, work: Work, part: slice, shares: list[tuple[PeerId, list[int], Tensor | None]]
    ) -> list[tuple[Tensor, Tensor | None] | DaaswarmError]:
        """Each host's answer, or what went wrong with it; all hosts are asked at once."""
        answers: dict[int, tuple[Tensor, Tensor | None] | DaaswarmError] = {}

        async def ask(number: int, peer: PeerId, chosen: list[int], places: Tensor | None) -> None:
            try:
                answers[number] = await self._call(plan, peer, work, part, chosen, places)
            except DaaswarmError as error:
                answers[number] = error

        async with trio.open_nursery() as nursery:
            for number, share in enumerate(shares):
                nursery.start_soon(ask, number, *share)
        return [answers[number] for number in range(len(shares))]

    async def _call(
        self, plan: HostPlan, peer: PeerId, work: Work, part: slice, experts: list[int], places: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        rows = work.rows[part]
        pairs = 0 if places is None else len(places)
        body = [as_bytes(rows)]
        if places is not None and work.row_index is not None and work.expert_index is not None:
            assert work.weights is not None
            body += [as_bytes((work.row_index[places] - part.start).to(torch.int32))]
            body += [as_bytes(work.expert_index[places].to(torch.int32)), as_bytes(work.weights[places].float())]
        if work.upstream is not None:
            body += [as_bytes(work.upstream[part])]
        call = ExpertCall(
            model_root=plan.root,
            layer=work.layer,
            experts=experts,
            dtype=plan.dtype,
            rows=rows.shape[0],
            hidden=rows.shape[1],
            pairs=pairs,
            grad=work.upstream is not None,
        )
        deadline_s = self._node.config.infer.call_timeout_s
        for tries_left in reversed(range(BUSY_RETRIES)):
            try:
                contact = plan.contacts[peer]
                reply, answer = await self._node.network.call(contact, call, body, deadline_s=deadline_s)
                break
            except Busy as error:
                if not tries_left:
                    raise
                await trio.sleep(min(max(error.retry_after_s, 0.01), BUSY_WAIT_S))
        else:
            raise AssertionError("the last try returns or raises")
        wanted = VALUE_BYTES * (rows.numel() + (pairs if call.grad else 0))
        if not isinstance(reply, ExpertReply) or len(answer) != wanted:
            raise RemoteProtocolError(f"{peer} answered {len(answer)} bytes to a call for {wanted}", reject=False)
        values = torch.frombuffer(answer, dtype=torch.float32)
        if not bool(values.isfinite().all()) and bool(rows.isfinite().all()):
            raise RemoteProtocolError(f"{peer} answered values that are no numbers", reject=False)
        return values[: rows.numel()].view(rows.shape), values[rows.numel() :] if call.grad and pairs else None


def _get_places(work: Work, part: slice, experts: set[int]) -> Tensor:
    """The pairs of these rows and experts."""
    assert work.row_index is not None and work.expert_index is not None
    mine = (work.row_index >= part.start) & (work.row_index < part.stop)
    return (mine & torch.isin(work.expert_index, torch.tensor(sorted(experts)))).nonzero()[:, 0]


def _closed() -> DaaswarmError:
    return DaaswarmError("the swarm was closed", hint="use remote experts inside the open_swarm block")


@contextmanager
def open_swarm(bootstrap: Sequence[str] = (), *, data_dir: Path | None = None) -> Iterator[TrainingSwarm]:
    """Be one of a swarm for a while, as a node that only asks.

    Args:
        bootstrap: multiaddresses of peers; none: those that are configured.
        data_dir: has the settings and the identity; ``None``: a new identity and no file of settings. Not the data
            directory of a node that runs.

    Raises:
        ConfigError: no address led to the swarm, or a bad setting.
    """
    opened: Future[tuple[TrainingSwarm, trio.Event]] = Future()
    tokens: Future[trio.lowlevel.TrioToken] = Future()

    async def live(data: DataDir) -> None:
        token = trio.lowlevel.current_trio_token()
        tokens.set_result(token)
        config = load_config(data.config_path)
        async with open_node(data, config, listen=False, libp2p=False) as node:
            await node.bootstrap(list(bootstrap) or config.network.bootstrap)
            stop = trio.Event()
            opened.set_result((TrainingSwarm(node, token), stop))
            await stop.wait()

    def run(data: DataDir) -> None:
        try:
            with unwrap_groups():
                trio.run(live, data)
        except BaseException as error:
            if opened.done():
                raise
            opened.set_exception(error)

    with ExitStack() as stack:
        path = data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="daaswarm-")))
        thread = threading.Thread(target=run, args=(DataDir(path),), name="daaswarm", daemon=True)
        thread.start()
        swarm, stop = opened.result(OPEN_S)
        try:
            yield swarm
        finally:
            with suppress(trio.RunFinishedError):
                tokens.result().run_sync_soon(stop.set)
            thread.join(CLOSE_S)


def to_wire(rows: Tensor, dtype: Dtype) -> Tensor:
    """A copy of rows as a host takes them: on the CPU, of the plan's dtype. A copy, since backward sends it again."""
    return rows.detach().to("cpu", TORCH_DTYPES[dtype], copy=True).contiguous()
