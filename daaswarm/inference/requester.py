"""One answer from beginning to end: find hosts, load the trunk, generate, report."""

from __future__ import annotations

import logging
import random
import statistics
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import outcome
import torch
import trio

from daaswarm.core.router import ReplicaRouter
from daaswarm.errors import NoPeerCouldServe
from daaswarm.inference.generation import Generated, Prompt, encode_prompt, generate
from daaswarm.inference.plan import HostPlan
from daaswarm.inference.swarm_experts import LocalCompute, SwarmExperts
from daaswarm.models.manifest import Progress
from daaswarm.models.sources import LocalModel
from daaswarm.models.trunk import load_tokenizer, load_trunk
from daaswarm.net.network import Network
from daaswarm.types import DTYPE_BYTES, Dtype, ModelRoot, PeerId

TRUNKS = 2  # kept loaded by a node: the model in use and the one before
TEXT_BACKLOG = 1024  # pieces of text that a slow reader may be behind before the model waits for it

FindHosts = Callable[[LocalModel, Dtype], Awaitable[HostPlan]]
Emit = Callable[[dict[str, Any]], Awaitable[None]]

logger = logging.getLogger(__name__)


@dataclass
class Trunk:
    """A model without its experts, and what it needs to read and write text."""

    model: Any
    tokenizer: Any
    parameters: int


class SharedRouter(ReplicaRouter):
    """One router for the threads of all answers: what one learns about a host helps the others."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._lock = threading.Lock()

    def choose(self, *args: Any, **kwargs: Any) -> dict[PeerId, list[int]]:
        with self._lock:
            return super().choose(*args, **kwargs)

    def note_reply(self, *args: Any, **kwargs: Any) -> None:
        with self._lock:
            super().note_reply(*args, **kwargs)

    def note_failure(self, *args: Any, **kwargs: Any) -> None:
        with self._lock:
            super().note_failure(*args, **kwargs)

    def get_estimate_s(self, *args: Any, **kwargs: Any) -> float:
        with self._lock:
            return super().get_estimate_s(*args, **kwargs)


class Requester:
    """Answers prompts with models whose experts are elsewhere. One per node; several answers may run at once.

    Args:
        network: carries the calls.
        find_hosts: asks the swarm who serves a model in a dtype.
        call_timeout_s: the deadline of one expert call.
        local: computes a call with this node's own experts.
        threads: torch's threads; 0 leaves torch's choice.
    """

    def __init__(
        self,
        network: Network,
        find_hosts: FindHosts,
        *,
        call_timeout_s: float,
        local: LocalCompute | None = None,
        threads: int = 0,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._network = network
        self._find_hosts = find_hosts
        self._call_timeout_s = call_timeout_s
        self._local = local
        self._router = SharedRouter(random.Random())
        self._trunks: dict[tuple[ModelRoot, Dtype], Trunk] = {}
        self._loading = trio.Lock()
        self._current = threading.local()  # .experts: the SwarmExperts of the answer that this thread computes

    async def load(self, model: LocalModel, dtype: Dtype, progress: Progress) -> Trunk:
        """The model's trunk, from memory or disk."""
        async with self._loading:
            key = model.root, dtype
            if key not in self._trunks:
                trunk = await trio.to_thread.run_sync(self._load, model, dtype, progress)
                while len(self._trunks) >= TRUNKS:
                    del self._trunks[next(iter(self._trunks))]
            else:
                trunk = self._trunks.pop(key)
            self._trunks[key] = trunk  # the last used comes last
            return trunk

    def _load(self, model: LocalModel, dtype: Dtype, progress: Progress) -> Trunk:
        def experts(
            layer: int, rows: torch.Tensor, index: torch.Tensor | None, weights: torch.Tensor | None
        ) -> torch.Tensor:
            return self._current.experts(layer, rows, index, weights)

        trunk = load_trunk(model, dtype, experts, progress)
        return Trunk(trunk, load_tokenizer(model), sum(p.numel() for p in trunk.parameters()))

    def make_experts(self, model: LocalModel, plan: HostPlan) -> SwarmExperts:
        """The experts of one answer. Call from trio; the object then lives in the model's thread."""
        return SwarmExperts(
            plan,
            self._network,
            self._router,
            refresh=lambda: trio.from_thread.run(self._find_hosts, model, plan.dtype),
            call_timeout_s=self._call_timeout_s,
            model_name=model.name,
            local=self._local,
        )

    async def run(self, experts: SwarmExperts, work: Callable[[], Any]) -> Any:
        """Run ``work``, which uses a trunk, in a thread where the trunk's experts are ``experts``."""

        def in_thread() -> Any:
            self._current.experts = experts
            try:
                return work()
            finally:
                del self._current.experts

        # Cancelling doesn't abandon the thread: it ends at its next layer, so that nothing computes on unseen.
        async with trio.open_nursery() as nursery:
            await nursery.start(_stop_when_cancelled, experts)
            done = await trio.to_thread.run_sync(outcome.capture, in_thread, abandon_on_cancel=False)
            experts.finished = True
            nursery.cancel_scope.cancel()
        return done.unwrap()

    async def answer(
        self, model: LocalModel, trunk: Trunk, plan: HostPlan, prompt: Prompt, emit: Emit
    ) -> dict[str, Any]:
        """Generate; pieces of text go to ``emit`` as they come.

        Raises:
            NoPeerCouldServe: with the text so far.
            ConfigError: a prompt that doesn't fit.
        """
        ids = encode_prompt(prompt, trunk.tokenizer, model.name)
        plan.check_complete(model.name)
        experts = self.make_experts(model, plan)
        result = Generated()
        send, receive = trio.open_memory_channel[str](TEXT_BACKLOG)

        async def pass_on() -> None:
            async for piece in receive:
                await emit({"event": "text", "text": piece})

        def work() -> None:
            generate(
                trunk.model,
                trunk.tokenizer,
                ids,
                prompt,
                model_name=model.name,
                on_text=lambda piece: trio.from_thread.run(send.send, piece),
                is_cancelled=experts.stop.is_set,
                result=result,
            )

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pass_on)
                async with send:
                    await self.run(experts, work)
        except BaseException as error:
            lost = find_error(error, NoPeerCouldServe)
            if lost is None:
                raise
            lost.text = result.text
            raise lost from None
        return describe(model, trunk, experts, result)


async def _stop_when_cancelled(experts: SwarmExperts, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    try:
        task_status.started()
        await trio.sleep_forever()
    finally:
        if not experts.finished:
            experts.cancel()


def find_error(error: BaseException, kind: type[NoPeerCouldServe]) -> NoPeerCouldServe | None:
    """The first ``kind`` in an error or group of errors."""
    if isinstance(error, kind):
        return error
    for inner in getattr(error, "exceptions", ()):
        found = find_error(inner, kind)
        if found is not None:
            return found
    return None


def describe(model: LocalModel, trunk: Trunk, experts: SwarmExperts, result: Generated) -> dict[str, Any]:
    """The result object of the command contract."""
    remote = (
        sum(count * model.expert_bytes(layer, "f32") for layer, count in model.layers.items()) // DTYPE_BYTES["f32"]
    )
    hosts = [
        {
            "peer_id": peer,
            "calls": use.calls,
            "rows": use.rows,
            "bytes_sent": use.bytes_sent,
            "bytes_received": use.bytes_received,
            "p50_ms": round(statistics.median(use.latencies_s) * 1000, 3) if use.latencies_s else 0.0,
        }
        for peer, use in sorted(experts.hosts.items())
    ]
    return {
        "text": result.text,
        "model": model.name,
        "model_root": model.root,
        "dtype": experts.plan.dtype,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": len(result.token_ids),
        "tokens_per_s": round(len(result.token_ids) / result.seconds, 3) if result.seconds else 0.0,
        "time_to_first_token_s": round(result.time_to_first_token_s, 4),
        "calls": sum(use.calls for use in experts.hosts.values()),
        "retries": experts.retries,
        "requester_parameters": trunk.parameters,
        "remote_parameters": remote,
        "hosts": hosts,
    }
