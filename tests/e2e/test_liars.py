"""A host that lies, as its victim sees it: the text is right, the liar is named, and asked no more in later runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from daaswarm.models.sources import find_model
from tests.e2e.processes import run, run_json, running
from tests.e2e.test_tiny_swarm import TOKENS, get_reference_text

pytestmark = pytest.mark.e2e

LIAR = (str(Path(__file__).with_name("lying_host.py")),)


class Hosts(NamedTuple):
    bootstrap: str
    honest: str
    liar: str


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One without secrets, at first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAASWARM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@contextlib.contextmanager
def open_hosts(folder: Path, model: str, lies: str) -> Iterator[Hosts]:
    """Two, each with all of the model; one of them lies."""
    with contextlib.ExitStack() as stack:
        honest = stack.enter_context(running("host-expert", model, "--data-dir", str(folder / "honest")))
        first = honest.wait_for("ready")
        options = ("--bootstrap", first["addrs"][0], "--data-dir", str(folder / "liar"))
        liar = stack.enter_context(running("host-expert", model, *options, program=LIAR, LIES=lies))
        yield Hosts(first["addrs"][0], first["peer_id"], liar.wait_for("ready")["peer_id"])


def ask(hosts: Hosts, model: str, me: Path, *options: str) -> dict[str, Any]:
    common = ("--temperature", "0", "--max-tokens", str(TOKENS), "--bootstrap", hosts.bootstrap)
    return run_json("infer", "Hello", "--model", model, *common, "--data-dir", str(me), *options)


@pytest.mark.parametrize("architecture", ["moe", "dense"])
def test_a_liar(architecture: str, request: pytest.FixtureRequest, cache: Path, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(architecture)
    model, right = str(folder), get_reference_text(folder, "Hello")
    find_model(model, cache)
    with open_hosts(tmp_path, model, "always") as hosts:
        wrong = ask(hosts, model, tmp_path / "careless", "--verify", "off")
        assert wrong["text"] != right and wrong["verify"]["mode"] == "off"  # it does lie

        twin = ask(hosts, model, tmp_path / "twin", "--verify", "twin=1")
        assert twin["text"] == right and [w["peer_id"] for w in twin["verify"]["wrong"]] == [hosts.liar]
        assert twin["verify"]["compared"] > 0 and twin["verify"]["recomputed"] > 0

        made = run_json("model", "prepare", model, "--audit")
        assert Path(made["path"]).stat().st_size == made["bytes"]
        caught = ask(hosts, model, tmp_path / "me")  # by default
        assert caught["text"] == right and caught["verify"]["wrong"] == [{"peer_id": hosts.liar, "calls": 1}]
        assert caught["verify"]["sketched"] > 0 and caught["verify"]["mode"] == "sample=0.05"

        listed = run_json("peers", "list", "--data-dir", str(tmp_path / "me"))["peers"]
        trust = {peer["peer_id"]: peer["trust"] for peer in listed}
        assert trust[hosts.liar]["state"] == "banned" and "sketches" in trust[hosts.liar]["reason"]
        assert trust[hosts.honest]["state"] in ("probation", "trusted")

        done = run(
            *("infer", "Hello", "--model", model, "--temperature", "0", "--max-tokens", str(TOKENS)),
            *("--bootstrap", hosts.bootstrap, "--data-dir", str(tmp_path / "me")),
        )
        assert done.stdout.strip() == right.strip() and f"not asked: {hosts.liar}" in done.stderr
        assert "calls checked by sketches, all right" in done.stderr

        run_json("peers", "forgive", hosts.liar, "--data-dir", str(tmp_path / "me"))
        again = ask(hosts, model, tmp_path / "me")
        assert again["text"] == right and [w["peer_id"] for w in again["verify"]["wrong"]] == [hosts.liar]


def test_a_liar_that_is_honest_where_it_sees_the_check(dense: Path, cache: Path, tmp_path: Path) -> None:
    """It passes probation. Then its answers are judged, and not what it opens."""
    model = str(dense)
    find_model(model, cache)
    run_json("model", "prepare", model, "--audit")
    with open_hosts(tmp_path, model, "unopened") as hosts:
        for _ in range(12):
            answer = ask(hosts, model, tmp_path / "me", "--verify", "sample=0.5")
            if answer["verify"]["wrong"]:
                break
        assert [wrong["peer_id"] for wrong in answer["verify"]["wrong"]] == [hosts.liar]
