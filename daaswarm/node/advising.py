"""Before an answer: whether to split the model is a good idea, from what is known without measuring for seconds."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import psutil
import trio

from daaswarm.core.estimate import NOTICEABLE, Here, Peer, Shape, compute_sharded, compute_whole, place
from daaswarm.errors import ConfigError, DaaswarmError
from daaswarm.messages import Contact, Ping
from daaswarm.models.sources import LocalModel
from daaswarm.net.network import Network
from daaswarm.types import DTYPE_BYTES, Dtype, PeerId, format_bytes

if TYPE_CHECKING:
    from daaswarm.inference.plan import HostPlan

PINGS = 2  # of a host whose way isn't known well: the first may share its time with a handshake
PING_S = 1.0  # for an answer; a host that needs longer is far enough to say so
LAYER_S = 800e-6  # of a layer's attention and norms, beside reading their weights: PyTorch on a CPU, measured
ENOUGH_TOKENS_PER_S = 20.0  # faster than anybody reads: nobody needs to be warned of this
PROMPT_TOKENS = 64  # of the answer that is thought of; a token's time is what decides

logger = logging.getLogger(__name__)


def check_feasible(model: LocalModel, dtype: Dtype) -> None:
    """Raises:
    ConfigError: this machine can't hold the requester's part, whatever else it gives up.
    """
    size, total = model.get_trunk_bytes(dtype), psutil.virtual_memory().total
    if size > total:
        raise ConfigError(
            f"the requester's part of {model.name} takes {format_bytes(size)} in {dtype}; this machine has "
            f"{format_bytes(total)}",
            hint="choose a smaller model, or another --dtype; --force tries it all the same",
        )


async def get_warning(network: Network, model: LocalModel, hosts: HostPlan) -> str | None:
    """What to tell who is about to split a model that would run faster whole, here; ``None`` if all is well."""
    size = model.get_trunk_bytes(hosts.dtype) + sum(
        count * model.expert_bytes(layer, hosts.dtype) for layer, count in model.layers.items()
    )
    if size > psutil.virtual_memory().available:
        return None
    await _ping_all(network, hosts.contacts)
    rate = await trio.to_thread.run_sync(_measure_read_rate, abandon_on_cancel=True)
    return judge(network, model, hosts, rate)


def judge(network: Network, model: LocalModel, hosts: HostPlan, rate: float) -> str | None:
    """:func:`get_warning`, once the round trips are known. Of a mixture's experts a token reads few; how many isn't
    known here, so the cheapest case is thought of, which is the one where waiting weighs most.

    Args:
        rate: bytes of weights that this machine reads in a second.
    """
    chosen = 1 if model.kind == "moe" else max(model.layers.values())
    shape = get_shape(model, hosts.dtype, chosen, PROMPT_TOKENS)
    layer_bytes = sum(min(chosen, count) * shape.expert_bytes[layer] for layer, count in shape.layers.items())
    layer_s = layer_bytes / len(shape.layers) / rate
    trunk_s = shape.trunk_bytes / rate + len(shape.layers) * LAYER_S
    here = Here(
        trunk_token_s=trunk_s,
        trunk_prefill_s=0.0,
        layer_token_s=layer_s,
        layer_prefill_s=0.0,
        memory_bytes=psutil.virtual_memory().total,
    )
    peers: list[Peer] = []
    for peer in sorted(hosts.contacts):
        held = get_held(hosts, peer)
        link = network.links.get(peer)
        if peer == network.peer_id:
            peers.append(make_own(peer, here, held))
        elif held:
            round_s = link.rtt_s if link is not None else PING_S
            peers.append(Peer(name=peer, round_s=round_s, layer_token_s=layer_s, layer_prefill_s=0.0, held=held))
    whole, split = compute_whole(shape, here), compute_sharded(shape, here, peers, place(shape, peers))
    if not (whole.is_possible and split.is_possible):
        return None  # what is missing is said by whoever misses it
    if split.tokens_per_s >= ENOUGH_TOKENS_PER_S or split.token_s < NOTICEABLE * whole.token_s:
        return None
    return (
        f"warning: {model.name} is split over hosts {split.waiting_s / len(shape.layers) * 1e3:.1f} ms away: about "
        f"{split.tokens_per_s:.1f} tokens/s, since each token takes {split.rounds_per_token} round trips; whole on "
        f"this machine about {whole.tokens_per_s:.0f} (daaswarm plan measures it, --embedded 1 runs it here, --force "
        "says nothing)"
    )


async def _ping_all(network: Network, contacts: dict[PeerId, Contact]) -> None:
    """So that the way to each is known."""

    async def ping(contact: Contact) -> None:
        try:
            for _ in range(PINGS):
                await network.call(contact, Ping(), deadline_s=PING_S)
        except DaaswarmError as error:
            logger.debug("%s: %s", contact.peer_id, error)

    async with trio.open_nursery() as nursery:
        for peer, contact in contacts.items():
            if peer != network.peer_id:
                nursery.start_soon(ping, contact)


def _measure_read_rate() -> float:
    from daaswarm.inference.measuring import measure_read_rate

    return measure_read_rate()


def get_shape(model: LocalModel, dtype: Dtype, chosen: int, prompt_tokens: int) -> Shape:
    """What of a model and request an estimate needs."""
    return Shape(
        kind=model.kind,
        layers=dict(model.layers),
        expert_bytes={layer: model.expert_bytes(layer, dtype) for layer in model.layers},
        trunk_bytes=model.get_trunk_bytes(dtype),
        hidden=model.hidden,
        item_bytes=DTYPE_BYTES[dtype],
        chosen=chosen,
        prompt_tokens=prompt_tokens,
    )


def get_held(hosts: HostPlan, peer: PeerId) -> dict[int, list[int]]:
    """What one host holds."""
    held: dict[int, list[int]] = {}
    for expert, peers in hosts.holders.items():
        if peer in peers:
            held.setdefault(expert.layer, []).append(expert.expert)
    return {layer: sorted(ids) for layer, ids in sorted(held.items())}


def make_own(peer: PeerId, here: Here, held: dict[int, list[int]]) -> Peer:
    """This node as one of its own hosts: no call, no round trip."""
    return Peer(
        name=peer,
        round_s=0.0,
        layer_token_s=here.layer_token_s,
        layer_prefill_s=here.layer_prefill_s,
        memory_bytes=here.memory_bytes,
        held=held,
    )
