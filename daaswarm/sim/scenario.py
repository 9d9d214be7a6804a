"""What is simulated: how many nodes, experts and users, and what goes wrong. Read from TOML, overridden by flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tomli
from msgspec import Meta

from daaswarm.errors import ConfigError

SCENARIO_BYTES = 1 << 20  # a scenario is small; anything larger is not one
NODES = 50_000  # at about 150 kB each 8 GB, what an ordinary machine holds
USERS = 5_000_000

Share = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]
Lie = Literal["each other", "garbage", "own records", "the dead", "nothing"]


class Region(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where nodes are. ``rtt_ms``: round trip to each region, in their order, without the last mile."""

    name: str
    share: Share
    rtt_ms: list[Annotated[float, Meta(ge=0, le=5_000)]]


class Cut(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``share`` of the nodes can't talk to the others from ``at_s`` for ``for_s``; packets vanish silently."""

    at_s: Seconds
    for_s: Seconds
    share: Share = 0.5


class Surge(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Users call ``factor`` times as often from ``at_s`` for ``for_s``."""

    at_s: Seconds
    for_s: Seconds
    factor: Annotated[float, Meta(gt=0, le=100)]


class Storm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``nodes`` more that know nobody but a few seeds, evenly over ``for_s`` from ``at_s``."""

    at_s: Seconds
    for_s: Seconds
    nodes: Annotated[int, Meta(ge=1, le=NODES)]


# Round trips between data centres of the large clouds (their published tables, rounded); the last mile comes on top.
REGIONS = (
    Region(name="europe", share=0.30, rtt_ms=[20, 85, 145, 180, 200, 270]),
    Region(name="us-east", share=0.25, rtt_ms=[85, 20, 65, 190, 120, 205]),
    Region(name="us-west", share=0.15, rtt_ms=[145, 65, 20, 125, 175, 145]),
    Region(name="asia", share=0.20, rtt_ms=[180, 190, 125, 50, 300, 120]),
    Region(name="south-america", share=0.05, rtt_ms=[200, 120, 175, 300, 30, 300]),
    Region(name="oceania", share=0.05, rtt_ms=[270, 205, 145, 120, 300, 30]),
)


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run. Each node hosts one expert; experts are spread evenly; users sit at nodes, evenly."""

    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 1
    nodes: Annotated[int, Meta(ge=2, le=NODES)] = 1_000
    experts: Annotated[int, Meta(ge=1, le=NODES)] = 100
    users: Annotated[int, Meta(ge=0, le=USERS)] = 10_000
    minutes: Annotated[float, Meta(gt=0, le=1_440)] = 10.0

    # what users do
    calls_per_minute: Annotated[float, Meta(gt=0, le=6_000)] = 1.0  # of each user
    favourites: Annotated[int, Meta(ge=1, le=256)] = 2  # experts that the users of one node use
    settled: Share = 1.0  # of the nodes whose users have asked for their favourites before the run
    wander: Share = 0.005  # of the calls that go to any other expert
    popularity: Annotated[float, Meta(ge=0, le=3)] = 0.8  # Zipf's exponent, of favourites and of those wandered to
    surges: list[Surge] = []

    # what hosts do
    service_ms: Annotated[float, Meta(gt=0, le=60_000)] = 12.0  # a call computed by the median host
    row_bytes: Annotated[int, Meta(ge=1, le=1 << 24)] = 8_192  # one way; 2,048 values in f32

    # the network
    regions: Annotated[tuple[Region, ...], Meta(min_length=1, max_length=64)] = REGIONS
    last_mile_ms: Annotated[float, Meta(ge=0, le=5_000)] = 4.0  # one way, of the median node; log-normal, sigma 0.6
    jitter: Annotated[float, Meta(ge=0, le=2)] = 0.15  # sigma of the log-normal factor on each message's way
    loss: Annotated[float, Meta(ge=0, lt=1)] = 0.005  # packets lost; TCP sends them again

    # what goes wrong
    churn: Annotated[float, Meta(ge=0, le=20)] = 0.0  # share of the nodes that die silently and are replaced
    hostile: Annotated[float, Meta(ge=0, le=0.9)] = 0.0  # share of the nodes
    lies: Annotated[tuple[Lie, ...], Meta(min_length=1, max_length=5)] = (
        "each other",
        "garbage",
        "own records",
        "the dead",
    )
    cuts: list[Cut] = []
    storms: list[Storm] = []

    # what is measured besides
    probes: Annotated[int, Meta(ge=0, le=1_000_000)] = 500  # lookups of random ids by random nodes, over the run

    @property
    def duration_s(self) -> float:
        return self.minutes * 60.0


def load_scenario(path: Path | None, **overrides: Any) -> Scenario:
    """A scenario file with flags on top; without a file, the built-in scenario. ``None`` overrides nothing. Where only
    the nodes are said, there is an expert for each ten and there are ten users to each.

    Raises:
        ConfigError: the file can't be read, isn't TOML, or says something that isn't possible.
    """
    document: dict[str, Any] = {}
    if path is not None:
        try:
            with path.open("rb") as file:
                data = file.read(SCENARIO_BYTES + 1)  # not by its size: a device says that it has none
            if len(data) > SCENARIO_BYTES:
                raise ConfigError(f"{path} has more than {SCENARIO_BYTES} bytes", hint="is it a scenario?")
            document = tomli.loads(data.decode("utf-8"))
        except OSError as error:
            raise ConfigError(f"{path} can't be read: {error.strerror}", hint="give the path of a TOML file") from error
        except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}", hint="docs/how-to/simulate-a-swarm.md has one") from error
    document |= {name: value for name, value in overrides.items() if value is not None}
    nodes = document.get("nodes")
    if isinstance(nodes, int) and 0 < nodes <= NODES:
        document = {"experts": max(nodes // 10, 1), "users": 10 * nodes} | document
    try:
        scenario = msgspec.convert(document, Scenario)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"scenario{f' {path}' if path is not None else ''}: {error}",
            hint="docs/how-to/simulate-a-swarm.md lists all settings",
        ) from error
    return _check(scenario)


def scale(scenario: Scenario, nodes: int) -> Scenario:
    """The same with so many nodes; experts and users in proportion."""
    ratio = nodes / scenario.nodes
    return _check(
        msgspec.structs.replace(
            scenario,
            nodes=nodes,
            experts=max(round(scenario.experts * ratio), 1),
            users=round(scenario.users * ratio),
        )
    )


def _check(scenario: Scenario) -> Scenario:
    honest = scenario.nodes - round(scenario.hostile * scenario.nodes)
    if scenario.experts > honest:
        raise ConfigError(
            f"{scenario.experts} experts on {honest} honest nodes: some would have no host",
            hint=f"--experts {honest} is the most",
        )
    for region in scenario.regions:
        if len(region.rtt_ms) != len(scenario.regions):
            raise ConfigError(
                f"region {region.name}: {len(region.rtt_ms)} round trips for {len(scenario.regions)} regions",
                hint="rtt_ms needs one number for each region, in their order",
            )
    if not abs(sum(region.share for region in scenario.regions) - 1) < 1e-6:
        raise ConfigError("the shares of the regions don't add up to 1", hint="change the shares of [[regions]]")
    return scenario
