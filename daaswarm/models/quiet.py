"""Keep transformers from drawing its own progress bars and warnings over ours."""

from __future__ import annotations

import warnings

from transformers.utils import logging


def silence_transformers() -> None:
    """From now on transformers logs errors only, and draws no progress bars.

    For good and not only while a model loads: it also warns while it encodes and generates, for example of a prompt
    longer than the tokenizer's own limit, which the node checks itself. Levels restored by one thread would undo
    those of another that is loading too.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"transformers(\.|$)")
