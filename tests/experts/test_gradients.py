"""What a host answers to gradient calls and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import trio
from msgspec.structs import replace
from torch import Tensor

from daaswarm.core.admission import Admission
from daaswarm.errors import ExpertError, RemoteProtocolError
from daaswarm.experts.gradients import GRADIENT_COST, GRADIENT_PAIRS, GRADIENT_ROWS
from daaswarm.experts.service import ExpertService, HostedModel
from daaswarm.inference.swarm_experts import as_bytes
from daaswarm.messages import ExpertCall
from daaswarm.models.dense import ACTIVATIONS, DenseSlices
from daaswarm.models.experts import LayerExperts
from daaswarm.types import ModelRoot, PeerId

ROOT = ModelRoot("ab" * 32)
HIDDEN, WIDTH, SLICES = 6, 4, 3
ME = PeerId("me")
IDS = (0, 1, 5)


class PairLayer:
    """Expert ``i`` is ``tanh(row) * (i + 1)``."""

    def __init__(self) -> None:
        self.ids = list(IDS)
        self.nbytes = 12
        self.most_pairs = 0

    def compute_pairs(self, rows: Tensor, row_index: Tensor, expert_index: Tensor, weights: Tensor) -> Tensor:
        return self.compute_pairs_with_graph(rows, row_index, expert_index, weights)

    def compute_slices(self, rows: Tensor, slices: list[int]) -> Tensor:
        raise NotImplementedError

    def compute_pairs_with_graph(
        self, rows: Tensor, row_index: Tensor, expert_index: Tensor, weights: Tensor
    ) -> Tensor:
        self.most_pairs = max(self.most_pairs, len(weights))
        scale = weights * (expert_index + 1)
        return torch.zeros(rows.shape).index_add_(0, row_index, rows.float()[row_index].tanh() * scale[:, None])

    def compute_slices_with_graph(self, rows: Tensor, slices: list[int]) -> Tensor:
        raise NotImplementedError


class PlainLayer:
    """Offers no gradients."""

    def __init__(self) -> None:
        self.ids = list(IDS)
        self.nbytes = 12

    def compute_pairs(self, rows: Tensor, row_index: Tensor, expert_index: Tensor, weights: Tensor) -> Tensor:
        return rows.float()

    def compute_slices(self, rows: Tensor, slices: list[int]) -> Tensor:
        return rows.float()


def make_dense(activation: str) -> LayerExperts:
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, SLICES * WIDTH, HIDDEN, generator=generator)
    down = torch.randn(HIDDEN, SLICES * WIDTH, generator=generator)
    return LayerExperts([0, 1, 2], 0, moe=None, dense=DenseSlices([0, 1, 2], activation, gate, up, down))


def make_service(kind: str, layer: Any, dtype: Any = "f32") -> ExpertService:
    service = ExpertService()
    service.add(HostedModel(ROOT, "tiny", kind, HIDDEN, dtype, {2: layer}))
    return service


def make_call(
    rows: Tensor, upstream: Tensor, experts: list[int], pairs: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[ExpertCall, memoryview]:
    dtype = {torch.float32: "f32", torch.bfloat16: "bf16"}[rows.dtype]
    parts = [rows]
    if pairs is not None:
        parts += [pairs[0].to(torch.int32), pairs[1].to(torch.int32), pairs[2]]
    body = bytearray().join(as_bytes(part.detach()) for part in [*parts, upstream])
    count = 0 if pairs is None else len(pairs[0])
    call = ExpertCall(
        model_root=ROOT, layer=2, experts=experts, dtype=dtype, rows=len(rows), hidden=HIDDEN, pairs=count, grad=True
    )
    return call, memoryview(body)


def read(parts: Sequence[Any]) -> Tensor:
    return torch.frombuffer(bytearray().join(parts), dtype=torch.float32)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_has_its_gradient(activation: str) -> None:
    layer = make_dense(activation)
    rows, upstream = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))
    for slices in ([0, 1, 2], [0, 2]):
        _, answer = make_service("dense", layer).compute(*make_call(rows, upstream, slices))
        x = rows.double().requires_grad_()
        assert layer._dense is not None
        weights = layer._dense.gate_up.double()
        held = torch.tensor([s * WIDTH + i for s in slices for i in range(WIDTH)])
        gate, up = x @ weights[:, held], x @ weights[:, held + SLICES * WIDTH]
        ((ACTIVATIONS[activation](gate) * up) @ layer._dense.down.double()[held]).backward(upstream.double())
        assert x.grad is not None
        assert torch.allclose(read(answer).view(rows.shape).double(), x.grad, rtol=1e-4, atol=1e-4)


def test_blocks_of_rows_and_pairs_change_nothing() -> None:
    count = GRADIENT_ROWS + 3
    generator = torch.Generator().manual_seed(2)
    rows, upstream = torch.randn(2, count, HIDDEN, generator=generator)
    dense = make_dense("silu")
    _, answer = make_service("dense", dense).compute(*make_call(rows, upstream, [0, 1, 2]))
    x = rows.clone().requires_grad_()
    dense.compute_slices_with_graph(x, [0, 1, 2]).backward(upstream)
    assert x.grad is not None and torch.allclose(read(answer).view(x.shape), x.grad, atol=1e-5)

    pairs = 2 * GRADIENT_PAIRS + 1
    row_index = torch.randint(count, (pairs,), generator=generator)
    expert_index = torch.tensor(IDS)[torch.randint(3, (pairs,), generator=generator)]
    weights = torch.randn(pairs, generator=generator)
    layer = PairLayer()
    call = make_call(rows, upstream, [0, 1, 5], (row_index, expert_index, weights))
    _, answer = make_service("moe", layer).compute(*call)
    assert layer.most_pairs == GRADIENT_PAIRS
    x, w = rows.clone().requires_grad_(), weights.clone().requires_grad_()
    layer.compute_pairs_with_graph(x, row_index, expert_index, w).backward(upstream)
    assert x.grad is not None and w.grad is not None
    got = read(answer)
    assert torch.allclose(got[: x.numel()].view(x.shape), x.grad, atol=1e-5)
    assert torch.allclose(got[x.numel() :], w.grad, atol=1e-5)


def test_rows_of_another_dtype_get_f32_gradients() -> None:
    rows, upstream = torch.randn(1, HIDDEN).to(torch.bfloat16), torch.randn(1, HIDDEN)
    pair = torch.tensor([0]), torch.tensor([5]), torch.tensor([0.5])
    _, answer = make_service("moe", PairLayer(), "bf16").compute(*make_call(rows, upstream, [5], pair))
    got = read(answer)
    assert len(got) == HIDDEN + 1
    want = upstream * 3 * (1 - rows.float().tanh() ** 2)
    assert torch.allclose(got[:HIDDEN], want[0], rtol=0.02, atol=0.02)


def test_bodies_that_do_not_fit_are_refused() -> None:
    service = make_service("dense", make_dense("silu"))
    call, body = make_call(torch.ones(2, HIDDEN), torch.ones(2, HIDDEN), [0])
    for wrong in (body[:-4], body[: len(body) // 2], memoryview(bytes(body) + bytes(4))):
        with pytest.raises(RemoteProtocolError, match="don't fit"):
            service.compute(call, wrong)
    with pytest.raises(RemoteProtocolError, match="don't fit"):  # a forward call has no gradient
        service.compute(replace(call, grad=False), body)
    service = make_service("moe", PairLayer())
    for pair in ((2, 0), (0, 1)):
        index = torch.tensor([pair[0]]), torch.tensor([pair[1]]), torch.ones(1)
        with pytest.raises(RemoteProtocolError, match="outside the call"):
            service.compute(*make_call(torch.ones(2, HIDDEN), torch.ones(2, HIDDEN), [0], index))


def test_a_host_without_gradients_says_so() -> None:
    with pytest.raises(ExpertError, match="without gradients"):
        make_service("dense", PlainLayer()).compute(*make_call(torch.ones(1, HIDDEN), torch.ones(1, HIDDEN), [0]))


async def test_gradients_wait_in_the_queue_at_their_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    service = make_service("dense", make_dense("silu"))
    call, body = make_call(torch.ones(2, HIDDEN), torch.ones(2, HIDDEN), [0, 1])
    assert service.serve_inline(ME, call, body) is None
    works: list[int] = []
    admit = Admission.try_admit

    def note(self: Admission, peer: PeerId, work_rows: int, *args: Any, **kwargs: Any) -> Any:
        works.append(work_rows)
        return admit(self, peer, work_rows, *args, **kwargs)

    monkeypatch.setattr(Admission, "try_admit", note)
    with trio.fail_after(10):
        reply, answer = await service.serve(ME, call, body, 5.0)
    assert works == [2 * 2 * GRADIENT_COST]
    assert (reply.rows, reply.hidden) == (2, HIDDEN) and len(read(answer)) == 2 * HIDDEN
