"""The experts of a model, computed by peers: what the trunk calls at each layer, from the model's own thread.

Life of a layer: the router says which replica computes which experts; one frame goes to each chosen host with all
its experts of the layer; each returns one summed row per row sent; the rows are added. A host that fails is left
out, and its share alone is asked of another replica: the answer stays the same, since experts are stateless functions.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from daaswarm.core.router import ReplicaRouter
from daaswarm.errors import (
    Busy,
    ConnectionLost,
    DaaswarmError,
    DeadlineExceeded,
    ExpertError,
    RemoteProtocolError,
    Unreachable,
)
from daaswarm.inference.plan import HostPlan
from daaswarm.messages import ExpertCall, ExpertReply
from daaswarm.net.connection import PendingCall
from daaswarm.net.network import Network
from daaswarm.types import PeerId

ROWS_PER_CALL = 512  # a longer prefill travels as several calls, so that hosts start before all is sent
BUSY_RETRIES = 20  # times that one share waits for a busy host before the host counts as failing
REPLICA_PATIENCE_S = 2.0  # a silent host is given up after this (or 20 times its usual latency) if a replica exists
LATENCIES = 100_000  # kept per host for the median

RETRYABLE = (ConnectionLost, Unreachable, DeadlineExceeded, Busy, ExpertError, RemoteProtocolError)
TORCH_DTYPES: dict[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


LocalCompute = Callable[[ExpertCall, memoryview], tuple[ExpertReply, Sequence[Any]]]
"""Computes a call here: this node may be one of its own hosts."""


class Stopped(Exception):
    """The answer was cancelled; unwinds the model's thread."""


@dataclass
class HostUse:
    """What one host did for one answer."""

    calls: int = 0
    rows: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    latencies_s: list[float] = field(default_factory=list)


@dataclass
class Share:
    """A part of one layer's work that one host can do in one call.

    ``pair_rows`` number rows within ``rows``; for slices of a dense FFN there are no pairs.
    """

    experts: list[int]
    rows: torch.Tensor  # (n, hidden)
    into: torch.Tensor | None  # (n,) the rows of the layer they are; None: all, in order
    pair_rows: torch.Tensor | None = None  # (pairs,)
    pair_experts: torch.Tensor | None = None
    pair_weights: torch.Tensor | None = None
    failed: set[PeerId] = field(default_factory=set)
    waits: int = 0
    refreshed: bool = False  # the swarm was asked again for it, once
    busy: set[PeerId] = field(default_factory=set)  # refused it just now

    def restrict(self, experts: list[int]) -> Share:
        """The part of this share that only these experts do."""
        if self.pair_experts is None:
            part = Share(experts, self.rows, self.into, failed=set(self.failed))
            part.waits, part.refreshed, part.busy = self.waits, self.refreshed, set(self.busy)
            return part
        assert self.pair_rows is not None and self.pair_weights is not None
        mine = torch.isin(self.pair_experts, torch.tensor(experts))
        part = make_pair_share(
            experts,
            self.rows,
            self.into,
            self.pair_rows[mine],
            self.pair_experts[mine],
            self.pair_weights[mine],
            set(self.failed),
        )
        part.waits, part.refreshed, part.busy = self.waits, self.refreshed, set(self.busy)
        return part

    def get_demand(self) -> dict[int, int]:
        """Rows of work per expert."""
        if self.pair_experts is None:
            return dict.fromkeys(self.experts, len(self.rows))
        numbers, counts = self.pair_experts.unique(return_counts=True)
        return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def make_pair_share(
    experts: list[int],
    rows: torch.Tensor,
    into: torch.Tensor | None,
    pair_rows: torch.Tensor,
    pair_experts: torch.Tensor,
    pair_weights: torch.Tensor,
    failed: set[PeerId],
) -> Share:
    """A share that carries only the rows its pairs need."""
    needed, local = pair_rows.unique(return_inverse=True)
    if len(needed) < len(rows):
        rows = rows[needed]
        into = needed if into is None else into[needed]
        pair_rows = local
    return Share(experts, rows, into, pair_rows, pair_experts, pair_weights, failed)


class SwarmExperts:
    """``ExpertsFn`` of one answer. Lives in the thread that runs the model.

    Args:
        plan: the hosts found.
        network: carries the calls.
        router: replica choice; shared by all answers of a node.
        refresh: asks the swarm again (blocking; called from the model's thread) when replicas ran out.
        call_timeout_s: the deadline of one call.
        model_name: for messages.
        local: computes the calls that the router gives to this node itself.
    """

    def __init__(
        self,
        plan: HostPlan,
        network: Network,
        router: ReplicaRouter,
        *,
        refresh: Callable[[], HostPlan],
        call_timeout_s: float,
        model_name: str,
        local: LocalCompute | None = None,
    ) -> None:
        self.plan = plan
        self.hosts: dict[PeerId, HostUse] = {}
        self.retries = 0
        self.stop = threading.Event()
        self.finished = False  # set by whoever runs the model, when it has ended by itself
        self._network = network
        self._router = router
        self._refresh = refresh
        self._call_timeout_s = call_timeout_s
        self._model_name = model_name
        self._local = local
        self._dtype = TORCH_DTYPES[plan.dtype]
        self._dead: set[PeerId] = set()
        self._in_flight: list[PendingCall | Computed] = []
        self._slices = {layer: list(range(count)) for layer, count in plan.layers.items()}

    def __call__(
        self, layer: int, rows: torch.Tensor, index: torch.Tensor | None, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """The layer's experts' weighted sum.

        Args:
            rows: (n, hidden) hidden states.
            index, weights: (n, k) chosen experts and their weights; ``None`` for the slices of a dense FFN.

        Returns:
            (n, hidden) in the dtype of ``rows``.

        Raises:
            NoPeerCouldServe: an expert that is needed has no live host any more.
            Stopped: the answer was cancelled.
        """
        wire_rows = rows.detach().to("cpu", self._dtype).contiguous()
        if index is None or weights is None:
            if len(rows) <= ROWS_PER_CALL:
                whole = [Share(self._slices[layer], wire_rows, None)]
            else:
                starts = range(0, len(rows), ROWS_PER_CALL)
                whole = [
                    Share(
                        self._slices[layer],
                        wire_rows[s : s + ROWS_PER_CALL],
                        torch.arange(s, min(s + ROWS_PER_CALL, len(rows))),
                    )
                    for s in starts
                ]
        else:
            whole = self._make_pair_shares(wire_rows, index.detach().cpu(), weights.detach().float().cpu())
        parts = self._compute(layer, whole)
        if len(parts) == 1 and parts[0][0] is None:
            return parts[0][1].to(rows.device, rows.dtype)
        total = torch.zeros(rows.shape, dtype=torch.float32)
        for into, part in parts:
            if into is None:
                total += part
            else:
                total.index_add_(0, into, part)
        return total.to(rows.device, rows.dtype)

    def cancel(self) -> None:
        """End the answer at once, from any thread: hosts are told, and the model's thread unwinds with ``Stopped``."""
        self.stop.set()
        for pending in list(self._in_flight):
            pending.cancel()

    def _make_pair_shares(self, rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> list[Share]:
        shares = []
        k = index.shape[1]
        for start in range(0, len(rows), ROWS_PER_CALL):
            chunk = slice(start, start + ROWS_PER_CALL)
            count = len(rows[chunk])
            shares.append(
                Share(
                    experts=index[chunk].unique().tolist(),
                    rows=rows[chunk],
                    into=None if count == len(rows) else torch.arange(start, start + count),
                    pair_rows=torch.arange(count).repeat_interleave(k),
                    pair_experts=index[chunk].reshape(-1),
                    pair_weights=weights[chunk].reshape(-1),
                )
            )
        return shares

    def _compute(self, layer: int, waiting: list[Share]) -> list[tuple[torch.Tensor | None, torch.Tensor]]:
        """Route, send, wait, retry, until every share is done; returns (rows they are, sums) pairs."""
        done: list[tuple[torch.Tensor | None, torch.Tensor]] = []
        while waiting:
            sent: list[tuple[PeerId, Share, PendingCall | Computed | DaaswarmError, int, float]] = []
            for share in waiting:
                for peer, part in self._route(layer, share):
                    sent.append(self._send(layer, peer, part))
            waiting = []
            self._in_flight = [item[2] for item in sent if not isinstance(item[2], DaaswarmError)]
            if self.stop.is_set():  # set between sending and listing the calls
                self.cancel()
            for peer, share, pending, sent_bytes, started in sent:
                if isinstance(pending, DaaswarmError):
                    self._note_failure(layer, peer, share, pending)
                    waiting.append(share)
                    continue
                try:
                    reply, body = self._wait(pending)
                    sums = self._read(share, reply, body)
                except DaaswarmError as error:  # whatever a host answers: another may do better
                    self._note_failure(layer, peer, share, error)
                    waiting.append(share)
                    continue
                elapsed = time.monotonic() - started
                work = len(share.rows) * len(share.experts) if share.pair_rows is None else len(share.pair_rows)
                self._router.note_reply(
                    peer,
                    work,
                    elapsed,
                    reply.service_us / 1e6,
                    reply.queue_depth,
                    time.monotonic(),
                    experts=len(share.experts),
                )
                use = self.hosts.setdefault(peer, HostUse())
                use.calls += 1
                use.rows += len(share.rows)
                use.bytes_sent += sent_bytes
                use.bytes_received += len(body)
                if len(use.latencies_s) < LATENCIES:
                    use.latencies_s.append(elapsed)
                done.append((share.into, sums))
        return done

    def _route(self, layer: int, share: Share) -> list[tuple[PeerId, Share]]:
        """Split a share over the replicas that shall compute it."""
        candidates = self.plan.by_layer[layer]
        left_out = share.failed | self._dead
        if self._is_nobody_left(layer, share, left_out):
            self._find_more(layer, share)
            candidates = self.plan.by_layer[layer]
            left_out = share.failed | self._dead
        if share.busy and not self._is_nobody_left(layer, share, left_out | share.busy):
            left_out |= share.busy
        chosen = self._router.choose(layer, share.get_demand(), candidates, time.monotonic(), left_out)
        if len(chosen) == 1:
            return [(peer, share) for peer in chosen]
        return [(peer, share.restrict(experts)) for peer, experts in sorted(chosen.items())]

    def _is_nobody_left(self, layer: int, share: Share, left_out: set[PeerId]) -> bool:
        """Is there an expert of the share that only peers in ``left_out`` hold?"""
        candidates = self.plan.by_layer[layer]
        return any(left_out.issuperset(candidates.get(e, ())) for e in share.experts)

    def _find_more(self, layer: int, share: Share) -> None:
        """Ask the swarm again for hosts; the dead stay out unless they answered.

        Raises:
            NoPeerCouldServe: still none.
        """
        if not share.refreshed:
            share.refreshed = True
            plan = self._refresh()
            if plan.dtype == self.plan.dtype:
                self.plan = plan
                self._dead.clear()
                share.failed.clear()
        left_out = share.failed | self._dead
        if self._is_nobody_left(layer, share, left_out):
            missing = self.plan.get_missing(frozenset(left_out))
            raise self.plan.describe_missing(missing, self._model_name)

    def _send(
        self, layer: int, peer: PeerId, share: Share
    ) -> tuple[PeerId, Share, PendingCall | Computed | DaaswarmError, int, float]:
        if self.stop.is_set():
            raise Stopped
        call = ExpertCall(
            model_root=self.plan.root,
            layer=layer,
            experts=share.experts,
            dtype=self.plan.dtype,
            rows=share.rows.shape[0],
            hidden=share.rows.shape[1],
            pairs=0 if share.pair_rows is None else len(share.pair_rows),
        )
        body: list[Any] = [as_bytes(share.rows)]
        if share.pair_rows is not None and share.pair_experts is not None and share.pair_weights is not None:
            body += [
                as_bytes(share.pair_rows.to(torch.int32)),
                as_bytes(share.pair_experts.to(torch.int32)),
                as_bytes(share.pair_weights),
            ]
        size = sum(len(part) for part in body)
        deadline_s = self._call_timeout_s
        if any(
            other != peer and other not in self._dead and other not in share.failed
            for e in share.experts[:1]
            for other in self.plan.by_layer[layer][e]
        ):
            usual_s = self._router.get_estimate_s(peer, len(share.rows), len(share.experts), time.monotonic())
            deadline_s = min(deadline_s, max(REPLICA_PATIENCE_S, 20 * usual_s))
        started = time.monotonic()
        try:
            if peer == self._network.peer_id and self._local is not None:
                reply, parts = self._local(call, memoryview(bytearray().join(body)))
                pending: PendingCall | Computed = Computed(reply, memoryview(bytearray().join(parts)))
            else:
                pending = self._network.submit(self.plan.contacts[peer], call, body, deadline_s=deadline_s)
        except RETRYABLE as error:
            return peer, share, error, size, started
        return peer, share, pending, size, started

    def _wait(self, pending: PendingCall | Computed) -> tuple[ExpertReply, memoryview]:
        try:
            reply, body = pending.wait()
        except DaaswarmError:
            if self.stop.is_set():
                raise Stopped from None
            raise
        if not isinstance(reply, ExpertReply):
            raise RemoteProtocolError(f"an expert call was answered by {type(reply).__name__}")
        return reply, body

    def _read(self, share: Share, reply: ExpertReply, body: memoryview) -> torch.Tensor:
        rows, hidden = share.rows.shape
        if (reply.rows, reply.hidden) != (rows, hidden) or len(body) != rows * hidden * 4:
            raise RemoteProtocolError(
                f"an expert reply has {reply.rows} x {reply.hidden} rows in {len(body)} bytes; "
                f"{rows} x {hidden} f32 were due"
            )
        return torch.frombuffer(body, dtype=torch.float32).view(rows, hidden)

    def _note_failure(self, layer: int, peer: PeerId, share: Share, error: DaaswarmError) -> None:
        self.retries += 1
        if isinstance(error, Busy) and share.waits < BUSY_RETRIES:
            share.waits += 1
            share.busy.add(peer)
            if self._is_nobody_left(layer, share, share.failed | self._dead | share.busy):
                share.busy.clear()
                self.stop.wait(min(error.retry_after_s, self._call_timeout_s))
            return
        share.failed.add(peer)
        self._router.note_failure(peer, time.monotonic())
        if isinstance(error, ConnectionLost | Unreachable):
            self._dead.add(peer)


@dataclass
class Computed:
    """A call that was answered here: a ``PendingCall`` with nothing to wait for."""

    reply: ExpertReply
    body: memoryview

    def wait(self) -> tuple[ExpertReply, memoryview]:
        return self.reply, self.body

    def cancel(self) -> None:
        """It is over already."""


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, without a copy when it is contiguous."""
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has none
        tensor = tensor.view(torch.int16)
    return tensor.numpy().data.cast("B")
