"""What a node asks for: hosts are found or started, connected, and one answer comes of it."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import trio

from daaswarm.config import Config, get_cache_dir
from daaswarm.core.adverts import Known, choose_dtype, is_covered, leave_out_paused, rank_dtypes
from daaswarm.core.verify import parse_verify
from daaswarm.errors import ConfigError, NoPeerCouldServe
from daaswarm.messages import ExpertCall
from daaswarm.models.sources import LocalModel
from daaswarm.net.dataplane import TcpNetwork
from daaswarm.net.discovery import Discovery
from daaswarm.net.network import connect_all
from daaswarm.node.advising import check_feasible, get_warning
from daaswarm.node.hosting import Hosting
from daaswarm.node.reporting import Emit, Event, get_model, make_progress
from daaswarm.node.trusting import Trusting
from daaswarm.types import Dtype, PeerId

if TYPE_CHECKING:
    from daaswarm.inference.plan import HostPlan
    from daaswarm.inference.prompt import Prompt
    from daaswarm.inference.requester import Requester

logger = logging.getLogger(__name__)


class Answering:
    """The asking side of one node.

    Args:
        network: carries the calls.
        discovery: finds the hosts.
        hosting: this node's own experts, which it asks without a call.
        nursery: runs what several answers share.
        trusting: what is known of hosts.
    """

    def __init__(
        self,
        config: Config,
        network: TcpNetwork,
        discovery: Discovery,
        hosting: Hosting,
        nursery: trio.Nursery,
        trusting: Trusting,
    ) -> None:
        self._trusting = trusting
        self._config = config
        self._network = network
        self._discovery = discovery
        self._hosting = hosting
        self._nursery = nursery
        self._requester: Requester | None = None
        self._held: set[PeerId] = set()  # hosts of :meth:`hold_embedded`
        self._importing = trio.Lock()

    async def check(self, params: Event, emit: Emit) -> LocalModel:
        """Refuse what can be refused before anybody is asked or started; returns the model.

        Raises:
            ConfigError: a bad prompt or model, or the model can't be asked in words.
        """
        if not params["prompt"].strip():
            raise ConfigError("the prompt is empty", hint='write it like: daaswarm infer "What is a hash table?"')
        model = await get_model(params["model"], emit)
        from daaswarm.inference.preflight import check_prompt

        await trio.to_thread.run_sync(
            check_prompt,
            model,
            params["prompt"],
            params["system"],
            params["raw"],
            params["history"],
            abandon_on_cancel=True,
        )
        return model

    async def check_conversation(self, model: LocalModel) -> None:
        """Raises:
        ModelError: the model can't hold one.
        """
        from daaswarm.inference.preflight import check_conversation

        await trio.to_thread.run_sync(check_conversation, model, abandon_on_cancel=True)

    async def answer(self, model: LocalModel, params: Event, emit: Emit, *, embedded: int | None) -> Event:
        """One answer; pieces of text are emitted as they come. Returns the result object.

        Args:
            embedded: start this many hosts here, instead of asking the swarm alone.

        Raises:
            NoPeerCouldServe: experts without a live host.
            ConfigError: a bad prompt.
        """
        dtype = params["dtype"]
        async with AsyncExitStack() as stack:
            nursery = await stack.enter_async_context(trio.open_nursery())
            if embedded is not None:
                dtype = dtype or "f32"
                nursery.start_soon(self._prepare, model, dtype, emit)  # while the hosts start
                await stack.enter_async_context(self._run_embedded(model, embedded, dtype, emit))
            else:
                nursery.start_soon(self.get_requester)  # seconds of imports, while hosts are looked for
            plan = await self.find_hosts(model, dtype)
            await self._say_who_is_banned(plan, emit)
            try:
                if embedded is None and not params.get("force"):
                    await self._advise(model, plan, params, emit)
                result = await self._ask(model, plan, params, emit)
            except NoPeerCouldServe as lost:
                if lost.text or dtype is not None:
                    raise
                other = await self._find_other(model, plan.dtype)
                if other is None:
                    raise
                text = f"no answer from the hosts that compute in {plan.dtype}: asking those in {other.dtype}"
                await emit({"event": "message", "text": text})
                result = await self._ask(model, other, params, emit)
            finally:
                await self._trusting.save()
        hosts = {host["peer_id"] for host in result["hosts"]}
        return {**result, "embedded": embedded is not None or (bool(hosts) and hosts <= self._held)}

    @asynccontextmanager
    async def hold_embedded(
        self, model: LocalModel, count: int, dtype: Dtype | None, emit: Emit
    ) -> AsyncIterator[None]:
        """Hosts on this machine for all answers that are asked for in the block, and the trunk in memory."""
        dtype = dtype or "f32"
        prepared = trio.Event()

        async def prepare() -> None:
            await self._prepare(model, dtype, emit)
            prepared.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(prepare)  # while the hosts start
            async with self._run_embedded(model, count, dtype, emit) as peers:
                await prepared.wait()
                self._held |= peers
                try:
                    yield
                finally:
                    self._held -= peers

    async def _advise(self, model: LocalModel, plan: HostPlan, params: Event, emit: Emit) -> None:
        """Say so if the model would be faster whole, on this machine; once in a conversation.

        Raises:
            ConfigError: this machine can't hold its part.
        """
        check_feasible(model, plan.dtype)
        if params["history"] or plan.get_missing() or plan.contacts.keys() <= {*self._held, self._network.peer_id}:
            return
        await self.connect_hosts(plan)
        if (text := await get_warning(self._network, model, plan)) is not None:
            await emit({"event": "message", "text": text})

    async def _ask(self, model: LocalModel, plan: HostPlan, params: Event, emit: Emit) -> Event:
        plan.check_complete(model.name)
        await self.connect_hosts(plan)
        requester = await self.get_requester()
        trunk = await requester.load(model, plan.dtype, make_progress(emit))
        from daaswarm.inference.requester import Way

        way = Way(params.get("codec", "none"), parse_verify(params.get("verify", "off")))
        return await requester.answer(model, trunk, plan, make_prompt(params), emit, way)

    async def _say_who_is_banned(self, plan: HostPlan, emit: Emit) -> None:
        for standing in plan.banned:
            text = f"not asked: {standing.peer_id}, {standing.reason} (daaswarm peers forgive undoes that)"
            await emit({"event": "message", "text": text})

    async def _prepare(self, model: LocalModel, dtype: Dtype, emit: Emit) -> None:
        """Have the trunk in memory before it is needed."""
        requester = await self.get_requester()
        await requester.load(model, dtype, make_progress(emit))

    async def find_hosts(self, model: LocalModel, dtype: Dtype | None) -> HostPlan:
        """Who serves the model now, in one dtype."""
        from daaswarm.inference.plan import make_plan

        banned = await self._trusting.get_banned()

        def leave_out_banned(known: list[Known]) -> list[Known]:
            return [each for each in known if PeerId(each.advert.peer_id) not in banned]

        def is_enough(known: list[Known]) -> bool:
            return is_covered(leave_out_banned(known), model.layers, kind=model.kind, dtype=dtype)

        found = await self._discovery.find_adverts(model.root, is_enough)
        known = leave_out_banned(found)
        awake = leave_out_paused(known, model.layers, kind=model.kind)
        chosen = choose_dtype(awake, dtype, model.layers, kind=model.kind)
        plan = make_plan(model, known, chosen, self._get_island())
        left_out = tuple(banned[peer] for each in found if (peer := PeerId(each.advert.peer_id)) in banned)
        return replace(plan, banned=left_out)

    async def _find_other(self, model: LocalModel, tried: Dtype) -> HostPlan | None:
        """The best dtype but one, if every expert has a host in it."""
        from daaswarm.inference.plan import make_plan

        known = await self._discovery.find_adverts(model.root)
        ranked = rank_dtypes(known, model.layers, kind=model.kind)
        plans = (make_plan(model, known, dtype, self._get_island()) for dtype in ranked if dtype != tried)
        return next((plan for plan in plans if not plan.get_missing()), None)

    def _get_island(self) -> frozenset[PeerId]:
        """This node and the peers near it."""
        return self._network.links.get_island() | {self._network.peer_id}

    async def connect_hosts(self, plan: HostPlan) -> None:
        """Have a live connection to each host before the model's thread needs it."""
        await connect_all(self._network, plan.contacts.values())

    async def get_requester(self) -> Requester:
        """The part that asks; importing it takes seconds, in a thread."""
        async with self._importing:
            if self._requester is None:
                await trio.to_thread.run_sync(import_module, "daaswarm.inference.requester", abandon_on_cancel=True)
                from daaswarm.inference.requester import Requester

                self._requester = Requester(
                    self._network,
                    self.find_hosts,
                    self._nursery,
                    call_timeout_s=self._config.infer.call_timeout_s,
                    local=self._compute_locally,
                    note_gone=self._discovery.spreader.note_failed,
                    threads=self._config.infer.threads,
                    device=self._config.infer.device,
                    ledger=await self._trusting.get_ledger(),
                    cache=get_cache_dir(),
                )
            return self._requester

    def _compute_locally(self, call: ExpertCall, body: memoryview) -> tuple[Any, Sequence[Any]]:
        return self._hosting.get_service().compute(call, body)

    @asynccontextmanager
    async def _run_embedded(
        self, model: LocalModel, count: int, dtype: Dtype, emit: Emit
    ) -> AsyncIterator[set[PeerId]]:
        """Real host processes on loopback, which find each other through this node; yields who they are."""
        from daaswarm.inference.embedded import run_embedded_hosts

        assert self._network.contact is not None
        text = f"starting {count} host{'s' * (count > 1)} for {model.name} on this machine …"
        await emit({"event": "message", "text": text})
        async with run_embedded_hosts(
            str(model.folder),
            model.kind,
            model.layers,
            count=count,
            bootstrap=list(self._network.direct_addrs),
            swarm=self._config.network.swarm,
            swarm_key=self._network.identity.swarm_key,
            dtype=dtype,
            across=False,
            threads=self._config.host.threads or max(1, (os.cpu_count() or 1) // count),
        ) as hosts:
            await emit({"event": "embedded", "hosts": [{"peer_id": h.peer_id, "addrs": h.addrs} for h in hosts]})
            peers = {PeerId(host.peer_id) for host in hosts}
            ledger = await self._trusting.get_ledger()
            ledger.exempt |= peers  # this program, on this machine
            try:
                yield peers
            finally:
                ledger.exempt -= peers


def make_prompt(params: Event) -> Prompt:
    """The part of an ``infer`` request that generation needs."""
    from daaswarm.inference.prompt import Prompt
    from daaswarm.inference.sequence import Sampling

    return Prompt(
        text=params["prompt"],
        system=params["system"],
        history=params["history"],
        raw=params["raw"],
        stop=params["stop"],
        sampling=Sampling(
            max_tokens=params["max_tokens"],
            temperature=params["temperature"],
            top_p=params["top_p"],
            seed=params["seed"],
            prompt_lookup=params.get("prompt_lookup", True),
        ),
    )
