"""What several rooms' tests share: tiny checkpoints that can be asked in words, and a cache of their own."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

# Where a shell started the tests in the background, or under nohup, these are ignored, and so they would be in every
# process that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands for the user's cache of models."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts with a tokenizer: 3 layers of 8 experts. Copy it to change it."""
    return make_checkpoint("olmoe", tmp_path_factory.mktemp("olmoe") / "tiny-olmoe")


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model with a tokenizer: 4 layers of 8 slices or fewer. Copy it to change it."""
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama") / "tiny-llama")


def make_checkpoint(architecture: str, folder: Path) -> Path:
    from daaswarm.testing.checkpoints import make_tiny_checkpoint
    from tests.byte_tokenizer import add_tokenizer

    return add_tokenizer(make_tiny_checkpoint(architecture, folder))
