"""What ``daaswarm plan`` measures and says."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
import trio

from daaswarm.core.estimate import CALL_S, Estimate, Here, Peer, Shape, estimate
from daaswarm.errors import DaaswarmError
from daaswarm.models.sources import LocalModel
from daaswarm.net.dataplane import TcpNetwork
from daaswarm.net.network import connect_all
from daaswarm.node.advising import get_held, get_shape, make_own
from daaswarm.node.answering import Answering
from daaswarm.node.reporting import Emit, Event, get_model, make_progress
from daaswarm.types import Dtype

if TYPE_CHECKING:
    from daaswarm.inference.measuring import LayerTimes, TrunkTimes
    from daaswarm.inference.plan import HostPlan

logger = logging.getLogger(__name__)


class Planning:
    """The plans of one node.

    Args:
        answering: finds the hosts and holds the trunk.
    """

    def __init__(self, network: TcpNetwork, answering: Answering) -> None:
        self._network = network
        self._answering = answering

    async def plan(self, params: Event, emit: Emit) -> Event:
        """Measure this machine, and the live hosts unless peers are described; then what follows.

        Raises:
            ModelError: a bad model.
            ConfigError: a prompt longer than the model's context.
        """
        model = await get_model(params["model"], emit)
        hosts: HostPlan | None = None
        described: list[Event] | None = params["peers"]
        if described is None:
            hosts = await self._answering.find_hosts(model, params["dtype"])
        dtype: Dtype = params["dtype"] or (hosts.dtype if hosts is not None and hosts.contacts else "f32")
        prompt_tokens = params["prompt_tokens"]
        memory = params["memory_bytes"] or psutil.virtual_memory().available
        await emit({"event": "message", "text": "measuring this machine …"})
        trunk, layer = await self._measure_here(model, dtype, prompt_tokens, memory, emit)
        shape = get_shape(model, dtype, trunk.chosen, prompt_tokens)
        here = Here(
            trunk_token_s=trunk.token_s,
            trunk_prefill_s=trunk.prefill_s,
            layer_token_s=layer.token_s,
            layer_prefill_s=layer.prefill_s,
            memory_bytes=memory,
        )
        silent: list[str] = []
        if hosts is not None:
            peers, silent = await self._measure_hosts(model, hosts, shape, here, emit)
        else:
            peers = []
        peers += [make_peer(peer, here) for peer in described or []]
        found = estimate(shape, here, peers)
        return describe_estimate(found, model, dtype, shape, here, peers, silent)

    async def _measure_here(
        self, model: LocalModel, dtype: Dtype, prompt_tokens: int, memory: int, emit: Emit
    ) -> tuple[TrunkTimes, LayerTimes]:
        requester = await self._answering.get_requester()
        await trio.to_thread.run_sync(import_module, "daaswarm.inference.measuring", abandon_on_cancel=True)
        from daaswarm.inference.measuring import TrunkTimes, measure_layers, measure_trunk

        size = model.get_trunk_bytes(dtype)
        chosen = max(model.layers.values(), default=1)
        trunk: TrunkTimes | None = None
        if size <= min(memory, psutil.virtual_memory().available):
            loaded = await requester.load(model, dtype, make_progress(emit))
            for _ in range(2):  # the first one warms up: it allocates, and reads pages
                trunk = await measure_trunk(requester, self._network, model, loaded, dtype, prompt_tokens)
                chosen = trunk.chosen
        layer = await trio.to_thread.run_sync(measure_layers, model, dtype, chosen, prompt_tokens)
        if trunk is None:  # it can't be run here: as long as as many bytes of experts
            first = min(model.layers)
            scale = size / (model.layers[first] * model.expert_bytes(first, dtype))
            trunk = TrunkTimes(scale * layer.token_s, scale * layer.prefill_s, chosen)
        return trunk, layer

    async def _measure_hosts(
        self, model: LocalModel, hosts: HostPlan, shape: Shape, here: Here, emit: Emit
    ) -> tuple[list[Peer], list[str]]:
        """One after the other, so that they don't disturb each other. Also those that gave no answer."""
        from daaswarm.inference.measuring import measure_host

        await connect_all(self._network, hosts.contacts.values())
        peers: list[Peer] = []
        silent: list[str] = []
        for peer, contact in sorted(hosts.contacts.items()):
            held = get_held(hosts, peer)
            if not held:
                continue
            await emit({"event": "message", "text": f"measuring …{peer[-6:]} …"})
            if peer == self._network.peer_id:
                peers.append(make_own(peer, here, held))
                continue
            try:
                times = await trio.to_thread.run_sync(
                    measure_host,
                    self._network,
                    contact,
                    model,
                    hosts.dtype,
                    held,
                    shape.chosen,
                    shape.prompt_tokens,
                    abandon_on_cancel=True,
                )
            except DaaswarmError as error:
                logger.info("host %s can't be measured: %s", peer, error)
                silent.append(peer)
                continue
            peers.append(
                Peer(
                    name=peer,
                    round_s=times.round_s,
                    bytes_per_s=times.bytes_per_s,
                    layer_token_s=times.layer.token_s,
                    layer_prefill_s=times.layer.prefill_s,
                    held=held,
                )
            )
        return peers, silent


def make_peer(described: dict[str, Any], here: Here) -> Peer:
    """One peer of ``--peers``, as ``cli.plan`` read it: as fast as this machine times its ``speed``."""
    return Peer(
        name=described["name"],
        round_s=described["rtt_ms"] / 1e3 + CALL_S,
        bytes_per_s=described["bytes_per_s"],
        layer_token_s=here.layer_token_s / described["speed"],
        layer_prefill_s=here.layer_prefill_s / described["speed"],
        memory_bytes=described["memory_bytes"],
    )


def describe_estimate(
    found: Estimate, model: LocalModel, dtype: Dtype, shape: Shape, here: Here, peers: list[Peer], silent: list[str]
) -> Event:
    """What ``plan --json`` writes."""
    options = [
        {
            "way": option.way,
            "is_possible": option.is_possible,
            "note": option.note,
            "tokens_per_s": round(option.tokens_per_s, 3),
            "token_ms": round(option.token_s * 1e3, 3) if option.is_possible else None,
            "waiting_ms": round(option.waiting_s * 1e3, 3),
            "prefill_s": round(option.prefill_s, 4) if option.is_possible else None,
            "rounds_per_token": option.rounds_per_token,
            "bytes_per_token": option.bytes_per_token,
            "rounds_per_prefill": option.rounds_per_prefill,
            "bytes_per_prefill": option.bytes_per_prefill,
        }
        for option in found.options
    ]
    fits = [
        {
            "name": peer.name,
            "round_ms": round(peer.round_s * 1e3, 3),
            "bytes_per_s": round(peer.bytes_per_s) if peer.bytes_per_s is not None else None,
            "layer_token_ms": round(peer.layer_token_s * 1e3, 4),
            "memory_bytes": peer.memory_bytes,
            "experts": fit.experts,
            "used": fit.used,
        }
        for peer, fit in zip(peers, found.fits, strict=True)
    ]
    return {
        "model": model.name,
        "model_root": model.root,
        "kind": model.kind,
        "dtype": dtype,
        "prompt_tokens": shape.prompt_tokens,
        "trunk_bytes": shape.trunk_bytes,
        "experts_bytes": shape.experts_bytes,
        "here": {name: round(value, 6) for name, value in msgspec.structs.asdict(here).items()},
        "peers": fits,
        "silent": silent,
        "options": options,
        "verdict": msgspec.structs.asdict(found.verdict),
    }
