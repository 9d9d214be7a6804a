"""``bench moe`` over real processes and sockets, small."""

from __future__ import annotations

import torch

from daaswarm.bench.moe import MoeLayer, Requests, place
from daaswarm.errors import NoPeerCouldServe
from tests.e2e.processes import run_json

SMALL = ["--hosts", "2", "--replicas", "2", "--experts", "3", "--k", "2", "--dim", "16", "--dead", "0.5"]


def test_no_request_fails_when_a_host_falls_silent() -> None:
    done = run_json("bench", "moe", *SMALL, "--how", "stop", "--seconds", "0.3")
    assert done["gone"] == 1
    for phase in (done["healthy"], done["after"]):
        assert phase["calls"] > 0 and phase["failed"] == phase["wrong"] == phase["regated"] == 0, phase


def test_an_expert_that_nobody_has_is_chosen_no_more() -> None:
    check = MoeLayer(8, [0, 1, 2, 3])

    def answer(layer: int, rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if gone := {int(expert) for expert in index.unique()} & {1}:
            raise NoPeerCouldServe("nobody has it", missing={layer: sorted(gone)})
        pairs = torch.arange(len(rows)).repeat_interleave(index.shape[1])
        return check.compute_pairs(rows, pairs, index.reshape(-1), weights.reshape(-1))

    done = Requests(answer, dim=8, experts=4, k=2, batch=3, seed=0).run(calls=20).describe(check)
    assert (done["calls"], done["failed"], done["wrong"], done["regated"]) == (20, 0, 0, 1)
    assert Requests(answer, dim=8, experts=4, k=4, batch=3, seed=0).run(calls=3).describe(check)["failed"] == 3


def test_each_expert_is_on_as_many_hosts_as_asked() -> None:
    placed = place(20, 10, 4)
    assert all(len(held) == 8 for held in placed)
    assert all(sum(expert in held for held in placed) == 4 for expert in range(20))
    assert all(place(3, 5, 3))


def test_a_layer_sums_weighted_experts() -> None:
    layer = MoeLayer(8, [1, 3])
    rows = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    sums = layer.compute_pairs(rows, torch.tensor([0, 0, 1]), torch.tensor([1, 3, 3]), torch.tensor([0.5, 2.0, 1.0]))
    first, third = (MoeLayer(8, [e]) for e in (1, 3))

    def alone(one: MoeLayer, row: int) -> torch.Tensor:
        expert = torch.tensor([one.ids[0]])
        return one.compute_pairs(rows[row : row + 1], torch.tensor([0]), expert, torch.tensor([1.0]))[0]

    torch.testing.assert_close(sums[0], 0.5 * alone(first, 0) + 2.0 * alone(third, 0))
    torch.testing.assert_close(sums[1], alone(third, 1))
