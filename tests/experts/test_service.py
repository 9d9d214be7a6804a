"""What a host answers and what it refuses, with real tensors and tiny layers."""

from __future__ import annotations

import gc
import struct
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
import trio
from msgspec.structs import replace

from daaswarm.errors import Busy, ConfigError, ExpertError, RemoteProtocolError, TooLarge
from daaswarm.experts import service as service_module
from daaswarm.experts.service import CALL_ROWS, INLINE_PAIRS, INLINE_ROWS, ExpertService, HostedModel
from daaswarm.inference.swarm_experts import as_bytes
from daaswarm.messages import ExpertCall, ExpertReply, Request, encode, get_decoder
from daaswarm.types import ModelRoot, PeerId

ROOT = ModelRoot("ab" * 32)
HIDDEN = 3
ME, YOU = PeerId("me"), PeerId("you")


class ScaledLayer:
    """Expert ``i`` multiplies its row by ``i + 1``; so does slice ``i``."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.nbytes = 4 * len(ids)
        self.threads: list[int] = []
        self.gate: threading.Event | None = None

    def compute_pairs(
        self, rows: torch.Tensor, row_index: torch.Tensor, expert_index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        self._note()
        out = torch.zeros(rows.shape, dtype=torch.float32)
        scale = weights * (expert_index + 1)
        return out.index_add_(0, row_index, rows.float()[row_index] * scale[:, None])

    def compute_slices(self, rows: torch.Tensor, slices: list[int]) -> torch.Tensor:
        self._note()
        return rows.float() * sum(i + 1 for i in slices)

    def _note(self) -> None:
        self.threads.append(threading.get_ident())
        if self.gate is not None:
            assert self.gate.wait(10)


def make_service(kind: str, dtype: str = "f32", ids: list[int] | None = None) -> tuple[ExpertService, ScaledLayer]:
    service = ExpertService()
    layer = ScaledLayer([0, 1, 5] if ids is None else ids)
    service.add(HostedModel(ROOT, "tiny", kind, HIDDEN, dtype, {2: layer}))  # type: ignore[arg-type]
    return service, layer


def make_call(
    rows: torch.Tensor, pairs: list[tuple[int, int, float]] | None = None, experts: list[int] | None = None
) -> tuple[ExpertCall, memoryview]:
    dtype = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[rows.dtype]
    body = bytearray(as_bytes(rows))
    for i, form in enumerate("IIf"):
        body += struct.pack(f"<{len(pairs or [])}{form}", *(pair[i] for pair in pairs or []))
    call = ExpertCall(
        model_root=ROOT,
        layer=2,
        experts=experts or sorted({pair[1] for pair in pairs or []}) or [0, 1],
        dtype=dtype,
        rows=rows.shape[0],
        hidden=rows.shape[1],
        pairs=len(pairs or []),
    )
    return call, memoryview(body)


def read(reply: ExpertReply, parts: object) -> torch.Tensor:
    body = bytearray().join(parts)  # type: ignore[arg-type]
    return torch.frombuffer(body, dtype=torch.float32).view(reply.rows, reply.hidden)


ROWS = torch.arange(1.0, 7.0).view(2, HIDDEN)


def test_modules_are_no_longer_searched_for_garbage() -> None:
    make_service("dense")
    assert gc.get_freeze_count() > 10_000  # torch's alone are more


def test_slices_are_summed() -> None:
    service, _ = make_service("dense")
    call, body = make_call(ROWS, experts=[0, 5])
    answer = service.serve_inline(ME, call, body)
    assert answer is not None
    assert torch.equal(read(*answer), ROWS * 7)
    assert answer[0].queue_depth == 0 and answer[0].service_us >= 0
    model = service.models[ROOT, "f32"]
    assert (model.calls, model.rows) == (1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pairs_are_weighted_and_added(dtype: torch.dtype) -> None:  # an odd row is not aligned to the numbers after it
    service, _ = make_service("moe", {torch.float32: "f32", torch.bfloat16: "bf16"}.get(dtype, "f16"))
    for rows in (ROWS[:1], ROWS):
        last = len(rows) - 1
        call, body = make_call(rows.to(dtype), [(0, 0, 0.5), (0, 5, 2.0), (last, 1, 1.0)])
        answer = service.serve_inline(ME, call, body)
        assert answer is not None
        expected = torch.zeros(rows.shape)
        expected[0] += rows[0] * (0.5 * 1 + 2.0 * 6)
        expected[last] += rows[last] * 2
        assert torch.equal(read(*answer), expected)


def test_weights_may_be_anything() -> None:
    service, _ = make_service("moe")
    call, body = make_call(ROWS, [(0, 0, float("nan")), (1, 1, float("-inf"))])
    answer = service.serve_inline(ME, call, body)
    assert answer is not None
    sums = read(*answer)
    assert sums[0].isnan().all() and (sums[1] == float("-inf")).all()


def test_large_calls_are_left_to_the_thread() -> None:
    service, layer = make_service("moe")
    many = torch.ones(INLINE_ROWS + 1, HIDDEN)
    assert service.serve_inline(ME, *make_call(many, [(0, 0, 1.0)])) is None
    assert service.serve_inline(ME, *make_call(ROWS, [(0, 0, 1.0)] * (INLINE_PAIRS + 1))) is None
    layer.nbytes = 3 << 30
    assert service.serve_inline(ME, *make_call(ROWS, [(0, 0, 1.0)])) is None
    assert layer.threads == []


def test_what_a_call_announces_bounds_what_is_computed_inline() -> None:
    service, layer = make_service("moe")
    layer.nbytes = 3 * service_module.INLINE_BYTES  # one expert is all that may be touched
    assert service.serve_inline(ME, *make_call(ROWS, [(0, 0, 1.0)])) is not None
    call, body = make_call(ROWS, [(0, 0, 1.0), (0, 1, 1.0), (1, 5, 1.0)], experts=[0])
    with pytest.raises(RemoteProtocolError, match="outside the call"):
        service.serve_inline(ME, call, body)
    # Nor may one expert be named once for each of 256 pairs.
    assert service.serve_inline(ME, *make_call(ROWS, [(0, 0, 1.0)] * INLINE_ROWS)) is not None
    assert service.serve_inline(ME, *make_call(ROWS, [(0, 0, 1.0)] * (INLINE_ROWS + 1))) is None
    assert len(layer.threads) == 2


def test_a_layer_that_is_being_removed_is_not_held() -> None:
    for lacking in ("layers", "ids"):
        service, _ = make_service("dense")
        getattr(service.models[ROOT, "f32"], lacking).pop(2)
        with pytest.raises(ExpertError, match="layer 2: experts 0-1 are not held"):
            service.compute(*make_call(ROWS))


MALFORMED = [
    ("dense", {"model_root": "cd" * 32}, ExpertError, "is not held here"),
    ("dense", {"dtype": "f16"}, ExpertError, "in f16 is not held"),
    ("dense", {"layer": 3}, ExpertError, "layer 3: experts 0-1 are not held"),
    ("dense", {"experts": [0, 2, 3]}, ExpertError, "experts 2-3 are not held"),
    ("dense", {"rows": 1}, RemoteProtocolError, "don't fit"),
    ("dense", {"rows": CALL_ROWS}, RemoteProtocolError, "don't fit"),
    ("dense", {"rows": CALL_ROWS + 1}, TooLarge, "4097 rows; 4096 are allowed"),
    ("dense", {"experts": [0, 1, 0]}, RemoteProtocolError, "an expert twice"),
    ("moe", {"experts": [0, 0, 1]}, RemoteProtocolError, "an expert twice"),
    ("dense", {"hidden": 2, "rows": 3}, RemoteProtocolError, "of width 3"),
    ("dense", {"pairs": 1}, RemoteProtocolError, "don't fit a dense model"),
    ("moe", {"pairs": 0}, RemoteProtocolError, "don't fit a moe model"),
    ("moe", {"pairs": 1 << 22}, RemoteProtocolError, "don't fit"),
    ("moe", {"pairs": 3}, RemoteProtocolError, "don't fit"),
]


@pytest.mark.parametrize(("kind", "change", "error", "said"), MALFORMED)
async def test_malformed_calls(kind: str, change: dict[str, Any], error: type[Exception], said: str) -> None:
    service, layer = make_service(kind)
    call, body = make_call(ROWS, [(0, 0, 1.0), (1, 1, 1.0)] if kind == "moe" else None)
    call = replace(call, **change)
    with pytest.raises(error, match=said) as info:
        service.serve_inline(ME, call, body)
    assert not getattr(info.value, "reject", False)  # a mistake; the connection stays
    with pytest.raises(error, match=said):
        await service.serve(ME, call, body, 5.0)
    with pytest.raises(error, match=said):
        service.compute(call, body)
    assert layer.threads == []


def test_a_body_that_is_too_short_or_too_long() -> None:
    service, _ = make_service("dense")
    call, body = make_call(ROWS)
    for wrong in (body[:-1], body[:0], memoryview(bytearray(bytes(body) + b"\0"))):
        with pytest.raises(RemoteProtocolError, match="don't fit"):
            service.serve_inline(ME, call, wrong)
    assert service.serve_inline(ME, call, body) is not None


@pytest.mark.parametrize("pair", [(2, 0, 1.0), (0xFFFFFFFF, 0, 1.0), (0, 2, 1.0), (0, 0xFFFFFFFF, 1.0), (0, 6, 1.0)])
def test_a_pair_that_names_what_is_not_there(pair: tuple[int, int, float]) -> None:
    service, layer = make_service("moe")
    call, body = make_call(ROWS, [(0, 0, 1.0), pair], experts=[0])
    with pytest.raises(RemoteProtocolError, match="outside the call"):
        service.serve_inline(ME, call, body)
    assert layer.threads == []


def test_more_pairs_than_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "PAIRS_BYTES", 4 * HIDDEN * 4)
    service, _ = make_service("moe")
    assert service.serve_inline(ME, *make_call(ROWS, [(0, 0, 1.0)] * 4)) is not None
    with pytest.raises(TooLarge, match="5 pairs; 4 of this width"):
        service.serve_inline(ME, *make_call(ROWS, [(0, 0, 1.0)] * 5))


def test_the_wire_allows_neither_zero_rows_nor_zero_experts() -> None:
    changes: list[dict[str, Any]] = [{"rows": 0}, {"experts": []}, {"hidden": 0}, {"rows": -1}, {"pairs": 1 << 23}]
    for change in changes:
        with pytest.raises(msgspec.ValidationError):
            get_decoder(Request).decode(encode(replace(make_call(ROWS)[0], **change)))


# -- the queue ----------------------------------------------------------------------------------------------------


@pytest.fixture
def blocked() -> Iterator[tuple[ExpertService, ScaledLayer]]:
    """A service whose layer computes only when its gate is open."""
    service, layer = make_service("dense")
    layer.gate = threading.Event()
    yield service, layer
    layer.gate.set()


async def test_a_queued_call_is_computed_in_another_thread() -> None:
    service, layer = make_service("dense")
    rows = torch.ones(64, HIDDEN)
    call, body = make_call(rows, experts=[1])
    reply, parts = await service.serve(ME, call, body, 5.0)
    assert torch.equal(read(reply, parts), rows * 2)
    assert layer.threads and layer.threads[0] != threading.get_ident()


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
async def test_blocks_give_the_same_sums(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows))
    pairs = [(row, expert, 0.5 + row + expert) for expert in (5, 0, 1) for row in range(0, rows, 2)] + [(0, 0, 1.0)] * 4
    wanted = [make_service("dense")[0].compute(*make_call(values))]
    wanted.append(make_service("moe")[0].compute(*make_call(values, pairs)))
    monkeypatch.setattr(service_module, "BLOCK_ROWS", 2)
    monkeypatch.setattr(service_module, "BLOCK_PAIRS", 3)
    for kind, whole in zip(("dense", "moe"), wanted, strict=True):
        service, layer = make_service(kind)
        call, body = make_call(values, pairs if kind == "moe" else None)
        torch.testing.assert_close(read(*await service.serve(ME, call, body, 5.0)), read(*whole))
        assert len(layer.threads) >= (rows + 1) // 2


@pytest.mark.parametrize("kind", ["dense", "moe"])
async def test_a_call_given_up_ends_within_a_block(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "BLOCK_ROWS", 2)
    service, layer = make_service(kind)
    layer.gate = threading.Event()
    call, body = make_call(torch.ones(64, HIDDEN), [(row, 0, 1.0) for row in range(64)] if kind == "moe" else None)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.serve, ME, call, body, 30.0)
            while not layer.threads:  # noqa: ASYNC110 - a thread sets it
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
            layer.gate.set()
    assert len(layer.threads) == 1
    await service.serve(ME, *make_call(ROWS, [(0, 0, 1.0)] if kind == "moe" else None), 5.0)


async def test_trios_own_threads_may_all_be_taken() -> None:
    service, _ = make_service("dense")
    limiter = trio.to_thread.current_default_thread_limiter()
    borrowers = [object() for _ in range(int(limiter.available_tokens))]
    for borrower in borrowers:
        limiter.acquire_on_behalf_of_nowait(borrower)
    try:
        with trio.fail_after(5):
            await service.serve(ME, *make_call(ROWS), 5.0)
    finally:
        for borrower in borrowers:
            limiter.release_on_behalf_of(borrower)


async def test_one_at_a_time_and_peers_take_turns(blocked: tuple[ExpertService, ScaledLayer]) -> None:
    service, layer = blocked
    order: list[PeerId] = []

    async def ask(peer: PeerId, experts: list[int]) -> None:
        await service.serve(peer, *make_call(ROWS, experts=experts), 30.0)
        order.append(peer)

    unlike = [[0], [1], [5], [0, 1], [0, 5], [1, 5]]  # so that none is computed with another
    async with trio.open_nursery() as nursery:
        for peer, experts in zip((ME, ME, ME, ME, YOU, YOU), unlike, strict=True):
            nursery.start_soon(ask, peer, experts)
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert len(layer.threads) == 1
        assert service._admission.queue_depth == 5
        assert layer.gate is not None
        layer.gate.set()
    assert order == [ME, ME, YOU, ME, YOU, ME]
    service._admission.validate()


async def test_busy_names_when_to_come_back(
    blocked: tuple[ExpertService, ScaledLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, layer = blocked
    monkeypatch.setattr(service._admission, "_calls_per_peer", 2)
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(service.serve, ME, *make_call(ROWS), 30.0)
            await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(Busy, match="2 calls of this peer") as info:
            await service.serve(ME, *make_call(ROWS), 30.0)
        assert info.value.retry_after_s > 0
        monkeypatch.setattr("daaswarm.experts.service.INLINE_BYTES", 0)
        with pytest.raises(Busy, match="2 calls of this peer"):  # without a task
            service.serve_inline(ME, *make_call(ROWS), 30.0)
        assert service.serve_inline(YOU, *make_call(ROWS), 30.0) is None
        nursery.start_soon(service.serve, YOU, *make_call(ROWS), 30.0)  # another peer still gets in
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert layer.gate is not None
        layer.gate.set()
    await service.serve(ME, *make_call(ROWS), 30.0)
    service._admission.validate()


async def test_giving_up_frees_the_place(blocked: tuple[ExpertService, ScaledLayer]) -> None:
    service, layer = blocked
    assert layer.gate is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.serve, ME, *make_call(ROWS), 30.0)
        await trio.testing.wait_all_tasks_blocked(0.01)
        with trio.move_on_after(0):
            await service.serve(YOU, *make_call(ROWS), 30.0)
        assert service._admission.queue_depth == 0
        layer.gate.set()
    assert len(layer.threads) == 1
    await service.serve(YOU, *make_call(ROWS), 30.0)


async def test_a_failing_layer_frees_the_place() -> None:
    class Failing(ScaledLayer):
        def compute_slices(self, rows: torch.Tensor, slices: list[int]) -> torch.Tensor:
            raise ExpertError("out of memory")

    service = ExpertService()
    service.add(HostedModel(ROOT, "tiny", "dense", HIDDEN, "f32", {2: Failing([0, 1])}))
    for _ in range(3):
        with pytest.raises(ExpertError, match="out of memory"):
            await service.serve(ME, *make_call(ROWS), 5.0)
    service._admission.validate()
    assert service._admission.queue_depth == 0


# -- what is served -----------------------------------------------------------------------------------------------


def make_model(layers: list[int], dtype: str = "f32") -> HostedModel:
    return HostedModel(ROOT, "tiny", "dense", HIDDEN, dtype, {n: ScaledLayer([0, 1]) for n in layers})  # type: ignore[arg-type]


def test_layers_of_one_model_come_and_go() -> None:
    service = ExpertService()
    service.add(make_model([0, 1]))
    service.add(make_model([2]))
    served = service.models[ROOT, "f32"]
    assert sorted(served.layers) == [0, 1, 2] and served.nbytes == 24
    service.remove(ROOT, "f32", [0, 1])
    assert sorted(service.models[ROOT, "f32"].layers) == [2]
    assert service.serve_inline(ME, *make_call(ROWS)) is not None
    with pytest.raises(ExpertError, match="layer 0"):
        service.serve_inline(ME, replace(make_call(ROWS)[0], layer=0), make_call(ROWS)[1])
    service.remove(ROOT, "f32", [2])
    assert service.models == {}
    service.remove(ROOT, "f32", [2])  # nothing to do


def test_a_layer_is_served_once_and_in_one_dtype() -> None:
    service = ExpertService()
    service.add(make_model([0, 1]))
    with pytest.raises(ConfigError, match="layers 1, already"):
        service.add(make_model([1, 2]))
    with pytest.raises(ConfigError, match="in f32 already"):
        service.add(make_model([5], "bf16"))
    assert sorted(service.models[ROOT, "f32"].layers) == [0, 1]
