"""What a host says of a call that it opened, as the wire has it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from daaswarm.errors import RemoteProtocolError
from daaswarm.messages import ExpertCall, ExpertReply
from daaswarm.models.tensors import COMPUTE_DTYPES
from daaswarm.types import DTYPE_BYTES

ACTIVATIONS = 3  # gate, up, hidden


class OpenedReply(NamedTuple):
    """As the wire has it. ``opened``: three, and with pairs a fourth: the outputs."""

    sums: Tensor
    opened: list[Tensor]


def read_opened(call: ExpertCall, reply: ExpertReply, body: memoryview) -> OpenedReply:
    """What a host says.

    Raises:
        RemoteProtocolError: the body isn't what was asked for.
    """
    count, width = call.pairs or call.rows, reply.width
    size, sums_bytes = DTYPE_BYTES[call.dtype], 4 * call.rows * call.hidden
    widths = [width] * ACTIVATIONS + ([call.hidden] if call.pairs else [])
    if (reply.rows, reply.hidden) != (call.rows, call.hidden) or not width or reply.codec:
        raise RemoteProtocolError("an opened expert reply has another shape than was due")
    if len(body) != sums_bytes + size * count * sum(widths):
        raise RemoteProtocolError(f"an opened expert reply has {len(body)} bytes, not what its shape says")
    sums = torch.frombuffer(body, dtype=torch.float32, count=call.rows * call.hidden).view(call.rows, call.hidden)
    at, opened = sums_bytes, []
    for wide in widths:
        values = torch.frombuffer(body, dtype=COMPUTE_DTYPES[call.dtype], offset=at, count=count * wide)
        opened.append(values.view(count, wide))
        at += size * count * wide
    return OpenedReply(sums, opened)
