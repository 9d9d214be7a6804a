"""Where this process computes: on its processor, or on one of its GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from daaswarm.errors import ConfigError


def choose_device(wish: str, *, key: str) -> torch.device:
    """The device that a setting names: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``, the first GPU if there is one.

    Args:
        key: the setting, for messages.

    Raises:
        ConfigError: there is no such GPU here, or this build of torch can't use it.
    """
    kind, _, number = wish.partition(":")
    if kind not in ("cpu", "cuda", "auto") or (number and kind != "cuda") or not (number or "0").isdecimal():
        raise ConfigError(f"{key} = {wish!r} is not a device", hint="choose cpu, auto, cuda, or cuda:1 for the second")
    count = 0 if kind == "cpu" else torch.cuda.device_count()
    if kind == "cpu" or (kind == "auto" and not count):
        return torch.device("cpu")
    if not count:
        build = "" if torch.version.cuda or torch.version.hip else ": this build of torch is for processors alone"
        raise ConfigError(f"{key} = {wish!r}: there is no GPU that torch can use{build}", hint=f"set {key} to cpu")
    index = int(number or 0)
    if index >= count:
        raise ConfigError(f"{key} = {wish!r}: this machine has {count}, numbered from 0", hint=f"set {key} to cuda:0")
    return torch.device("cuda", index)


@contextlib.contextmanager
def explaining_full(device: torch.device, key: str) -> Iterator[None]:
    """Raises:
    ConfigError: what the block moves to a GPU doesn't fit there.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise ConfigError(f"the memory of {device} is full", hint=f"move less there, or set {key} to cpu") from None


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of the processor's memory, on a device. A GPU fetches it by itself, in the order of its stream."""
    if device.type == "cpu":
        return tensor.to(dtype)
    # torch keeps pinned memory for the next call, once the stream is through with it.
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor).to(device, non_blocking=True).to(dtype)


def to_host(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in the processor's memory, contiguous; waits for what computes it."""
    if tensor.device.type == "cpu":
        return tensor.to(dtype).contiguous()
    here = torch.empty(tensor.shape, dtype=dtype, pin_memory=True).copy_(tensor.to(dtype), non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return here
