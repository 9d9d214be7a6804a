"""The header of a GGUF file, walked before any library believes it: counts, lengths, shapes and offsets.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from daaswarm.errors import ModelError
from daaswarm.limits import MIB

KEYS = 65_536  # metadata of one file; real ones have under 100
TENSORS = 1_000_000  # of one file
ELEMENTS = 1 << 24  # of one array; the largest vocabularies have 2^18 tokens, their merges 2^19
STRING_BYTES = 16 * MIB  # one string; the longest are chat templates, under 100 KB
RANK = 4  # dimensions of one tensor, the format's own limit
LAYERS = 4_096  # blocks; the deepest models have fewer than 200
SIZE = 1 << 24  # any other length or count that the metadata names, as the context's
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_SIZE_KEY = re.compile(r"\.(block_count|\w*(_length|_count|_dimension|_size))$")
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54),
    35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip
"""Type of a tensor: (values in a block, bytes of a block). A test compares them with the gguf package."""


def check_header(file: Path) -> None:
    """Refuse a GGUF file whose header asks for more than the file can hold.

    Raises:
        ModelError: says what is impossible.
        OSError: the file can't be read.
    """
    with file.open("rb") as stream:
        try:
            _Walk(stream, file.stat().st_size).check()
        except (_Impossible, struct.error, UnicodeDecodeError) as error:
            raise ModelError(
                f"{file} can't be converted: its header is damaged: {error}", hint="download the file again"
            ) from None


def count_types(file: Path) -> dict[str, int]:
    """How many tensors of a GGUF file have which type, as ``{"Q4_1": 210, "F32": 61}``; most first.

    Raises:
        ModelError: the header is damaged.
    """
    import gguf

    check_header(file)
    with file.open("rb") as stream:
        walk = _Walk(stream, file.stat().st_size)
        walk.check()
    return {gguf.GGMLQuantizationType(kind).name: count for kind, count in walk.types.most_common()}


class _Impossible(Exception):
    pass


class _Walk:
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._size = size
        self.types: Counter[int] = Counter()

    def check(self) -> None:
        magic, version, tensors, keys = self._unpack("<4sIQQ")
        if magic != b"GGUF" or version not in _VERSIONS:
            raise _Impossible(f"version {version} is none of {_VERSIONS}")
        if tensors > TENSORS or keys > KEYS:
            raise _Impossible(f"{tensors} tensors and {keys} keys; {TENSORS} and {KEYS} are the limits")
        for _ in range(keys):
            key = self._read_string()
            value = self._read_value(self._unpack("<I")[0])
            limit = LAYERS if key.endswith(".block_count") else SIZE
            if _SIZE_KEY.search(key) and isinstance(value, int) and not 0 <= value <= limit:
                raise _Impossible(f"{ascii(key)[:80]} is {value}; {limit} is the limit")
        spans = [self._read_tensor() for _ in range(tensors)]
        room = self._size - self._stream.tell()
        end = 0
        for start, nbytes, name in sorted(spans):
            if start < end or start + nbytes > room:
                raise _Impossible(f"tensor {name} overlaps another, or lies past the end of the file")
            end = start + nbytes

    def _read_tensor(self) -> tuple[int, int, str]:
        name = ascii(self._read_string())[1:81]
        (rank,) = self._unpack("<I")
        if rank > RANK:
            raise _Impossible(f"tensor {name} has {rank} dimensions; {RANK} is the limit")
        shape = self._unpack(f"<{rank}Q")
        kind, start = self._unpack("<IQ")
        if kind not in _BLOCKS:
            raise _Impossible(f"tensor {name} has the unknown type {kind}")
        self.types[kind] += 1
        values, nbytes = _BLOCKS[kind]
        if shape and shape[0] % values:
            raise _Impossible(f"tensor {name}: {shape[0]} values in a row are not whole blocks of {values}")
        return start, math.prod(shape) // values * nbytes, name

    def _read_value(self, kind: int) -> int | None:
        """A number's value; of anything else only that it lies inside of the file."""
        if kind == _STRING:
            self._read_string()
        elif kind == _ARRAY:
            self._skip_array()
        elif kind in _FORMATS:
            (value,) = self._unpack(_FORMATS[kind])
            return value
        else:
            raise _Impossible(f"there is no value of type {kind}")
        return None

    def _skip_array(self) -> None:
        kind, count = self._unpack("<IQ")
        if count > ELEMENTS:
            raise _Impossible(f"an array of {count} values; {ELEMENTS} is the limit")
        if kind == _STRING:
            for _ in range(count):
                self._read_string()
        elif kind in _FORMATS:
            self._skip(count * struct.calcsize(_FORMATS[kind]))
        else:
            raise _Impossible(f"an array of values of type {kind}")

    def _read_string(self) -> str:
        (length,) = self._unpack("<Q")
        if length > STRING_BYTES:
            raise _Impossible(f"a text of {length} bytes; {STRING_BYTES} is the limit")
        data = self._stream.read(length)
        if len(data) < length:
            raise _Impossible("the file ends inside of it")
        return data.decode()

    def _skip(self, nbytes: int) -> None:
        if self._stream.tell() + nbytes > self._size:
            raise _Impossible("the file ends inside of it")
        self._stream.seek(nbytes, 1)

    def _unpack(self, form: str) -> tuple[int, ...]:
        data = self._stream.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            raise _Impossible("the file ends inside of it")
        return struct.unpack(form, data)
