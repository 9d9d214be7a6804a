"""What transformers has to say reaches the terminal only if it is an error."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from daaswarm.models.manifest_file import MANIFEST_NAME
from daaswarm.models.sources import find_model
from daaswarm.models.trunk import load_tokenizer
from tests.byte_tokenizer import add_tokenizer


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Messages of transformers' loggers, which warn at first as they do in a new process."""
    records: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    logger, handler, before = logging.getLogger("transformers"), Handler(), transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    transformers_logging.set_verbosity(before)


def test_warnings_are_silent_and_errors_are_not(
    tiny: Callable[[str], Path], tmp_path: Path, said: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny("llama"), folder)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    tokenizer = load_tokenizer(find_model(str(add_tokenizer(folder)), tmp_path))
    assert tokenizer is not None
    tokenizer.model_max_length = 4
    assert len(tokenizer("longer than four tokens")["input_ids"]) > 4
    assert said == []
    warnings.warn_explicit("of theirs", UserWarning, "x.py", 1, module="transformers.generation.utils")
    assert not recwarn.list
    logging.getLogger("transformers.modeling_utils").error("a real one")
    assert said == ["a real one"]
