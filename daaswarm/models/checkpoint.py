"""The tensors of a safetensors folder, read by exact byte range. No torch, no mapping of whole files.

A mapped file is read ahead by the kernel far past what is asked; ``pread`` with ``FADV_RANDOM`` touches the bytes
asked for and no others, which is what lets a host hold a part of a checkpoint that it could not hold whole.
"""

from __future__ import annotations

import json
import math
import os
import stat
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from daaswarm.errors import ModelError
from daaswarm.limits import MIB

HEADER_BYTES = 100 * MIB  # the safetensors format's own cap on a file's header
INDEX_BYTES = 64 * MIB  # a shard index: 500,000 names of 128 bytes
CONFIG_BYTES = 16 * MIB  # config.json; the largest in the wild, with label maps, are under 1 MiB
TENSORS = 1_000_000  # of one model; the largest per-expert checkpoints have 100,000
SHARDS = 2_048  # files of one model, each an open file descriptor
NAME_CHARS = 1_024  # of a tensor's name; the longest in the wild have 120
RANK = 8  # dimensions of one tensor
DIMENSION = 1 << 32  # of one axis; vocabularies are below 2^20
READ_BYTES = 1 << 30  # of one system call; Linux stops at 2 GiB - 4 KiB

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_QUANTISED = ("F8", "F4", "F6", "E8M0")  # how the names of the format's quantised dtypes begin


class Tensor(NamedTuple):
    """Where one tensor lies: ``nbytes`` bytes from ``start`` of ``file``, row-major."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Checkpoint:
    """An open checkpoint. Use as a context manager.

    Attributes:
        tensors: every tensor of the model, by its name in the checkpoint.
        bytes_read: of tensor data, so far.

    Raises:
        ModelError: the folder is no safetensors checkpoint, or a file of it is damaged; names the tensor.
    """

    def __init__(self, folder: Path, *, sequential: bool = False) -> None:
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self.bytes_read = 0
        self._sequential = sequential
        self._files: dict[str, int] = {}
        self._seek = threading.Lock()  # where there is no pread, a read is a seek and a read
        try:
            homes: dict[str, str] = {}
            for file, names in find_shards(folder).items():
                found = read_header(folder / file)
                for name in found:
                    if homes.setdefault(name, file) != file:
                        raise ModelError(
                            f"{folder}: tensor {name} is both in {homes[name]} and in {file}",
                            hint="download the checkpoint again",
                        )
                for name in found if names is None else names:
                    if name not in found:
                        raise ModelError(
                            f"{folder}: tensor {name} is not in {file}, where the index says it is",
                            hint="download the checkpoint again",
                        )
                    self.tensors[name] = found[name]
        except OSError as error:
            raise ModelError(f"{folder} can't be read: {error}", hint="check the folder and its permissions") from None
        if not self.tensors:
            raise ModelError(f"{folder} holds no tensors", hint="download the checkpoint again")

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes from ``offset`` of tensor ``name``.

        Raises:
            ModelError: the file ended early or can't be read.
        """
        tensor = self.tensors[name]
        done = 0
        try:
            file = self._open(tensor.file)
            while done < len(buffer):
                got = self._read(file, buffer[done : done + READ_BYTES], tensor.start + offset + done)
                if not got:
                    raise ModelError(
                        f"{self.folder / tensor.file} ends inside tensor {name}", hint="download the checkpoint again"
                    )
                done += got
        except OSError as error:
            raise ModelError(f"{self.folder / tensor.file}: tensor {name} can't be read: {error}") from None
        self.bytes_read += done

    def _open(self, file: str) -> int:
        if file not in self._files:
            fd = os.open(self.folder / file, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
            if hasattr(os, "posix_fadvise"):
                advice = os.POSIX_FADV_SEQUENTIAL if self._sequential else os.POSIX_FADV_RANDOM
                os.posix_fadvise(fd, 0, 0, advice)
            self._files[file] = fd
        return self._files[file]

    def _read(self, file: int, buffer: memoryview, position: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file, [buffer], position)
        with self._seek:
            os.lseek(file, position, os.SEEK_SET)
            data = os.read(file, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def read_config(folder: Path) -> bytes:
    """The bytes of ``config.json``.

    Raises:
        ModelError: there is none, it is too large, or no regular file.
    """
    path = folder / "config.json"
    try:
        found = path.stat()
        if found.st_size > CONFIG_BYTES:
            raise ModelError(f"{path} is larger than {CONFIG_BYTES} bytes")
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
            raise ModelError(f"{path} is no file", hint="download the checkpoint again")
        return path.read_bytes()
    except OSError:
        raise ModelError(
            f"{folder} is not a checkpoint: it has no config.json",
            hint="give a folder in Hugging Face layout (config.json and .safetensors) or a .gguf file",
        ) from None


def find_shards(folder: Path) -> dict[str, list[str] | None]:
    """``{file: tensors in it}``, or None for all. The index decides, not what else lies in the folder.

    Raises:
        ModelError: neither ``model.safetensors`` nor an index; a bad index.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        if index.stat().st_size > INDEX_BYTES:
            raise ModelError(f"{index} is larger than {INDEX_BYTES} bytes")
        try:
            weights: Any = json.loads(index.read_bytes(), object_pairs_hook=_refuse_repeats)["weight_map"]
            pairs = sorted(weights.items())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ModelError(f"{index} is not a shard index", hint="download the checkpoint again") from None
        shards: dict[str, list[str] | None] = {}
        for name, file in pairs:
            _check_name(index, name)
            if not isinstance(file, str) or not _is_plain(file):
                where = repr(file)[:200]
                raise ModelError(f"{index}: tensor {name} is said to be in {where}, which is no file of this folder")
            if file not in shards and not (folder / file).is_file():
                raise ModelError(f"{folder}: {file}, which holds tensor {name}, is missing", hint="download it again")
            names = shards.setdefault(file, [])
            assert names is not None
            names.append(name)
        if len(shards) > SHARDS:
            raise ModelError(f"{index} names {len(shards)} files; {SHARDS} is the limit")
        return shards
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": None}
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern)]
    if pickles:
        raise ModelError(
            f"{folder} has its weights only as pickle ({sorted(pickles)[0]}), which can run code when loaded",
            hint="convert it to safetensors with a tool you trust, or find a safetensors copy",
        )
    raise ModelError(
        f"{folder} is not a checkpoint: it has neither model.safetensors nor model.safetensors.index.json",
        hint="give a folder in Hugging Face layout or a .gguf file",
    )


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, every bound and offset checked before anything is allocated.

    Raises:
        ModelError: names the file and the tensor.
        OSError: the file can't be opened.
    """
    again = "the file is damaged: download the checkpoint again"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_BYTES):
            raise ModelError(f"{path} is not a safetensors file, or is cut off inside its header", hint=again)
        try:
            header: Any = json.loads(file.read(length), object_pairs_hook=_refuse_repeats)
            if not isinstance(header, dict):
                raise ValueError("it is no JSON object")
            entries: dict[str, Any] = header
        except (ValueError, TypeError, RecursionError) as error:
            raise ModelError(f"{path}: its header can't be read: {str(error)[:200]}", hint=again) from None
    entries.pop("__metadata__", None)
    if len(entries) > TENSORS:
        raise ModelError(f"{path} holds {len(entries)} tensors; {TENSORS} is the limit")
    tensors = {name: _parse_entry(path, name, entry, 8 + length, size) for name, entry in entries.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start < end:
            raise ModelError(f"{path}: tensor {name} overlaps the one before it", hint=again)
        end = tensor.start + tensor.nbytes
    return tensors


def _parse_entry(path: Path, name: str, entry: Any, data: int, size: int) -> Tensor:
    again = "the file is damaged: download the checkpoint again"
    _check_name(path, name)
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{path}: tensor {name} has no dtype, shape or offsets", hint=again) from None
    if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) > RANK or any(n > DIMENSION for n in shape):
        raise ModelError(f"{path}: tensor {name} has the impossible shape {str(list(shape))[:200]}", hint=again)
    if not isinstance(dtype, str):
        raise ModelError(f"{path}: tensor {name} has the impossible dtype {str(dtype)[:40]}", hint=again)
    if dtype.startswith(_QUANTISED):
        raise ModelError(
            f"{path}: tensor {name} is {dtype[:40]}: a quantised checkpoint, which would be served with losses",
            hint="use the checkpoint in bf16, f16 or f32",
        )
    if dtype not in ITEM_BYTES:
        raise ModelError(f"{path}: tensor {name} has the unknown dtype {dtype[:40]!r}", hint=again)
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != nbytes:
        raise ModelError(
            f"{path}: tensor {name} {list(shape)} {dtype} is {nbytes} bytes, its offsets say {end - begin}", hint=again
        )
    if data + end > size:
        raise ModelError(f"{path} is cut off: tensor {name} ends {data + end - size} bytes past its end", hint=again)
    return Tensor(path.name, dtype, shape, data + begin, nbytes)


def _check_name(path: Path, name: str) -> None:
    """A name ends up in messages, so it must not be able to move the cursor."""
    if len(name) > NAME_CHARS or not name.isprintable():
        raise ModelError(
            f"{path}: {ascii(name)[:200]} is no name of a tensor (at most {NAME_CHARS} printable characters)",
            hint="the file is damaged: download the checkpoint again",
        )


def _is_plain(file: str) -> bool:
    """The name of a safetensors file, without a way to another folder."""
    apart = any(separator in file for separator in "/\\:")
    return file.endswith(".safetensors") and file.isprintable() and not apart


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
