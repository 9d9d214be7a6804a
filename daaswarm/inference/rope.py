"""Rotary frequencies that depend on the length of the text, for several answers that share one trunk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

CHANGING = ("dynamic", "longrope")  # rope types that transformers' ``dynamic_rope_update`` recomputes in ``forward``

Ropes = dict[nn.Module, nn.Module]
"""One answer's own copies of its trunk's changing rope modules."""


def separate_ropes(model: nn.Module, get_ropes: Callable[[], Ropes]) -> None:
    """Have each answer use rope modules of its own.

    These types write the frequencies for the text at hand into the module, and "dynamic" keeps those of the longest
    text it has met. Shared, answers of different lengths would compute with each other's: two at once, and also one
    after another.

    Args:
        get_ropes: the copies of the answer that is being computed; empty for a new one.
    """
    for module in model.modules():
        if _is_changing(module):
            module.forward = _make_forward(module, get_ropes)


def has_changing_ropes(model: nn.Module) -> bool:
    """Whether a token's place is encoded differently in texts of different lengths."""
    return any(_is_changing(module) for module in model.modules())


def _is_changing(module: nn.Module) -> bool:
    kind: Any = getattr(module, "rope_type", None)  # a string, or one for each type of layer
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    return any(isinstance(one, str) and any(name in one for name in CHANGING) for one in kinds)


def _make_forward(module: nn.Module, get_ropes: Callable[[], Ropes]) -> Callable[..., tuple[Tensor, Tensor]]:
    pristine = copy.deepcopy(module)

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        ropes = get_ropes()
        rope = ropes.get(module)
        if rope is None:
            rope = ropes[module] = copy.deepcopy(pristine)
        return rope(*args, **kwargs)

    return forward
