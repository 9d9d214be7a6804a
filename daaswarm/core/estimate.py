"""What a model would cost here, over the swarm, and in the ways in between; and which to take.

Formulas over measured figures, no measuring: times add up along what has to happen one after the other. Where two
things happen at once (hosts of one layer), the slower counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from daaswarm.core.router import EXTRA_PEER_S
from daaswarm.types import ExpertId, format_bytes

SUM_BYTES = 4  # of one value of an answer: f32
PAIR_BYTES = 12  # row, expert and weight of one pair
FRAME_BYTES = 350  # two frame heads, message headers and TLS records of one call and its answer
ROWS_PER_CALL = 512  # as the requester cuts a long prompt; its calls travel together
CALL_S = 300e-6  # that both ends spend on one call beside computing and the wire; for peers that weren't measured
USABLE_TOKENS_PER_S = 2.0  # a split slower than this is of no use to anybody who waits for it
NOTICEABLE = 1.3  # times slower: what an estimate can tell for sure, since it may be wrong by 30 %
LARGE_S = 1e9  # a time that stands for never


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What of a model and of a request costs something. Sizes in one dtype."""

    kind: str  # "moe" or "dense"
    layers: dict[int, int]  # layer → experts (or slices)
    expert_bytes: dict[int, int]  # of one expert of a layer
    trunk_bytes: int
    hidden: int
    item_bytes: int  # of one value of a row
    chosen: int  # experts of a layer that a row goes to; of a dense model all slices
    prompt_tokens: int

    @property
    def experts_bytes(self) -> int:
        return sum(count * self.expert_bytes[layer] for layer, count in self.layers.items())


class Here(msgspec.Struct, frozen=True, kw_only=True):
    """This machine, as measured. Layer times are of one split layer with all that is chosen of it."""

    trunk_token_s: float  # one token through the requester's part, routing included
    trunk_prefill_s: float  # the prompt
    layer_token_s: float
    layer_prefill_s: float
    memory_bytes: int  # that a model may take


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """Another machine, measured or described. ``None``: not known."""

    name: str
    round_s: float  # round trip, with what both ends spend on a call beside computing
    bytes_per_s: float | None = None
    layer_token_s: float  # as :class:`Here`
    layer_prefill_s: float
    memory_bytes: int | None = None
    held: dict[int, list[int]] | None = None  # what it serves; ``None``: whatever fits


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run the model."""

    way: str  # "whole", "sharded", "pipeline", "ensemble"
    is_possible: bool
    note: str  # why not, or what it rests on
    token_s: float = LARGE_S
    prefill_s: float = LARGE_S
    rounds_per_token: int = 0
    bytes_per_token: int = 0
    rounds_per_prefill: int = 0
    bytes_per_prefill: int = 0
    waiting_s: float = 0.0  # of token_s, for round trips

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.token_s if self.is_possible and self.token_s > 0 else 0.0


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """What one peer can hold of a model, and would in the sharded way."""

    name: str
    experts: int  # that fit into its memory, or that it serves
    used: int  # that it is asked for
    round_ms: float


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What to do. ``way`` is ``"whole"``, ``"sharded"`` or ``"none"``; ``number`` decides it, in ``unit``."""

    way: str
    split: bool
    text: str
    number: float
    unit: str


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    options: list[Option]
    fits: list[Fit]
    verdict: Verdict

    def get(self, way: str) -> Option:
        return next(option for option in self.options if option.way == way)


def estimate(shape: Shape, here: Here, peers: Sequence[Peer]) -> Estimate:
    """All of it. The figures of ``peers`` may come from a file: they are checked by whoever reads it."""
    held = place(shape, peers)
    options = [
        compute_whole(shape, here),
        compute_sharded(shape, here, peers, held),
        compute_pipeline(shape, here, peers),
        compute_ensemble(shape, here, peers),
    ]
    fits = [
        Fit(
            name=peer.name,
            experts=count_fitting(shape, peer),
            used=sum(map(len, held[i].values())),
            round_ms=peer.round_s * 1e3,
        )
        for i, peer in enumerate(peers)
    ]
    return Estimate(options=options, fits=fits, verdict=decide(shape, here, *options[:2]))


def decide(shape: Shape, here: Here, whole: Option, sharded: Option) -> Verdict:
    """Whole here if it fits and isn't slower; split if it has to be and is of use."""
    size = format_bytes(shape.trunk_bytes + shape.experts_bytes)
    waiting_ms = sharded.waiting_s * 1e3
    rounds = f"{sharded.rounds_per_token} round trips a token take {waiting_ms:.0f} of {sharded.token_s * 1e3:.0f} ms"
    if whole.is_possible and (not sharded.is_possible or whole.token_s <= sharded.token_s):
        text = f"don't split it: whole on this machine {whole.tokens_per_s:.1f} tokens/s"
        if not sharded.is_possible:
            text += f"; {sharded.note}"
        else:
            text += f", split {sharded.tokens_per_s:.1f}: {rounds}"
        return Verdict(way="whole", split=False, text=text, number=whole.tokens_per_s, unit="tokens/s")
    if not sharded.is_possible:
        text = f"it can't run: {whole.note}; {sharded.note}"
        return Verdict(way="none", split=False, text=text, number=0.0, unit="tokens/s")
    if sharded.tokens_per_s < USABLE_TOKENS_PER_S and not whole.is_possible:
        text = (
            f"don't split it: {sharded.tokens_per_s:.2f} tokens/s, since {rounds}; take nearer hosts or a smaller model"
        )
        return Verdict(way="none", split=False, text=text, number=waiting_ms, unit="ms of waiting a token")
    if whole.is_possible:
        text = f"split it: {sharded.tokens_per_s:.1f} tokens/s, whole on this machine {whole.tokens_per_s:.1f}"
    else:
        text = (
            f"split it: {sharded.tokens_per_s:.1f} tokens/s; its {size} don't fit into the "
            f"{format_bytes(here.memory_bytes)} of this machine"
        )
    return Verdict(way="sharded", split=True, text=text, number=sharded.tokens_per_s, unit="tokens/s")


def compute_whole(shape: Shape, here: Here) -> Option:
    """All of it on this machine: no round trips."""
    size = shape.trunk_bytes + shape.experts_bytes
    if size > here.memory_bytes:
        note = f"whole, it takes {format_bytes(size)}; this machine has {format_bytes(here.memory_bytes)}"
        return Option(way="whole", is_possible=False, note=note)
    return Option(
        way="whole",
        is_possible=True,
        note=f"{format_bytes(size)} on this machine",
        token_s=here.trunk_token_s + len(shape.layers) * here.layer_token_s,
        prefill_s=here.trunk_prefill_s + len(shape.layers) * here.layer_prefill_s,
    )


def compute_sharded(
    shape: Shape, here: Here, peers: Sequence[Peer], held: Sequence[Mapping[int, Sequence[int]]]
) -> Option:
    """The trunk here, each layer's experts at their hosts: a round trip for each layer of each token.

    Args:
        held: of each peer, what it is asked for.
    """
    missing = sum(shape.layers.values()) - sum(len(ids) for part in held for ids in part.values())
    if shape.trunk_bytes > here.memory_bytes:
        note = f"the requester's part takes {format_bytes(shape.trunk_bytes)}: more than this machine has"
        return Option(way="sharded", is_possible=False, note=note)
    if missing:
        noun = "experts" if shape.kind == "moe" else "slices"
        note = f"{missing} of {sum(shape.layers.values())} {noun} have no host"
        return Option(way="sharded", is_possible=False, note=note)
    token_s, prefill_s, waiting_s = here.trunk_token_s, here.trunk_prefill_s, 0.0
    token_bytes = prefill_bytes = 0.0
    for layer, count in shape.layers.items():
        slowest_token_s = slowest_prefill_s = waited_s = 0.0
        asked = 0.0
        for peer, part in zip(peers, held, strict=True):
            if not (experts := len(part.get(layer, ()))):
                continue
            share = experts / count
            # Of a mixture a token goes to few experts, and so perhaps to none of this host's.
            likely = 1 - (1 - share) ** shape.chosen if shape.kind == "moe" else 1.0
            asked += likely
            one, whole = _count_bytes(shape, 1, share, likely), _count_bytes(shape, shape.prompt_tokens, share, 1.0)
            token_bytes += one
            prefill_bytes += whole
            wire_s = one / peer.bytes_per_s if peer.bytes_per_s else 0.0
            waited_s = max(waited_s, peer.round_s + wire_s)
            slowest_token_s = max(slowest_token_s, peer.round_s + wire_s + share * peer.layer_token_s)
            wire_s = whole / peer.bytes_per_s if peer.bytes_per_s else 0.0
            slowest_prefill_s = max(slowest_prefill_s, peer.round_s + wire_s + share * peer.layer_prefill_s)
        extra_s = EXTRA_PEER_S * max(asked - 1, 0.0)
        token_s += slowest_token_s + extra_s
        prefill_s += slowest_prefill_s + extra_s
        waiting_s += waited_s
    used = sum(1 for part in held if part)
    return Option(
        way="sharded",
        is_possible=True,
        note=f"{used} host{'s' * (used != 1)}, {format_bytes(shape.trunk_bytes)} on this machine",
        token_s=token_s,
        prefill_s=prefill_s,
        rounds_per_token=len(shape.layers),
        bytes_per_token=round(token_bytes),
        rounds_per_prefill=len(shape.layers),
        bytes_per_prefill=round(prefill_bytes),
        waiting_s=waiting_s,
    )


def compute_pipeline(shape: Shape, here: Here, peers: Sequence[Peer]) -> Option:
    """Modelled, not built: each peer has some whole layers with their attention, and hands rows to the next one. A
    token crosses the network once for each stage and comes back: half a round trip each.
    """
    layers = len(shape.layers)
    if not layers:
        return Option(way="pipeline", is_possible=False, note="no layers")
    layer_bytes = [
        count * shape.expert_bytes[layer] + shape.trunk_bytes // layers for layer, count in shape.layers.items()
    ]
    token_s = prefill_s = hops_s = 0.0
    at = stages = 0
    far_s = 0.0
    row_bytes = shape.hidden * shape.item_bytes + FRAME_BYTES // 2
    prompt_bytes = shape.prompt_tokens * shape.hidden * shape.item_bytes + FRAME_BYTES // 2
    for peer in sorted(peers, key=lambda peer: (peer.round_s, peer.name)):
        memory, first = _get_memory(shape, peer), at
        while at < layers and layer_bytes[at] <= memory:
            memory -= layer_bytes[at]
            at += 1
        if at == first:
            continue
        slower = peer.layer_token_s / here.layer_token_s if here.layer_token_s else 1.0
        own = at - first
        token_s += own * (peer.layer_token_s + slower * here.trunk_token_s / layers)
        prefill_s += own * (peer.layer_prefill_s + slower * here.trunk_prefill_s / layers)
        hop_s = max(far_s, peer.round_s) / 2
        rate = peer.bytes_per_s or math.inf
        hops_s += hop_s
        token_s += hop_s + row_bytes / rate
        prefill_s += hop_s + prompt_bytes / rate
        far_s, stages = peer.round_s, stages + 1
        if at == layers:
            break
    if at < layers:
        note = f"{layers - at} of {layers} layers fit nowhere, with their attention"
        return Option(way="pipeline", is_possible=False, note=note)
    return Option(
        way="pipeline",
        is_possible=True,
        note=f"modelled: {stages} stage{'s' * (stages != 1)}",
        token_s=token_s + far_s / 2,
        prefill_s=prefill_s + far_s / 2,
        rounds_per_token=1,
        bytes_per_token=(stages + 1) * row_bytes,
        rounds_per_prefill=1,
        bytes_per_prefill=(stages + 1) * prompt_bytes,
        waiting_s=hops_s + far_s / 2,
    )


def compute_ensemble(shape: Shape, here: Here, peers: Sequence[Peer]) -> Option:
    """Modelled, not built: every machine that can hold the whole model answers by itself, and the last one counts.
    Prompt and answer travel as text, once.
    """
    size = shape.trunk_bytes + shape.experts_bytes
    able = [peer for peer in peers if peer.memory_bytes is not None and peer.memory_bytes >= size]
    members = len(able) + (size <= here.memory_bytes)
    if members < 2:
        note = f"{members} machine{'s' * (members != 1)} known to hold the whole model; it takes two"
        return Option(way="ensemble", is_possible=False, note=note)
    layers = len(shape.layers)
    token_s = here.trunk_token_s + layers * here.layer_token_s if size <= here.memory_bytes else 0.0
    prefill_s = here.trunk_prefill_s + layers * here.layer_prefill_s if size <= here.memory_bytes else 0.0
    for peer in able:
        slower = peer.layer_token_s / here.layer_token_s if here.layer_token_s else 1.0
        token_s = max(token_s, slower * here.trunk_token_s + layers * peer.layer_token_s)
        prefill_s = max(prefill_s, peer.round_s + slower * here.trunk_prefill_s + layers * peer.layer_prefill_s)
    return Option(
        way="ensemble",
        is_possible=True,
        note=f"modelled: {members} whole models, one text of each",
        token_s=token_s,
        prefill_s=prefill_s,
        rounds_per_prefill=1,
    )


def place(shape: Shape, peers: Sequence[Peer]) -> list[dict[int, list[int]]]:
    """Who is asked for which experts, ``{layer: [experts]}`` of each peer: the quickest that holds one. Peers of which
    it isn't known are filled up with what nobody else holds, the quickest first.
    """
    order = sorted(range(len(peers)), key=lambda i: (peers[i].round_s + peers[i].layer_token_s, peers[i].name, i))
    everything = [ExpertId(layer, e) for layer, count in sorted(shape.layers.items()) for e in range(count)]
    chosen: dict[ExpertId, int] = {}
    for i in order:
        held = peers[i].held
        if held is not None:
            for expert in everything:
                if expert.expert in held.get(expert.layer, ()):
                    chosen.setdefault(expert, i)
    for i in order:
        if peers[i].held is None:
            left = _get_memory(shape, peers[i])
            for expert in everything:
                if expert not in chosen and shape.expert_bytes[expert.layer] <= left:
                    chosen[expert] = i
                    left -= shape.expert_bytes[expert.layer]
    placed: list[dict[int, list[int]]] = [{} for _ in peers]
    for expert, i in sorted(chosen.items()):
        placed[i].setdefault(expert.layer, []).append(expert.expert)
    return placed


def count_fitting(shape: Shape, peer: Peer) -> int:
    """Experts that a peer serves, or that its memory has room for."""
    if peer.held is not None:
        return sum(len(ids) for layer, ids in peer.held.items() if layer in shape.layers)
    left, count = _get_memory(shape, peer), 0
    for layer, experts in sorted(shape.layers.items(), key=lambda item: (shape.expert_bytes[item[0]], item[0])):
        size = shape.expert_bytes[layer]
        fitting = min(experts, int(left // size)) if size else experts
        left -= fitting * size
        count += fitting
    return count


def _get_memory(shape: Shape, peer: Peer) -> int:
    """What a peer has for a model: as it says, or at least what it serves."""
    if peer.memory_bytes is not None:
        return peer.memory_bytes
    held = peer.held or {}
    return sum(len(ids) * shape.expert_bytes.get(layer, 0) for layer, ids in held.items())


def _count_bytes(shape: Shape, rows: int, share: float, likely: float) -> float:
    """Of one layer's calls to one host, both ways."""
    calls = math.ceil(rows / ROWS_PER_CALL)
    pairs = rows * shape.chosen * share if shape.kind == "moe" else 0.0
    body = rows * shape.hidden * (shape.item_bytes + SUM_BYTES)
    return likely * (body + calls * FRAME_BYTES) + pairs * PAIR_BYTES
