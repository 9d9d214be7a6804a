"""Gradients through experts in another process equal those of the same weights here."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import trio
from torch import nn
from transformers import AutoModelForCausalLM

from daaswarm.errors import DaaswarmError, LocalProtocolError, NoPeerCouldServe
from daaswarm.models.sources import LocalModel
from daaswarm.training.client import ROWS_PER_CALL, TrainingSwarm, open_swarm
from daaswarm.training.remote_expert import RemoteExpert
from tests.e2e.processes import Running, running

pytestmark = pytest.mark.e2e

TOLERANCE = 1e-5  # of f32 sums in another order
LAYER = 1


class World(NamedTuple):
    """A host with the dense model, and two that have half of the other's experts each."""

    swarm: TrainingSwarm
    dense: LocalModel
    moe: LocalModel
    peers: list[str]
    last: Running


@pytest.fixture(scope="module")
def world(dense: Path, moe: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("hosts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAASWARM_CACHE", str(cache))
        quick = {"DAASWARM_NETWORK_LIBP2P": "false"}
        with running("host-expert", str(dense), "--data-dir", str(folder / "a"), **quick) as first:
            a = first.wait_for("ready")
            address = ["--bootstrap", a["addrs"][0]]
            half = ["host-expert", str(moe), "--data-dir", str(folder / "b"), "--experts", "0-4", *address]
            other = ["host-expert", str(moe), "--data-dir", str(folder / "c"), "--experts", "4-7", *address]
            with running(*half, **quick) as second, running(*other, **quick) as third:
                b, c = second.wait_for("ready"), third.wait_for("ready")
                with open_swarm([a["addrs"][0]]) as swarm:
                    peers = [ready["peer_id"] for ready in (a, b, c)]
                    yield World(swarm, swarm.find_model(str(dense)), swarm.find_model(str(moe)), peers, third)


def load(model: LocalModel) -> Any:
    return AutoModelForCausalLM.from_pretrained(model.folder, local_files_only=True).model.layers[LAYER].mlp


def make_rows(model: LocalModel, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, model.hidden, generator=torch.Generator().manual_seed(1)).requires_grad_()


def assert_equal(got: torch.Tensor, want: torch.Tensor) -> None:
    got, want = got.detach(), want.detach()
    assert (got - want).abs().max() <= TOLERANCE * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("count", [3, ROWS_PER_CALL + 2])
def test_gradients_through_slices_equal_local_ones(world: World, count: int) -> None:
    mine, theirs = make_rows(world.dense, count, 1), make_rows(world.dense, count, 1)
    want, got = load(world.dense)(mine), RemoteExpert(world.swarm, world.dense, LAYER)(theirs)
    assert got.shape == want.shape
    assert_equal(got, want)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(2))
    want.backward(upstream)
    got.backward(upstream)
    assert mine.grad is not None and theirs.grad is not None
    assert_equal(theirs.grad, mine.grad)


@pytest.mark.parametrize("count", [1, 5, ROWS_PER_CALL + 2])
def test_gradients_through_experts_reach_rows_and_router(world: World, count: int) -> None:
    """Experts on two hosts, one of them on both; a router of one's own before them."""
    torch.manual_seed(0)
    router = nn.Linear(world.moe.hidden, 8)
    experts = load(world.moe).experts
    remote = RemoteExpert(world.swarm, world.moe, LAYER)
    found: list[list[torch.Tensor]] = []
    for function in (experts, remote):
        router.zero_grad()
        rows = make_rows(world.moe, count)
        weights, index = router(rows).softmax(-1).topk(3)
        out = function(rows, index, weights)
        (out**2).sum().backward()
        assert rows.grad is not None and router.weight.grad is not None
        found.append([out.detach(), rows.grad, router.weight.grad.clone()])
    for want, got in zip(*found, strict=True):
        assert got.abs().max() > 0
        assert_equal(got, want)


def test_gradients_are_those_of_small_differences(world: World) -> None:
    """What ``gradcheck`` does, in f32 and along random directions."""
    remote = RemoteExpert(world.swarm, world.moe, LAYER, [2, 5])
    rows = make_rows(world.moe, 2)
    upstream, direction = torch.randn(2, *rows.shape, generator=torch.Generator().manual_seed(3))
    remote(rows).backward(upstream)
    step = 1e-2
    with torch.no_grad():
        difference = remote(rows + step * direction).double() - remote(rows - step * direction).double()
    want = float((difference * upstream).sum()) / (2 * step)
    assert rows.grad is not None
    assert float((rows.grad * direction).sum()) == pytest.approx(want, rel=2e-3, abs=1e-4)


def test_a_model_around_remote_experts_learns(world: World) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(RemoteExpert(world.swarm, world.dense, LAYER, [0, 1]), nn.Linear(world.dense.hidden, 1))
    before = nn.Linear(world.dense.hidden, world.dense.hidden)
    rows, wanted = make_rows(world.dense, 8).detach(), torch.ones(8, 1)
    optimizer = torch.optim.Adam([*before.parameters(), *model.parameters()], lr=0.01)
    losses: list[float] = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(before(rows)), wanted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert before.weight.grad is not None and before.weight.grad.abs().max() > 0


def test_hosts_are_asked_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    call, asked, all_asked = world.swarm._call, list[str](), trio.Event()

    async def wait_for_the_other(plan: Any, peer: Any, *rest: Any) -> Any:
        asked.append(peer)
        if len(asked) == 2:
            all_asked.set()
        with trio.fail_after(30):
            await all_asked.wait()
        return await call(plan, peer, *rest)

    monkeypatch.setattr(world.swarm, "_call", wait_for_the_other)
    rows = make_rows(world.moe, 4)
    index = torch.tensor([[0, 7]] * 4)
    RemoteExpert(world.swarm, world.moe, LAYER)(rows, index, torch.ones(4, 2))
    assert sorted(asked) == sorted(world.peers[1:])


def test_one_peer_can_be_named(world: World) -> None:
    _, b, c = world.peers
    rows = make_rows(world.moe, 2).detach()
    shared = [RemoteExpert(world.swarm, world.moe, LAYER, [4], peer=peer)(rows) for peer in (b, c)]
    assert torch.equal(*shared)
    with pytest.raises(NoPeerCouldServe):
        RemoteExpert(world.swarm, world.moe, LAYER, [0], peer=c)(rows)


def test_what_does_not_fit_is_said_at_once(world: World) -> None:
    with pytest.raises(LocalProtocolError, match="there are 8 experts"):
        RemoteExpert(world.swarm, world.moe, LAYER, [8])
    remote = RemoteExpert(world.swarm, world.moe, LAYER, [1])
    rows = make_rows(world.moe, 2)
    with pytest.raises(LocalProtocolError, match="last size"):
        remote(rows[:, 1:])
    with pytest.raises(LocalProtocolError, match="go together"):
        remote(rows, torch.ones(2, 1))
    with pytest.raises(LocalProtocolError, match="of shapes"):
        remote(rows, torch.ones(2, 2), torch.ones(2, 1))
    with pytest.raises(LocalProtocolError, match=r"names experts \[3\]"):
        remote(rows, torch.full((2, 1), 3), torch.ones(2, 1))
    with pytest.raises(LocalProtocolError, match="no index"):
        RemoteExpert(world.swarm, world.dense, LAYER)(make_rows(world.dense, 1), torch.ones(1, 1), torch.ones(1, 1))


def test_a_closed_swarm_says_so(world: World) -> None:
    contact = world.swarm.find_hosts(world.dense, "f32").contacts
    with open_swarm([next(iter(contact.values())).addrs[0]]) as swarm:
        remote = RemoteExpert(swarm, world.dense, LAYER)
    with pytest.raises(DaaswarmError, match="was closed"):
        remote(make_rows(world.dense, 1))


@pytest.fixture
def example() -> ModuleType:
    """``examples/train.py``."""
    path = Path(__file__).resolve().parents[2] / "examples" / "train.py"
    spec = importlib.util.spec_from_file_location("train_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_trains_around_both_kinds(world: World, example: ModuleType) -> None:
    contacts = world.swarm.find_hosts(world.dense, "f32").contacts
    address = next(iter(contacts.values())).addrs[0]
    for model in (world.dense, world.moe):
        losses = example.train(address, str(model.folder))
        assert losses[-1] < losses[0]


def test_backward_goes_to_another_replica_where_one_dies(world: World) -> None:
    remote = RemoteExpert(world.swarm, world.moe, LAYER, [4])
    rows = make_rows(world.moe, 2)
    outs = [remote(rows) for _ in range(8)]  # by chance of one host or the other
    world.last.stop(signal.SIGKILL)
    gradients = [torch.autograd.grad(out.sum(), rows)[0] for out in outs]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    alone = RemoteExpert(world.swarm, world.moe, LAYER, [4], peer=world.peers[2])
    with pytest.raises(DaaswarmError):
        alone(rows)
