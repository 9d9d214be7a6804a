"""A byte-level tokenizer for tiny checkpoints, made here: one token a byte, so every text and every cut is possible."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>"]


def make_tokenizer(vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """Ids 0 to 2 are special, then 256 bytes, then words (``~300``), so that each id of a random model is some text."""
    words = [f"~{i}" for i in range(len(SPECIAL) + 256, vocabulary)]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token=None
    )


def add_tokenizer(folder: Path) -> Path:
    """Give a checkpoint that tokenizer: ``tokenizer.json`` and ``tokenizer_config.json``."""
    make_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
