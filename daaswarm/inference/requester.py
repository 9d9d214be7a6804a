"""Answers of one node: load trunks, have prompts answered by them, report who did the work."""

from __future__ import annotations

import contextlib
import logging
import random
import statistics
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import outcome
import torch
import trio

from daaswarm.core.router import ReplicaRouter
from daaswarm.core.verify import OFF, Verify
from daaswarm.errors import DaaswarmError, NoPeerCouldServe
from daaswarm.inference.alone import KeptCache, generate_alone
from daaswarm.inference.auditing import Auditor, Ledger
from daaswarm.inference.batching import Batch, can_batch
from daaswarm.inference.plan import HostPlan
from daaswarm.inference.prompt import Prompt, encode_prompt
from daaswarm.inference.recomputing import Recomputer
from daaswarm.inference.rope import separate_ropes
from daaswarm.inference.sequence import Sequence
from daaswarm.inference.swarm_experts import LocalCompute, Stopped, SwarmExperts
from daaswarm.inference.text_stream import TextStream
from daaswarm.inference.use import AuditUse
from daaswarm.models.devices import choose_device, explaining_full
from daaswarm.models.manifest import Progress
from daaswarm.models.secrets import Secrets, get_path
from daaswarm.models.sources import LocalModel
from daaswarm.models.trunk import ExpertsFn, load_tokenizer, load_trunk
from daaswarm.net.network import Network, connect_all
from daaswarm.types import CODECS, DTYPE_BYTES, Codec, Dtype, ModelRoot, PeerId

TRUNKS = 2  # kept loaded by a node: the model in use and the one before
BATCHES = TRUNKS * (1 + len(CODECS))  # of answers that share passes
ALONE = 8  # answers at once of models that can't share passes; each is a thread, more wait
ENCODING = 2  # prompts at once that become tokens
CONNECT_S = 3.0  # in which hosts found in the middle of an answer are connected; it doesn't wait for the silent ones
DEVICE_KEY = "infer.device"

FindHosts = Callable[[LocalModel, Dtype], Awaitable[HostPlan]]
Emit = Callable[[dict[str, Any]], Awaitable[None]]

logger = logging.getLogger(__name__)


class Way(NamedTuple):
    """How hosts are asked. ``codec``: of rows and sums, with those that take it; ``verify``: how they are checked."""

    codec: Codec = "none"
    verify: Verify = OFF


PLAIN = Way()


class Trunk:
    """A model without its experts, and what it needs to read and write text.

    Attributes:
        can_batch: its answers share forward passes.
        batches: where they do, by the way in which their hosts are asked: an answer never continues with keys and
            values that came of another codec, or that were checked less.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.parameters = sum(p.numel() for p in model.parameters())
        self.can_batch = can_batch(model)
        self.batches: dict[Way, Batch] = {}
        self._kept: dict[Way, KeptCache] = {}

    def get_kept(self, way: Way) -> KeptCache:
        """What answers that don't share passes leave for the next one in the same way. Call from trio."""
        while len(self._kept) >= BATCHES and way not in self._kept:
            del self._kept[next(iter(self._kept))]
        return self._kept.setdefault(way, KeptCache(self.model))

    def forget(self) -> None:
        """Keep nothing of earlier answers."""
        for kept in self._kept.values():
            kept.clear()
        for batch in self.batches.values():
            batch.forget()


class SharedRouter(ReplicaRouter):
    """One router for the threads of all answers: what one learns about a host helps the others."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._lock = threading.RLock()  # methods use one another

    def choose(self, *args: Any, **kwargs: Any) -> dict[PeerId, list[int]]:
        with self._lock:
            return super().choose(*args, **kwargs)

    def note_reply(self, *args: Any, **kwargs: Any) -> None:
        with self._lock:
            super().note_reply(*args, **kwargs)

    def note_failure(self, *args: Any, **kwargs: Any) -> None:
        with self._lock:
            super().note_failure(*args, **kwargs)

    def note_late(self, *args: Any, **kwargs: Any) -> bool:
        with self._lock:
            return super().note_late(*args, **kwargs)

    def note_call(self) -> None:
        with self._lock:
            super().note_call()

    def note_busy(self) -> None:
        with self._lock:
            super().note_busy()

    def hedge(self, *args: Any, **kwargs: Any) -> dict[PeerId, list[int]]:
        with self._lock:
            return super().hedge(*args, **kwargs)

    def get_hedge_delay_s(self, *args: Any, **kwargs: Any) -> float | None:
        with self._lock:
            return super().get_hedge_delay_s(*args, **kwargs)

    def get_estimate_s(self, *args: Any, **kwargs: Any) -> float:
        with self._lock:
            return super().get_estimate_s(*args, **kwargs)


class Requester:
    """Answers prompts with models whose experts are elsewhere. One per node; several answers may run at once.

    Args:
        network: carries the calls.
        find_hosts: asks the swarm who serves a model in a dtype.
        nursery: runs what answers share; cancelling it ends all of them.
        call_timeout_s: the deadline of one expert call.
        local: computes a call with this node's own experts.
        note_gone: is told of a host that didn't answer, so that no other answer waits for it.
        threads: torch's threads; 0 leaves torch's choice.
        device: where trunks compute, as the setting ``infer.device`` says it.
        ledger: what is known of hosts; without one nothing is checked.
        cache: where secrets for audits may be.

    Raises:
        ConfigError: there is no such device.
    """

    def __init__(
        self,
        network: Network,
        find_hosts: FindHosts,
        nursery: trio.Nursery,
        *,
        call_timeout_s: float,
        local: LocalCompute | None = None,
        note_gone: Callable[[PeerId], None] | None = None,
        threads: int = 0,
        device: str = "cpu",
        ledger: Ledger | None = None,
        cache: Path | None = None,
    ) -> None:
        self._ledger = ledger
        self._cache = cache
        self._device = choose_device(device, key=DEVICE_KEY)
        if threads:
            torch.set_num_threads(threads)
        self._network = network
        self._find_hosts = find_hosts
        self._nursery = nursery
        self._call_timeout_s = call_timeout_s
        self._local = local
        self._note_gone = note_gone
        self._token = trio.lowlevel.current_trio_token()
        self._router = SharedRouter(random.Random())
        self._trunks: dict[tuple[ModelRoot, Dtype], Trunk] = {}
        self._loading = trio.Lock()
        self._model_threads = trio.CapacityLimiter(BATCHES + ALONE)  # not trio's own, which files and names share
        self._alone = trio.CapacityLimiter(ALONE)
        self._encoding = trio.CapacityLimiter(ENCODING)
        # What the model has of its own in this thread: .compute (ExpertsFn) and .ropes.
        self._current = threading.local()

    async def load(self, model: LocalModel, dtype: Dtype, progress: Progress) -> Trunk:
        """The model's trunk, from memory or disk."""
        key = model.root, dtype
        if key not in self._trunks:  # else not behind another model that is being loaded
            async with self._loading:
                if key not in self._trunks:  # while it waited
                    trunk = await trio.to_thread.run_sync(self._load, model, dtype, progress)
                    while len(self._trunks) >= TRUNKS:
                        del self._trunks[next(iter(self._trunks))]
                    self._trunks[key] = trunk
        trunk = self._trunks[key] = self._trunks.pop(key)  # the last used comes last
        return trunk

    def _load(self, model: LocalModel, dtype: Dtype, progress: Progress) -> Trunk:
        def experts(
            layer: int, rows: torch.Tensor, index: torch.Tensor | None, weights: torch.Tensor | None
        ) -> torch.Tensor:
            return self._current.compute(layer, rows, index, weights)

        trunk = load_trunk(model, dtype, experts, progress)
        if self._device.type != "cpu":
            with explaining_full(self._device, DEVICE_KEY):
                trunk.to(self._device)  # type: ignore[arg-type]
        separate_ropes(trunk, lambda: self._current.ropes)
        return Trunk(trunk, load_tokenizer(model))

    def make_experts(
        self, model: LocalModel, plan: HostPlan, codec: Codec = "none", verify: Verify = OFF
    ) -> SwarmExperts:
        """The experts of one answer, or of one batch. Call from trio; the object then lives in the model's thread."""
        return SwarmExperts(
            plan,
            self._network,
            self._router,
            refresh=lambda: trio.from_thread.run(self._find_again, model, plan.dtype),
            call_timeout_s=self._call_timeout_s,
            model_name=model.name,
            local=self._local,
            note_gone=self._note_gone_from_thread,
            codec=codec,
            auditor=self._make_auditor(model, plan.dtype, verify),
        )

    def _make_auditor(self, model: LocalModel, dtype: Dtype, verify: Verify) -> Auditor | None:
        if verify.kind == "off" or self._ledger is None:
            return None
        secrets = None
        if self._cache is not None and (path := get_path(self._cache, model.root, dtype)).exists():
            secrets = Secrets(path, model.root, dtype)
        return Auditor(verify, self._ledger, model.root, secrets, Recomputer(model, dtype))

    def _note_gone_from_thread(self, peer: PeerId) -> None:
        if self._note_gone is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._note_gone, peer)

    async def _find_again(self, model: LocalModel, dtype: Dtype) -> HostPlan:
        """Hosts as of now, connected where they can be: the model's thread only calls."""
        plan = await self._find_hosts(model, dtype)
        with trio.move_on_after(CONNECT_S):  # the dials go on
            await connect_all(self._network, plan.contacts.values())
        return plan

    async def answer(
        self, model: LocalModel, trunk: Trunk, plan: HostPlan, prompt: Prompt, emit: Emit, way: Way = PLAIN
    ) -> dict[str, Any]:
        """Generate; pieces of text go to ``emit`` as they come.

        Raises:
            NoPeerCouldServe: with the text so far.
            ConfigError: a prompt that doesn't fit.
            Busy: too many answers wait already.
            DaaswarmError: the node is leaving.
        """
        plan.check_complete(model.name)
        ids = await trio.to_thread.run_sync(  # a long text takes a while, and the node has others to serve
            encode_prompt, prompt, trunk.tokenizer, model.name, abandon_on_cancel=True, limiter=self._encoding
        )
        # Nothing waits for a slow reader: the text is bounded by max_tokens, and others share the passes.
        send, receive = trio.open_memory_channel[str](float("inf"))
        in_trio = trio.lowlevel.current_trio_token().run_sync_soon

        def deliver(piece: str) -> None:
            with contextlib.suppress(trio.ClosedResourceError, trio.BrokenResourceError):  # the asker has left
                send.send_nowait(piece)

        stream = TextStream(trunk.tokenizer, prompt.stop, lambda piece: in_trio(deliver, piece))
        sequence = Sequence(trunk.model, model.name, ids, prompt.sampling, stream)

        async def pass_on() -> None:
            async for piece in receive:
                await emit({"event": "text", "text": piece})

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pass_on)
            await self.complete(model, trunk, plan, sequence, way)
            send.close()  # in trio's queue behind the last piece, so pass_on sees all of it first
        error = sequence.error
        if isinstance(error, NoPeerCouldServe):
            error.text = sequence.text
        if isinstance(error, Stopped) or not isinstance(error, Exception | None):
            raise DaaswarmError("the node is leaving: the answer was not finished") from error
        if error is not None:
            raise error
        return describe(model, trunk, plan, sequence, way)

    async def complete(
        self, model: LocalModel, trunk: Trunk, plan: HostPlan, sequence: Sequence, way: Way = PLAIN
    ) -> None:
        """Run a sequence to its end; an error is left in it. Cancelling ends its calls.

        Raises:
            Busy: too many answers wait already.
        """
        if trunk.can_batch:
            await self._complete_together(model, trunk, plan, sequence, way)
        else:
            await self._complete_alone(model, trunk, plan, sequence, way)

    async def _complete_together(
        self, model: LocalModel, trunk: Trunk, plan: HostPlan, sequence: Sequence, way: Way
    ) -> None:
        if way not in trunk.batches:
            while len(trunk.batches) >= BATCHES:
                del trunk.batches[next(iter(trunk.batches))]
            trunk.batches[way] = Batch(trunk.model, self.make_experts(model, plan, *way))
        batch = trunk.batches[way] = trunk.batches.pop(way)  # the last used comes last
        ended = trio.Event()
        in_trio = trio.lowlevel.current_trio_token().run_sync_soon
        if batch.submit(sequence, plan, lambda: in_trio(ended.set)):
            self._nursery.start_soon(self._work, batch)
        try:
            await ended.wait()
        except trio.Cancelled:
            batch.cancel(sequence)
            raise

    async def _work(self, batch: Batch) -> None:
        """Run a batch until it has nothing left to do."""
        try:
            await self.run_model(batch.compute, batch.work, batch.cancel_all)
        except Exception:
            # Its askers were told; the node, which also hosts, goes on.
            logger.exception("answers of one model ended together")
        except BaseException:  # it may not have come to run
            batch.end_all(Stopped())
            raise

    async def _complete_alone(
        self, model: LocalModel, trunk: Trunk, plan: HostPlan, sequence: Sequence, way: Way
    ) -> None:
        async with self._alone:
            experts, kept = self.make_experts(model, plan, *way), trunk.get_kept(way)

            def stop() -> None:
                sequence.is_cancelled = True
                experts.cancel()

            def work() -> None:
                try:
                    generate_alone(sequence, kept)
                except Exception as error:  # noqa: BLE001 - whoever asked gets it
                    sequence.end("error", error)
                finally:
                    sequence.note_use(*experts.take_use(), share=1.0)
                    sequence.audits.add(experts.take_audits())

            await self.run_model(experts, work, stop)

    async def run_model(self, compute: ExpertsFn, work: Callable[[], Any], stop: Callable[[], None]) -> Any:
        """Run ``work``, which uses a trunk, in a thread where the trunk's experts are ``compute``; returns its result.

        Args:
            stop: called when this is cancelled; ``work`` must then end soon.
        """

        def in_thread() -> Any:
            self._current.compute, self._current.ropes = compute, {}
            try:
                return work()
            finally:
                del self._current.compute, self._current.ropes

        async def stop_when_cancelled(*, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                if not is_done:
                    stop()

        # Cancelling doesn't abandon the thread: it ends at its next layer, so that nothing computes on unseen.
        is_done = False
        async with trio.open_nursery() as nursery:
            await nursery.start(stop_when_cancelled)
            done = await trio.to_thread.run_sync(
                outcome.capture, in_thread, abandon_on_cancel=False, limiter=self._model_threads
            )
            is_done = True
            nursery.cancel_scope.cancel()
        return done.unwrap()


def describe(model: LocalModel, trunk: Trunk, plan: HostPlan, sequence: Sequence, way: Way = PLAIN) -> dict[str, Any]:
    """The result object of the command contract."""
    tokens = len(sequence.token_ids)
    first_s = sequence.first_token_at - sequence.started_at if sequence.first_token_at else sequence.seconds
    remote = (
        sum(count * model.expert_bytes(layer, "f32") for layer, count in model.layers.items()) // DTYPE_BYTES["f32"]
    )
    hosts = [
        {
            "peer_id": peer,
            "calls": use.calls,
            "rows": round(use.rows),
            "bytes_sent": round(use.bytes_sent),
            "bytes_received": round(use.bytes_received),
            "coded_calls": use.coded_calls,
            "p50_ms": round(statistics.median(use.latencies_s) * 1000, 3) if use.latencies_s else 0.0,
        }
        for peer, use in sorted(sequence.hosts.items())
    ]
    return {
        "text": sequence.text,
        "model": model.name,
        "model_root": model.root,
        "dtype": plan.dtype,
        "codec": way.codec,
        "verify": describe_audits(way.verify, sequence.audits),
        "finish_reason": sequence.finish_reason,
        "prompt_tokens": sequence.prompt_tokens,
        "reused_tokens": sequence.reused_tokens,
        "guessed_tokens": sequence.guessed_tokens,
        "right_tokens": sequence.right_tokens,
        "completion_tokens": tokens,
        "tokens_per_s": round(tokens / sequence.seconds, 3) if sequence.seconds else 0.0,
        "time_to_first_token_s": round(first_s, 4),
        "calls": sum(use.calls for use in sequence.hosts.values()),
        "retries": sequence.retries,
        "requester_parameters": trunk.parameters,
        "remote_parameters": remote,
        "hosts": hosts,
    }


def describe_audits(verify: Verify, audits: AuditUse) -> dict[str, Any]:
    """The part of the result that says what was checked."""
    return {
        "mode": str(verify),
        "sketched": audits.sketched,
        "compared": audits.compared,
        "recomputed": audits.recomputed,
        "unchecked": audits.unchecked,
        "wrong": [{"peer_id": peer, "calls": count} for peer, count in sorted(audits.wrong.items())],
    }
