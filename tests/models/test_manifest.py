"""The root covers all that decides what is computed, and a manifest that came with a folder is not believed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daaswarm.errors import ModelError
from daaswarm.models.experts import load_experts
from daaswarm.models.files import FILES, VOCABULARIES, has_tokenizer, hash_files
from daaswarm.models.manifest import VERSION, Entry, Layer, Manifest, OutdatedManifest, get_root, parse_manifest
from daaswarm.models.manifest_file import MANIFEST_NAME
from daaswarm.models.sources import find_model
from tests.byte_tokenizer import add_tokenizer

Tiny = Callable[[str], Path]
ZERO = bytes(32)


def make(**changes: Any) -> Manifest:
    """A dense model of one layer of two slices, 4 wide, with a trunk of one tensor."""
    ffn = {"dtype": "F32", "layer": 0, "parts": 2, "hashes": [ZERO, b"1" * 32]}
    values: dict[str, Any] = {
        "version": VERSION,
        "root": "",
        "kind": "dense",
        "hidden": 4,
        "activation": "silu",
        "files": {"config.json": ZERO, "tokenizer.json": b"2" * 32},
        "layers": {0: Layer(experts=2, numel=36)},
        "entries": [
            Entry(name="down", param="down.weight", shape=[4, 6], axis=1, **ffn),
            Entry(name="gate", param="gate.weight", shape=[6, 4], **ffn),
            Entry(name="norm", dtype="F32", shape=[4], hashes=[ZERO]),
            Entry(name="up", param="up.weight", shape=[6, 4], **ffn),
        ],
        **changes,
    }
    return Manifest(**values)


def seal(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(manifest, root=get_root(manifest))


def parse(manifest: Manifest) -> Manifest:
    return parse_manifest(msgspec.msgpack.encode(manifest), what="it", hint="delete it")


def change_entry(number: int, **changes: Any) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        entries = [*manifest.entries]
        entries[number] = msgspec.structs.replace(entries[number], **changes)
        return msgspec.structs.replace(manifest, entries=entries)

    return change


def change(**changes: Any) -> Callable[[Manifest], Manifest]:
    return lambda manifest: msgspec.structs.replace(manifest, **changes)


ALTERED = {
    "kind": change(kind="moe", activation=""),
    "hidden": change(hidden=5),
    "activation": change(activation="gelu"),
    "numel": change(layers={0: Layer(experts=2, numel=37)}),
    "shared": change(layers={0: Layer(experts=2, numel=36, shared=1)}),
    "another layer": change(layers={0: Layer(experts=2, numel=36), 1: Layer(experts=2, numel=36)}),
    "config.json": change(files={"config.json": b"3" * 32, "tokenizer.json": b"2" * 32}),
    "tokenizer": change(files={"config.json": ZERO, "tokenizer.json": b"3" * 32}),
    "tokenizer gone": change(files={"config.json": ZERO}),
    "parameter": change_entry(1, param="up.weight"),
    "name": change_entry(1, name="gone"),
    "dtype": change_entry(1, dtype="I32"),
    "shape": change_entry(1, shape=[8, 3]),
    "axis": change_entry(1, axis=1),
    "layer": change_entry(1, layer=1),
    "owner": change_entry(2, owner=0, layer=0, param="down.bias"),
    "parts": change_entry(2, parts=2, layer=0, param="down.bias", hashes=[ZERO, ZERO]),
    "content": change_entry(3, hashes=[ZERO, ZERO]),
    "parts swapped": change_entry(3, hashes=[b"1" * 32, ZERO]),
    "fewer": lambda m: msgspec.structs.replace(m, entries=m.entries[:-1]),
}


@pytest.mark.parametrize("altered", ALTERED.values(), ids=ALTERED)
def test_whatever_is_altered_gives_another_root(altered: Callable[[Manifest], Manifest]) -> None:
    sealed = seal(make())
    assert parse(sealed) == sealed
    assert get_root(altered(sealed)) != sealed.root
    with pytest.raises(ModelError):
        parse(altered(sealed))


def test_the_root_as_the_protocol_says() -> None:
    """Written out once more from docs/reference/protocol.md."""

    def leaf(*fields: Any) -> bytes:
        return hashlib.sha256(b"\0" + json.dumps(fields, separators=(",", ":")).encode()).digest()

    def node(left: bytes, right: bytes) -> bytes:
        return hashlib.sha256(b"\1" + left + right).digest()

    small = make(entries=[Entry(name="a", dtype="BF16", shape=[4], hashes=[ZERO])], files={"config.json": ZERO})
    plan = leaf("plan", 2, "dense", 4, "silu", [[0, 2, 36, 0]])
    file = leaf("file", "config.json", "00" * 32)
    part = leaf("part", "a", -1, "", -1, 0, 1, 0, "BF16", [4], "00" * 32)
    top = node(node(plan, file), part)
    assert get_root(small) == hashlib.sha256(b"\2daaswarm/manifest/2" + (3).to_bytes(8, "big") + top).hexdigest()


@pytest.mark.parametrize(
    ("forged", "reason"),
    [
        (lambda m: msgspec.structs.replace(m, entries=[*m.entries, m.entries[0]]), "tensor 'down' occurs twice"),
        (change_entry(1, param="up.weight"), "tensors gate and up overlap"),
        (change_entry(1, param=""), "gate contradicts itself"),
        (change_entry(1, layer=7), "gate contradicts itself"),
        (change_entry(1, shape=[7, 4]), "gate contradicts itself"),
        (change_entry(1, shape=[1 << 32] * 2, axis=0), "gate contradicts itself"),
        (change_entry(1, shape=[1 << 33, 4]), "not a manifest: .*<= 4294967296"),
        (change_entry(1, parts=3, shape=[6, 4], hashes=[ZERO] * 3), "gate contradicts itself"),
        (change_entry(1, hashes=[ZERO]), "gate contradicts itself"),
        (change_entry(1, dtype="Q4"), "gate contradicts itself"),
        (change_entry(2, owner=1), "norm contradicts itself"),
        (change_entry(2, name="a\x1b[2Jb"), "not printable"),
        (change_entry(2, name="a" * 1_025), "length <= 1024"),
        (change(activation=""), "a dense model with the activation ''"),
        (change(layers={}), "not a manifest"),
        (change(hidden=1 << 40), "not a manifest"),
        (change(files={"tokenizer.json": ZERO}), r"config\.json is not in it"),
        (change(version=3), "unknown version 3"),
        (change(version=0), "unknown version 0"),
    ],
)
def test_a_forged_manifest_with_its_own_root_is_refused(forged: Callable[[Manifest], Manifest], reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as raised:
        parse(seal(forged(make())))
    assert "\n" not in str(raised.value)
    assert "\x1b" not in str(raised.value)


def test_too_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sealed = seal(make())
    monkeypatch.setattr("daaswarm.models.manifest.PARTS", 6)
    with pytest.raises(ModelError, match="over 6 parts"):
        parse(sealed)


@pytest.mark.parametrize(
    "data",
    [b"\x91" * 100_000, b"\x81\xa1x" * 5_000, b"\x81\xa7version\xc3", b"\x81\xa7version\x02", b"\x81\xa2\xff\xfe\x01"],
    ids=["lists", "maps", "bool", "nothing more", "not UTF-8"],
)
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ModelError, match="not a manifest"):
        parse_manifest(data, what="it", hint="")


@settings(deadline=None)
@given(st.integers(0, 5_000), st.integers(0, 255))
def test_a_changed_byte_never_passes(at: int, value: int) -> None:
    sealed = seal(make())
    data = bytearray(msgspec.msgpack.encode(sealed))
    data[at % len(data)] = value
    try:
        parsed = parse_manifest(bytes(data), what="it", hint="")
    except ModelError:
        return
    assert parsed == sealed  # the byte was that already


# -- in a folder --------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Callable[[str], Path]:
    def make_copy(architecture: str) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(tiny(architecture), folder)
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        return folder

    return make_copy


def test_a_manifest_of_version_1_is_built_again(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("llama")
    model = find_model(str(folder), tmp_path)
    old = msgspec.msgpack.encode({"version": 1, "root": "0" * 64, "kind": "dense", "config_sha256": ZERO})
    with pytest.raises(OutdatedManifest):
        parse_manifest(old, what="it", hint="")
    (folder / MANIFEST_NAME).write_bytes(old)
    assert find_model(str(folder), tmp_path).manifest == model.manifest
    assert (folder / MANIFEST_NAME).read_bytes() == msgspec.msgpack.encode(model.manifest)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "chat_template.jinja"]
)
def test_small_files_are_covered(copy: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = add_tokenizer(copy("llama"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("not of the model")
    model = find_model(str(folder), tmp_path)
    (folder / "README.md").write_text("so it may change")
    assert find_model(str(folder), tmp_path) == model
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(before + b"\n")
    with pytest.raises(ModelError, match=f"{name} is not what the manifest says") as raised:
        find_model(str(folder), tmp_path)
    assert MANIFEST_NAME in raised.value.hint
    (folder / MANIFEST_NAME).unlink()
    assert find_model(str(folder), tmp_path).root != model.root


def test_small_files_that_come_and_go(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("llama")
    find_model(str(folder), tmp_path)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").write_text("{{ messages }}")
    with pytest.raises(ModelError, match=r"additional_chat_templates/default\.jinja is not in the manifest"):
        find_model(str(folder), tmp_path)
    shutil.rmtree(folder / "additional_chat_templates")
    (folder / "generation_config.json").unlink()
    with pytest.raises(ModelError, match=r"generation_config\.json is missing"):
        find_model(str(folder), tmp_path)


@pytest.mark.parametrize(("architecture", "layer"), [("llama", "no gated FFN"), ("olmoe", "not split as")])
def test_a_consistent_manifest_that_contradicts_the_model(
    copy: Callable[[str], Path], tmp_path: Path, architecture: str, layer: str
) -> None:
    model = find_model(str(copy(architecture)), tmp_path)
    forged = model._replace(manifest=seal(msgspec.structs.replace(model.manifest, hidden=model.hidden * 2)))
    assert parse(forged.manifest) == forged.manifest
    assert forged.root != model.root
    with pytest.raises(ModelError, match=layer):
        load_experts(forged, {1: [0]}, "f32")


def test_an_unknown_activation(copy: Callable[[str], Path], tmp_path: Path) -> None:
    model = find_model(str(copy("llama")), tmp_path)
    forged = model._replace(manifest=msgspec.structs.replace(model.manifest, activation="exec"))
    with pytest.raises(ModelError, match="no gated FFN"):
        load_experts(forged, {0: [0]}, "f32")


def test_has_tokenizer(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    assert not has_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert has_tokenizer(tmp_path)


def test_small_files_are_bounded_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}" * 10)
    assert set(hash_files(tmp_path)) == {"config.json", "tokenizer.json"}
    (tmp_path / "merges.txt").mkdir()
    with pytest.raises(ModelError, match=r"merges\.txt is no file"):
        hash_files(tmp_path)
    monkeypatch.setattr("daaswarm.models.files.SMALL_FILE_BYTES", 10)
    with pytest.raises(ModelError, match=r"tokenizer\.json is larger than 10 bytes"):
        hash_files(tmp_path)


def test_every_vocabulary_file_of_transformers_is_covered() -> None:
    import re

    import transformers

    source = Path(transformers.__file__).parent
    declared = re.compile(r"VOCAB_FILES_NAMES\s*=\s*\{([^}]*)\}")
    known: set[str] = set()
    for path in source.glob("**/tokenization*.py"):
        for body in declared.findall(path.read_text(encoding="utf-8")):
            known.update(re.findall(r':\s*"([^"]+)"', body))
    assert len(known) > 10
    assert known <= set(FILES)
    assert set(VOCABULARIES) < set(FILES)
