"""The small files beside the weights: what a text means to a model is decided there, not in its tensors.

No torch, no transformers.
"""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

from daaswarm.errors import ModelError
from daaswarm.limits import MIB
from daaswarm.models.checkpoint import read_config

CONFIG_NAME = "config.json"
SMALL_FILE_BYTES = 256 * MIB  # of one such file; the largest tokenizers are 35 MB
TEMPLATES = 64  # files of additional_chat_templates; there is one for each use, as tools
_TEMPLATE_FOLDER = "additional_chat_templates"

VOCABULARIES = (
    "tokenizer.json",
    *("vocab.json", "vocab.txt", "merges.txt", "emoji.json", "normalizer.json", "byte_maps.json", "dict.txt"),
    *("vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json", "bpe.codes"),
    *("word_shape.json", "word_pronunciation.json", "prophetnet.tokenizer", "source.spm", "target.spm"),
    *("tokenizer.model", "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model"),
    *("spm_char.model", "tekken.json", "tiktoken.model"),
)
"""Every vocabulary file that a tokenizer of transformers reads; a test compares them with what it knows."""

FILES = (
    CONFIG_NAME,
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
    *VOCABULARIES,
)
"""What the model's root covers beside the tensors, where it exists."""


def has_tokenizer(folder: Path) -> bool:
    """Does this checkpoint say how text becomes tokens? Looks at names only."""
    return any((folder / name).is_file() for name in ("tokenizer_config.json", *VOCABULARIES))


def hash_files(folder: Path) -> dict[str, bytes]:
    """The SHA-256 of each file of :data:`FILES` and each chat template that the folder has.

    Raises:
        ModelError: no ``config.json``; a file that is too large, can't be read, or is no regular file.
    """
    digests = {CONFIG_NAME: hashlib.sha256(read_config(folder)).digest()}
    templates = sorted((folder / _TEMPLATE_FOLDER).glob("*.jinja"))
    if len(templates) > TEMPLATES:
        raise ModelError(f"{folder / _TEMPLATE_FOLDER} has {len(templates)} chat templates; {TEMPLATES} is the limit")
    for name in (*FILES[1:], *(f"{_TEMPLATE_FOLDER}/{path.name}" for path in templates)):
        path = folder / name
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ModelError(f"{path} can't be read: {error}", hint="check its permissions") from None
        if not stat.S_ISREG(found.st_mode):
            raise ModelError(f"{path} is no file", hint="download the checkpoint again")
        if found.st_size > SMALL_FILE_BYTES:
            raise ModelError(f"{path} is larger than {SMALL_FILE_BYTES} bytes", hint="download the checkpoint again")
        try:
            digests[name] = hashlib.sha256(path.read_bytes()).digest()
        except OSError as error:
            raise ModelError(f"{path} can't be read: {error}", hint="check its permissions") from None
    return digests
