"""Calls whose rows or sums come in a codec: what a host computes of them, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import trio
from msgspec.structs import replace

from daaswarm.errors import ExpertError, RemoteProtocolError
from daaswarm.messages import ExpertCall
from daaswarm.models.codecs import decode, encode
from daaswarm.types import CODECS
from tests.experts.test_service import HIDDEN, ME, ROWS, make_call, make_service, read


def encode_call(call: ExpertCall, body: memoryview, rows: torch.Tensor, codec: str) -> tuple[ExpertCall, memoryview]:
    coded = encode(rows, codec)
    assert coded is not None
    return replace(call, codec=codec), memoryview(bytearray(coded) + body[rows.nbytes :])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_rows_and_sums(codec: str, kind: str) -> None:
    service, _ = make_service(kind)
    pairs = [(0, 1, 1.0), (1, 0, 1.0)] if kind == "moe" else None
    call, body = encode_call(*make_call(ROWS, pairs), ROWS, codec)
    answer = service.serve_inline(ME, call, body)
    assert answer is not None and answer[0].codec == ""  # f32 unless asked otherwise
    wanted = ROWS * torch.tensor([[2.0], [1.0]]) if pairs else ROWS * 3
    torch.testing.assert_close(read(*answer), wanted, rtol=0.004, atol=0.05)
    answer = service.serve_inline(ME, replace(call, reply_codec=codec), body)
    assert answer is not None and answer[0].codec == codec
    sums = decode(bytearray().join(answer[1]), codec, 2, HIDDEN, torch.float32)
    torch.testing.assert_close(sums, wanted, rtol=0.008, atol=0.15)


def test_sums_that_the_codec_cannot_say_come_as_they_are() -> None:
    service, _ = make_service("dense")
    call, body = make_call(ROWS * 1e5)
    answer = service.serve_inline(ME, replace(call, reply_codec="f16"), body)
    assert answer is not None and answer[0].codec == ""
    assert torch.equal(read(*answer), ROWS * 1e5 * 3)


async def test_calls_of_several_callers_each_in_its_own_codec() -> None:
    service, _ = make_service("dense")
    answers = {}

    async def ask(codec: str) -> None:
        call, body = make_call(ROWS)
        if codec:
            call, body = encode_call(replace(call, reply_codec=codec), body, ROWS, codec)
        answers[codec] = await service.serve(ME, call, body, 10.0)

    async with trio.open_nursery() as nursery:
        for codec in ("", *CODECS):
            nursery.start_soon(ask, codec)
    assert torch.equal(read(*answers.pop("")), ROWS * 3)
    for codec, (reply, parts) in answers.items():
        assert reply.codec == codec
        sums = decode(bytearray().join(parts), codec, 2, HIDDEN, torch.float32)
        torch.testing.assert_close(sums, ROWS * 3, rtol=0.008, atol=0.15)


def test_an_unknown_codec_is_refused_by_name() -> None:
    service, _ = make_service("dense")
    call, body = make_call(ROWS)
    for changes in ({"codec": "zstd"}, {"reply_codec": "none"}):
        with pytest.raises(ExpertError, match="is not taken here: known are f16, bf16, int8") as info:
            service.serve_inline(ME, replace(call, **changes), body)
        assert info.value.hint == "ask without a codec"
    with pytest.raises(ExpertError, match="gradients travel without a codec"):
        service.serve_inline(ME, replace(call, reply_codec="f16", grad=True), body)


def test_rows_of_another_length_or_not_finite_are_refused() -> None:
    service, _ = make_service("dense")
    call, body = make_call(ROWS)
    with pytest.raises(RemoteProtocolError, match="don't fit"):  # f32's bytes
        service.serve_inline(ME, replace(call, codec="f16"), body)
    bad = memoryview(bytearray(torch.full((2, HIDDEN), torch.inf).half().numpy().tobytes()))
    with pytest.raises(RemoteProtocolError, match="not finite"):
        service.serve_inline(ME, replace(call, codec="f16"), bad)
