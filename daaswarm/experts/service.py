"""Answers expert calls with the experts that this node holds."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
import trio

from daaswarm.core.admission import Admission, Refused, Ticket
from daaswarm.core.courtesy import Pause
from daaswarm.errors import Busy, ConfigError, ExpertError, RemoteProtocolError, TooLarge
from daaswarm.experts.batches import Waiting, get_group, join, settle
from daaswarm.experts.gradients import Differentiable, compute_gradients, get_cost, get_gradient_bytes
from daaswarm.experts.opening import Openable, check_opening, compute_opened
from daaswarm.limits import CALL_S
from daaswarm.messages import ExpertCall, ExpertReply
from daaswarm.models import codecs
from daaswarm.types import CODECS, DTYPE_BYTES, Dtype, ModelRoot, PeerId, format_range

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined]

# A call up to this size is computed where it arrives: a thread hop each way costs more than the compute
# (measured: docs/explanation/performance.md), and the loop is held for a few milliseconds at most.
INLINE_BYTES = 32 << 20  # weights touched
INLINE_ROWS = 4  # rows; the work per weight read
INLINE_PAIRS = 256  # 64 experts a row
CALL_ROWS = 4_096  # of one call, so that bodies and sums stay small; a requester's call has 512
BLOCK_ROWS = 512  # computed between two looks whether anybody still waits; as many as a requester sends
BLOCK_PAIRS = 4_096  # likewise, where each row names experts: 512 rows x top-8
PAIRS_BYTES = 1 << 30  # pairs x hidden x f32: the rows that one call may have gathered; 512 rows x top-32 x 16,384

TORCH_DTYPES: dict[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Layer(Protocol):
    """What a host holds of one layer (``models.experts.LayerExperts``; benchmarks bring their own)."""

    ids: list[int]
    nbytes: int

    def compute_pairs(
        self, rows: torch.Tensor, row_index: torch.Tensor, expert_index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor: ...

    def compute_slices(self, rows: torch.Tensor, slices: list[int]) -> torch.Tensor: ...


@dataclass
class HostedModel:
    """The part of one model that this node serves."""

    root: ModelRoot
    name: str
    kind: str
    hidden: int
    dtype: Dtype
    layers: dict[int, Layer]
    device: str = "cpu"
    calls: int = 0
    rows: int = 0
    ids: dict[int, frozenset[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ids = {layer: frozenset(experts.ids) for layer, experts in self.layers.items()}

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers.values())


class ExpertService:
    """All models that this node serves experts of.

    Args:
        threads: torch's threads for computing; 0 for one per core.

    Attributes:
        pause: while it is set, peers' calls get ``Busy``. Those admitted before are finished, and this node's own
            (:meth:`compute`) go on.
    """

    def __init__(self, *, threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.models: dict[tuple[ModelRoot, Dtype], HostedModel] = {}
        self.pause: Pause | None = None
        self._admission = Admission()
        self._waiting: dict[Ticket, Waiting] = {}
        self._computing = False
        # Of its own: trio's default threads may all be taken by something that waits for this very answer.
        self._threads = trio.CapacityLimiter(1)

    @property
    def queue_depth(self) -> int:
        """Calls that wait."""
        return self._admission.queue_depth

    def add(self, model: HostedModel) -> None:
        """Serve a model's experts from now on, beside those already served."""
        self.check_free(model.root, model.name, model.dtype, model.layers)
        known = self.models.setdefault((model.root, model.dtype), model)
        if known is not model:
            known.layers |= model.layers
            known.ids |= model.ids
        _freeze_modules()

    def put(self, model: HostedModel) -> None:
        """Serve a model's layers from now on, each in the place of what is served of it. Calls in flight keep theirs.

        Raises:
            ConfigError: this node serves the model in another dtype.
        """
        self.check_free(model.root, model.name, model.dtype, ())
        known = self.models.setdefault((model.root, model.dtype), model)
        if known is not model:
            known.layers |= model.layers
            known.ids |= model.ids

    def check_free(self, root: ModelRoot, name: str, dtype: Dtype, layers: Iterable[int]) -> None:
        """Raises:
        ConfigError: this node serves the model in another dtype, or some of these layers, already.
        """
        for known in self.models.values():
            if known.root == root and known.dtype != dtype:
                raise ConfigError(
                    f"this node serves {name} in {known.dtype} already; one answer never mixes dtypes",
                    hint=f"use --dtype {known.dtype}, or another --data-dir",
                )
            taken = sorted(known.layers.keys() & set(layers)) if known.root == root else []
            if taken:
                raise ConfigError(
                    f"this node serves {name}, layers {format_range(taken)}, already",
                    hint="stop the other host-expert (or expert remove) first, or choose other --layers",
                )

    def remove(self, root: ModelRoot, dtype: Dtype, layers: Iterable[int]) -> None:
        """Stop serving layers of a model. Calls in flight keep their weights alive until they are done."""
        known = self.models.get((root, dtype))
        if known is None:
            return
        for layer in list(layers):
            known.layers.pop(layer, None)
            known.ids.pop(layer, None)
        if not known.layers:
            del self.models[root, dtype]

    def serve_inline(
        self, peer: PeerId, call: ExpertCall, body: memoryview, deadline_s: float = CALL_S
    ) -> tuple[ExpertReply, Sequence[Buffer]] | None:
        """Compute a small call at once; ``None`` for one that belongs in a thread, if there is room for it.

        Raises:
            Busy: the host is paused, or a call that belongs in a thread would be refused.
            ExpertError: not held here.
            RemoteProtocolError: the call contradicts itself or its body.
        """
        self._check_pause()
        hosted, layer = self._check(call, len(body))
        touched = layer.nbytes * len(call.experts) // max(1, len(layer.ids))
        pairs = min(INLINE_PAIRS, INLINE_ROWS * len(call.experts))  # or one expert could be named 256 times
        if call.grad or call.rows > INLINE_ROWS or call.pairs > pairs or touched > INLINE_BYTES:
            refused = self._admission.get_refusal(peer, deadline_s, len(body))
            if refused is not None:  # here it costs no task
                raise _get_busy(refused)
            return None
        return self._compute(hosted, layer, call, body)

    async def serve(
        self, peer: PeerId, call: ExpertCall, body: memoryview, deadline_s: float
    ) -> tuple[ExpertReply, Sequence[Buffer]]:
        """Compute a call in the worker thread, in its turn, together with others that wait for the same experts. The
        sums then differ from those of the call alone by rounding only (1e-5 of the largest in f32). When cancelled it
        ends within a block of rows.

        Raises:
            Busy: the host is paused, or its queue is longer than half of the call's deadline.
            ExpertError, RemoteProtocolError: as :meth:`serve_inline`.
        """
        self._check_pause()
        hosted, layer = self._check(call, len(body))
        work = (call.pairs or call.rows * len(call.experts)) * get_cost(call)
        admitted = self._admission.try_admit(
            peer,
            work,
            deadline_s,
            trio.current_time(),
            group=get_group(layer, call),
            share=max(call.rows / BLOCK_ROWS, call.pairs / BLOCK_PAIRS),
            is_few=call.rows <= INLINE_ROWS,
            nbytes=len(body),
        )
        if isinstance(admitted, Refused):
            raise _get_busy(admitted)
        ticket = admitted.ticket
        waiting = self._waiting[ticket] = Waiting(hosted, layer, call, body, ticket)
        self._start_next()
        try:
            await waiting.turn.wait()
            if waiting.answer is None:
                await self._lead(waiting)
            if isinstance(waiting.answer, Exception):
                raise waiting.answer
            assert waiting.answer is not None
            return waiting.answer
        finally:
            del self._waiting[ticket]
            self._admission.finish(ticket, waiting.service_s)
            if waiting.batch:
                self._pass_on(waiting)

    def _start_next(self) -> None:
        """One batch at a time: torch itself uses all the threads it may."""
        if not self._computing and (tickets := self._admission.next_batch()):
            self._computing = True
            batch = [self._waiting[ticket] for ticket in tickets]
            batch[0].batch = batch
            batch[0].turn.set()

    async def _lead(self, leader: Waiting) -> None:
        """Compute a batch for all its callers."""
        batch = leader.batch = [each for each in leader.batch if each.ticket in self._waiting]  # others gave up
        started = trio.current_time()
        if len(batch) == 1:
            leader.answer = await trio.to_thread.run_sync(
                self._compute,
                leader.hosted,
                leader.layer,
                leader.call,
                leader.body,
                trio.from_thread.check_cancelled,
                limiter=self._threads,
            )
        else:  # a block at most; whoever leads may give up, but not the others' answers
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(
                    settle, batch, self._compute_together, self._compute_alone, limiter=self._threads
                )
        took_s = trio.current_time() - started
        work = sum(each.ticket.work_rows for each in batch)
        for each in batch:
            if not isinstance(each.answer, Exception):
                each.service_s = took_s * each.ticket.work_rows / work
            each.turn.set()

    def _pass_on(self, leader: Waiting) -> None:
        """A leader has gone: the next batch's turn, or that of who waits for its own if it gave up before computing."""
        rest = [each for each in leader.batch if each.answer is None and each.ticket in self._waiting]
        if rest:
            rest[0].batch = rest
            rest[0].turn.set()
        else:
            self._computing = False
            self._start_next()

    def _compute_alone(self, waiting: Waiting) -> tuple[ExpertReply, Sequence[Buffer]]:
        return self._compute(waiting.hosted, waiting.layer, waiting.call, waiting.body)

    def _compute_together(self, batch: Sequence[Waiting]) -> list[tuple[ExpertReply, Sequence[Buffer]]]:
        started = time.perf_counter_ns()
        first = batch[0]
        with torch.inference_mode():
            rows, pairs = join(
                [_read_rows(each.call, each.body) for each in batch],
                [_read_pairs(each.call, each.body) if each.call.pairs else None for each in batch],
            )
            if pairs is not None:
                sums = _compute_pairs(first.layer, rows, *pairs, None)
            else:
                sums = _compute_slices(first.layer, rows, first.call.experts, None)
        took_us = (time.perf_counter_ns() - started) // 1000
        parts = sums.contiguous().split([each.call.rows for each in batch])
        first.hosted.calls += len(batch)
        first.hosted.rows += len(rows)
        return [self._reply(each.call, took_us, [part]) for each, part in zip(batch, parts, strict=True)]

    def compute(self, call: ExpertCall, body: memoryview) -> tuple[ExpertReply, Sequence[Buffer]]:
        """Compute a call of this node's own, in the calling thread.

        Raises:
            ExpertError, RemoteProtocolError: as :meth:`serve_inline`.
        """
        return self._compute(*self._check(call, len(body)), call, body)

    def _check_pause(self) -> None:
        if self.pause is not None:
            raise Busy(
                f"this host is paused: {self.pause.reason}",
                hint="ask another replica",
                retry_after_s=self.pause.retry_after_s,
            )

    def _check(self, call: ExpertCall, body_bytes: int) -> tuple[HostedModel, Layer]:
        hosted = self.models.get((call.model_root, call.dtype))  # type: ignore[arg-type]
        if hosted is None:
            raise ExpertError(
                f"model {call.model_root[:12]} in {call.dtype} is not held here", hint="ask for this peer's adverts"
            )
        layer, held = hosted.layers.get(call.layer), hosted.ids.get(call.layer)
        if layer is None or held is None:  # one without the other: it is being removed, in trio's thread
            held = frozenset()
        wanted = frozenset(call.experts)
        if layer is None or not wanted <= held:
            raise ExpertError(
                f"layer {call.layer}: experts {format_range(sorted(wanted - held))} are not held here",
                hint="ask for this peer's adverts",
            )
        if len(wanted) != len(call.experts):
            raise RemoteProtocolError("expert call: it names an expert twice", reject=False)
        if call.rows > CALL_ROWS:
            raise TooLarge(f"expert call: {call.rows} rows; {CALL_ROWS} are allowed", hint="split the call")
        for codec in (call.codec, call.reply_codec):
            if codec and (codec not in CODECS or call.grad):
                known = "gradients travel without a codec" if call.grad else f"known are {', '.join(CODECS)}"
                raise ExpertError(f"codec {codec!r} is not taken here: {known}", hint="ask without a codec")
        expected = _get_row_bytes(call) + 12 * call.pairs + get_gradient_bytes(call)
        if call.hidden != hosted.hidden or body_bytes != expected or (call.pairs == 0) != (hosted.kind == "dense"):
            raise RemoteProtocolError(
                f"expert call: {call.rows} x {call.hidden} rows with {call.pairs} pairs in {body_bytes} bytes "
                f"don't fit a {hosted.kind} model of width {hosted.hidden}",
                reject=False,
            )
        if call.pairs * call.hidden * 4 > PAIRS_BYTES:
            most = PAIRS_BYTES // (call.hidden * 4)
            raise TooLarge(f"expert call: {call.pairs} pairs; {most} of this width are allowed", hint="split the call")
        if call.opened:
            check_opening(call, layer)
        if call.grad and not isinstance(layer, Differentiable):
            raise ExpertError(f"{hosted.name} is served here without gradients", hint="ask another replica")
        return hosted, layer

    def _compute(
        self,
        hosted: HostedModel,
        layer: Layer,
        call: ExpertCall,
        body: memoryview,
        check_cancelled: Callable[[], object] | None = None,
    ) -> tuple[ExpertReply, Sequence[Buffer]]:
        started = time.perf_counter_ns()
        rows = _read_rows(call, body)
        pairs = _read_pairs(call, body) if call.pairs else None
        with torch.inference_mode():
            if call.opened and isinstance(layer, Openable):
                answer = compute_opened(layer, call, rows, pairs)
            elif call.grad and isinstance(layer, Differentiable):
                answer = compute_gradients(layer, call, rows, pairs, body, check_cancelled)
            elif pairs is not None:
                answer = [_compute_pairs(layer, rows, *pairs, check_cancelled)]
            else:
                answer = [_compute_slices(layer, rows, call.experts, check_cancelled)]
        hosted.calls += 1
        hosted.rows += call.rows
        took_us = (time.perf_counter_ns() - started) // 1000
        return self._reply(call, took_us, answer)

    def _reply(
        self, call: ExpertCall, service_us: int, answer: Sequence[torch.Tensor]
    ) -> tuple[ExpertReply, Sequence[Buffer]]:
        codec, depth = call.reply_codec, self._admission.queue_depth
        if codec:
            coded = codecs.encode(answer[0], codec)
            if coded is not None:  # else sums too large for it: they go as they are
                reply = ExpertReply(
                    rows=call.rows, hidden=call.hidden, service_us=service_us, queue_depth=depth, codec=codec
                )
                return reply, [coded]
        width = answer[1].shape[1] if call.opened else 0
        reply = ExpertReply(rows=call.rows, hidden=call.hidden, service_us=service_us, queue_depth=depth, width=width)
        return reply, [_as_buffer(part) for part in answer]


@functools.cache
def _freeze_modules() -> None:
    """Leave what is loaded out of garbage collection: going through torch's modules held all peers up for 0.12 s."""
    gc.freeze()


def _get_busy(refused: Refused) -> Busy:
    return Busy(
        f"this host's queue is full: {refused.reason}",
        hint=f"try again in {refused.retry_after_s:.2f} s, or another replica",
        retry_after_s=refused.retry_after_s,
    )


def _as_buffer(part: torch.Tensor) -> Buffer:
    part = part.contiguous()
    if part.dtype == torch.bfloat16:  # numpy has none
        part = part.view(torch.int16)
    return part.numpy().data.cast("B")


def _get_row_bytes(call: ExpertCall) -> int:
    if call.codec:
        return codecs.get_bytes(call.codec, call.rows, call.hidden)
    return call.rows * call.hidden * DTYPE_BYTES[call.dtype]


def _read_rows(call: ExpertCall, body: memoryview) -> torch.Tensor:
    if call.codec:
        coded = body[: _get_row_bytes(call)]
        return codecs.decode(coded, call.codec, call.rows, call.hidden, TORCH_DTYPES[call.dtype])
    rows = torch.frombuffer(body, dtype=TORCH_DTYPES[call.dtype], count=call.rows * call.hidden)
    return rows.view(call.rows, call.hidden)


def _read_pairs(call: ExpertCall, body: memoryview) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(pairs,) rows int64, (pairs,) experts int64, (pairs,) weights f32; all within what the call announced."""
    at = _get_row_bytes(call)
    rows = torch.frombuffer(body, dtype=torch.int32, offset=at, count=call.pairs).long()
    experts = torch.frombuffer(body, dtype=torch.int32, offset=at + 4 * call.pairs, count=call.pairs).long()
    weights = torch.frombuffer(body, dtype=torch.float32, offset=at + 8 * call.pairs, count=call.pairs)
    announced = frozenset(call.experts)
    if int(rows.min()) < 0 or int(rows.max()) >= call.rows or not announced.issuperset(experts.unique().tolist()):
        raise RemoteProtocolError("expert call: a pair names a row or expert outside the call", reject=False)
    return rows, experts, weights


def _compute_slices(
    layer: Layer, rows: torch.Tensor, slices: list[int], check_cancelled: Callable[[], object] | None
) -> torch.Tensor:
    if len(rows) <= BLOCK_ROWS:
        return layer.compute_slices(rows, slices)
    sums = torch.empty(rows.shape, dtype=torch.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        if check_cancelled is not None:
            check_cancelled()
        sums[start : start + BLOCK_ROWS] = layer.compute_slices(rows[start : start + BLOCK_ROWS], slices)
    return sums


def _compute_pairs(
    layer: Layer,
    rows: torch.Tensor,
    row_index: torch.Tensor,
    expert_index: torch.Tensor,
    weights: torch.Tensor,
    check_cancelled: Callable[[], object] | None,
) -> torch.Tensor:
    if len(rows) <= BLOCK_ROWS and len(row_index) <= BLOCK_PAIRS:
        return layer.compute_pairs(rows, row_index, expert_index, weights)
    sums = torch.zeros(rows.shape, dtype=torch.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        mine = ((row_index >= start) & (row_index < start + BLOCK_ROWS)).nonzero()[:, 0]
        mine = mine[expert_index[mine].argsort(stable=True)]  # so that a block of pairs touches few experts
        for chosen in mine.split(BLOCK_PAIRS):
            if check_cancelled is not None:
                check_cancelled()
            if len(chosen):
                sums[part] += layer.compute_pairs(
                    rows[part], row_index[chosen] - start, expert_index[chosen], weights[chosen]
                )
    return sums
