"""The reference says what the program does: generated files are fresh, hand-written ones name everything there is."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from daaswarm import errors, messages
from daaswarm.config import get_keys
from daaswarm.limits import CHUNK_BYTES
from daaswarm.net import frames

DOCS = Path(__file__).resolve().parents[2] / "docs"
sys.path.insert(0, str(DOCS))
reference: ModuleType = importlib.import_module("generate_reference")
sys.path.remove(str(DOCS))


def read(name: str) -> str:
    return (DOCS / "reference" / name).read_text("utf-8")


@pytest.mark.parametrize("name", sorted(reference.FILES))
def test_generated_files_are_fresh(name: str) -> None:
    assert read(name) == reference.FILES[name](), "run python docs/generate_reference.py"


def get_commands() -> list[tuple[str, Any]]:
    return list(reference.get_commands())


@pytest.mark.parametrize(("name", "command"), get_commands(), ids=[name for name, _ in get_commands()])
def test_every_command_and_flag_is_described(name: str, command: Any) -> None:
    assert f"\n## daaswarm {name}\n" in read("cli.md")
    assert (command.help or "").split("Example:")[0].strip(), f"daaswarm {name} has no description"
    assert "Example:" in command.help, f"daaswarm {name} has no example"
    for param in [*reference.get_arguments(command), *reference.get_options(command)]:
        is_named = param.param_type_name == "argument" or any(name.startswith("--") for name in param.opts)
        assert is_named, param.opts
        assert reference.get_help(name, param), f"daaswarm {name} {param.opts[0]} is not described"


def test_descriptions_of_flags_belong_to_a_flag() -> None:
    there = {(name, param.opts[0]) for name, command in get_commands() for param in reference.get_options(command)}
    assert set(reference.FLAGS) <= there


def test_every_setting_is_described() -> None:
    assert set(reference.MEANINGS) == set(get_keys())


def test_every_limit_has_a_row() -> None:
    module = importlib.import_module("daaswarm.limits")
    names = [name for name in vars(module) if name.isupper() and name not in ("KIB", "MIB")]
    assert names and [name for name in names if f"| `{name}` |" not in read("limits.md")] == []


def test_every_error_code_and_exit_code_is_named() -> None:
    text = read("exit-codes.md")
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.DaaswarmError)]
    for kind in kinds:
        row = re.search(rf"^\| `{kind.code}` \| (\d+) \|", text, re.MULTILINE)
        assert row, f"{kind.code} is not in exit-codes.md"
        assert int(row[1]) == errors.get_exit_code(kind("")), kind
    for name, value in vars(errors).items():
        if name.startswith("EXIT_"):
            assert re.search(rf"^\| {value} \|", text, re.MULTILINE), f"{name} is not in exit-codes.md"


def get_result_keys(module: str, function: str) -> set[str]:
    """The names in the dicts that a function makes, from its source (importing it would import torch)."""
    root = DOCS.parent / "daaswarm"
    tree = ast.parse((root / f"{module}.py").read_text("utf-8"))
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == function
    ]
    assert len(found) == 1, (module, function)
    keys = [key for node in ast.walk(found[0]) if isinstance(node, ast.Dict) for key in node.keys]
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("inference/requester", "describe"),
        ("node/coordinator", "get_status"),
        ("node/coordinator", "serve"),
        ("node/coordinator", "describe_islands"),
        ("node/planning", "describe_estimate"),
        ("node/reaching", "describe"),
        ("node/hosting", "describe"),
        ("node/hosting", "serve"),
        ("node/answering", "answer"),
        ("node/deploying", "deploy"),
        ("node/deploying", "remove"),
        ("node/deploying", "describe_deployment"),
        ("node/surveying", "describe_peer"),
        ("node/surveying", "_describe_host"),
        ("node/surveying", "_verify_host"),
        ("node/surveying", "verify"),
        ("node/neighbour", "describe"),
        ("cli/init", "init"),
        ("cli/logs", "logs"),
        ("cli/logs", "show"),
        ("cli/reset", "reset"),
        ("bench/parity", "run_parity"),
        ("bench/expert_calls", "run_expert_calls"),
    ],
)
def test_every_json_field_is_named(module: str, function: str) -> None:
    keys = get_result_keys(module, function)
    assert keys
    text = re.sub(r"^```.*?^```$", "", read("json.md"), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"[a-z][a-z0-9_]+", " ".join(re.findall(r"`([^`]+)`", text))))
    assert keys - named == set()


def test_every_message_and_kind_is_named() -> None:
    text = read("protocol.md")
    for _, kind in inspect.getmembers(messages, inspect.isclass):
        if issubclass(kind, messages.Message) and kind is not messages.Message:
            assert f"`{kind.__struct_config__.tag}`" in text, kind
    for kind in frames.Kind:
        assert f"| {kind.name} | {int(kind)} |" in text


def test_the_protocol_is_the_one_that_is_spoken() -> None:
    text = read("protocol.md")
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (magic|kind|deadline|call|header length|body) \|", text, re.MULTILINE)
    sizes = [int(size) for _, size, _ in rows]
    assert [int(offset) for offset, _, _ in rows] == [sum(sizes[:i]) for i in range(len(sizes))]
    letters = {1: "B", 2: "H", 4: "I"}
    assert frames.HEAD.format == ">" + "".join(letters[size] for size in sizes)
    assert f"`0x{frames.MAGIC:X}`".replace("0X", "0x") in text
    assert f"version {messages.PROTOCOL_VERSION}\n" in text
    assert f"{frames.MAX_DEADLINE_MS:,}" in text and f"{frames.HANDSHAKE_BYTES:,}" in text
    assert reference.format_limit("CHUNK_BYTES", CHUNK_BYTES) in text
    for kind in (messages.Hello, messages.Prove, messages.Welcome, messages.Pointer):
        for field in msgspec.structs.fields(kind):
            assert f"`{field.encode_name}`" in text, (kind, field.name)


def test_every_dependency_has_a_reason_and_every_reason_a_dependency() -> None:
    import tomli

    project = tomli.loads((DOCS.parent / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {re.split(r"[^a-z0-9-]", requirement)[0] for requirement in project["dependencies"]}
    text = (DOCS / "explanation" / "dependencies.md").read_text("utf-8")
    described = set(re.findall(r"^\| ([a-z0-9-]+) \| (?!---)", text, re.MULTILINE))
    assert described == declared
    for requirement in project["optional-dependencies"]["dev"]:
        assert re.split(r"[^a-z0-9-]", requirement)[0] in text, requirement
