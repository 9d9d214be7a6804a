"""Who may compute what of one answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from daaswarm.core.adverts import Known, format_missing, get_missing
from daaswarm.core.islands import choose_preferred
from daaswarm.core.reputation import Standing
from daaswarm.errors import NoPeerCouldServe
from daaswarm.messages import Contact
from daaswarm.models.sources import LocalModel
from daaswarm.types import CODECS, Dtype, ExpertId, ModelRoot, PeerId

KNOWN_CODECS = frozenset(CODECS)


@dataclass(frozen=True)
class HostPlan:
    """The hosts found for one model: which peers hold which experts, in one dtype, and where to dial them."""

    root: ModelRoot
    dtype: Dtype
    layers: dict[int, int]  # layer → number of experts (or slices)
    holders: dict[ExpertId, list[PeerId]]
    contacts: dict[PeerId, Contact]
    kind: str = "moe"
    preferred: frozenset[PeerId] = frozenset()  # asked as long as they can be; nobody: the fastest are
    codecs: dict[PeerId, frozenset[str]] = field(default_factory=dict)  # that hosts take
    banned: tuple[Standing, ...] = ()  # hosts of the model that aren't asked
    by_layer: dict[int, dict[int, list[PeerId]]] = field(init=False)

    def __post_init__(self) -> None:
        by_layer: dict[int, dict[int, list[PeerId]]] = {layer: {} for layer in self.layers}
        for (layer, expert), peers in self.holders.items():
            if layer in by_layer:
                by_layer[layer][expert] = peers
        object.__setattr__(self, "by_layer", by_layer)

    def get_missing(self, dead: frozenset[PeerId] = frozenset()) -> dict[int, list[int]]:
        """``{layer: [experts]}`` without a host outside ``dead``."""
        alive = {e: [p for p in peers if p not in dead] for e, peers in self.holders.items()}
        return get_missing(self.layers, {e: peers for e, peers in alive.items() if peers})

    def check_complete(self, model_name: str) -> None:
        """Raises:
        NoPeerCouldServe: some experts have no host; lists them.
        """
        missing = self.get_missing()
        if missing:
            raise self.describe_missing(missing, model_name)

    def describe_missing(self, missing: dict[int, list[int]], model_name: str) -> NoPeerCouldServe:
        """The error that names the layers and experts nobody serves."""
        hosts = len(self.contacts)
        found = f"{hosts} host{'s' if hosts != 1 else ''} found" if hosts else "no host found"
        return NoPeerCouldServe(
            f"{model_name}: no live host for {format_missing(missing, self.layers, kind=self.kind)} ({found})",
            hint="start daaswarm host-expert for them, or run with --embedded 3",
            missing=missing,
        )


def make_plan(model: LocalModel, known: list[Known], dtype: Dtype, island: frozenset[PeerId] = frozenset()) -> HostPlan:
    """What believed adverts mean for one model; experts that the model doesn't have are left out.

    A host that says it is paused is asked only for experts that nobody else has.

    Args:
        island: the requester and the peers near it. Its hosts come first if they hold the whole model.
    """
    holders: dict[ExpertId, list[PeerId]] = {}
    paused: dict[ExpertId, list[PeerId]] = {}
    contacts: dict[PeerId, Contact] = {}
    codecs: dict[PeerId, frozenset[str]] = {}
    for item in known:
        advert = item.advert
        if advert.dtype != dtype or advert.kind != model.kind:
            continue
        peer = PeerId(advert.peer_id)
        contacts[peer] = Contact(peer_id=peer, addrs=advert.addrs)
        codecs[peer] = frozenset(advert.codecs) & KNOWN_CODECS
        for layer, experts in item.experts.items():
            for expert in experts:
                if expert < model.layers.get(layer, 0):
                    wanted = paused if advert.paused else holders
                    wanted.setdefault(ExpertId(layer, expert), []).append(peer)
    holders = paused | holders
    preferred = choose_preferred(model.layers, holders, island)
    return HostPlan(
        model.root, dtype, dict(model.layers), holders, contacts, kind=model.kind, preferred=preferred, codecs=codecs
    )
