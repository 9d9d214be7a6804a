"""What transformers and its readers raise on files that they can make nothing of. They have no class for it."""

from __future__ import annotations

import struct

from huggingface_hub.errors import StrictDataclassError

REFUSALS = (
    ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError, ArithmeticError, AssertionError,
    MemoryError, ImportError, struct.error, StrictDataclassError,
)  # fmt: skip
"""RuntimeError includes RecursionError and NotImplementedError, ArithmeticError overflow and division by zero."""


def first_line(error: BaseException) -> str:
    """What it says, in one printable line of at most 200 characters."""
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return "".join(c if c.isprintable() else "?" for c in said.strip())[:200]
