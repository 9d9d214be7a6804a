"""Writes docs/reference/cli.md, config.md and limits.md from the program itself.

    python docs/generate_reference.py           write them
    python docs/generate_reference.py --check   exit 1 if one of them is stale

``tests/docs`` runs the check, and fails too when a command, a flag or a setting has no description.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec
import typer

import daaswarm.limits
from daaswarm.cli.app import app
from daaswarm.config import Config, get_keys

REFERENCE = Path(__file__).resolve().parent / "reference"
GENERATED = "<!-- Written by docs/generate_reference.py: change the program, not this file. -->"
DOTTED = 2  # parts of a setting's name

# The section of the settings that a command's flags override.
SECTIONS = {"infer": ["infer", "network"], "host-expert": ["host", "network"], "join": ["network", "host"]}

# What each setting means. A test compares the names with those that the program knows.
MEANINGS = {
    "network.bootstrap": "Addresses of nodes through which to find the swarm, each ending in `/p2p/` and a PeerId.",
    "network.listen": "Where to accept connections. The default is this machine only, on a free port.",
    "network.announce": "Addresses to tell others instead of those listened on, for a node behind a router.",
    "network.swarm": "A public swarm's name, which is no secret, or a private one's id. Nodes of others are refused.",
    "network.swarm_key_file": "File with the key of a private swarm; empty: the one that `swarm add` keeps.",
    "network.allow": "The only PeerIds that this node meets; empty: all of the swarm. See `swarm allow`.",
    "network.relay": "Pass the traffic of peers behind a NAT or firewall, as long as this node itself can be dialled.",
    "network.interfaces": "Whose addresses others are told, like `eth0,wg*`; empty: all but containers' and tunnels'.",
    "network.libp2p": "Also accept libp2p and WebSocket connections on the same port.",
    "network.lan": "Find peers on the local network by multicast DNS, unless the node listens on loopback alone.",
    "host.memory": "The most that all experts of a node take together; `2GB` (decimal) or `2GiB` (binary).",
    "host.nice": "How far this program stands behind others, 0 to 19, as Unix counts it.",
    "host.pause_when_busy": "Pause while other programs use more than this share of all cores; 0 never pauses.",
    "host.tags": "What its experts are good at, in your words: `expert list --available --tag` finds them.",
    "host.quiet_hours": "When to compute nothing for others, like `08:00-18:00`: local time, may span midnight.",
    "host.upload": "The most bytes a second that answers to others take, like `50MB`; empty for no limit.",
    "host.dtype": "What a host computes in.",
    "host.device": "Where a host computes: `cpu`, `cuda` (a GPU), `cuda:1` (the second), or `auto`: a GPU if there is "
    "one ([not run yet](../explanation/gpu.md)).",
    "host.threads": "Threads that a host computes with; 0 leaves the choice to torch (one per core).",
    "infer.model": "The model that `infer` asks: the default's name, a folder or a GGUF file.",
    "infer.max_tokens": "Longest answer, in tokens.",
    "infer.temperature": "0 takes the likeliest token each time; higher is more varied.",
    "infer.top_p": "Draw from the likeliest tokens up to this share of the probability.",
    "infer.call_timeout_s": "Deadline of one call to a host, seconds.",
    "infer.device": "Where the requester's own part of the model computes; as `host.device`.",
    "infer.verify": "How much of what hosts answer is checked ([security](../explanation/security.md#answers)); a "
    "share is of the calls of hosts that have earned trust.",
    "infer.codec": "How hidden states and sums travel to and from hosts that take it: as they are (`none`), or in "
    "fewer bytes with some error ([codecs](../explanation/codecs.md)).",
    "infer.prompt_lookup": "Guess at tokens from what followed the last ones where they stood before, when that is "
    "measured to be faster ([a token's time](../explanation/where-a-tokens-time-goes.md)). The answer is the same.",
    "infer.embedded_hosts": "Host processes that `infer` starts when there is no swarm to ask.",
    "infer.threads": "Threads of the requester's own part of the model; 0 leaves the choice to torch.",
    "log.file_level": "What `join` and `host-expert` write to `logs/node.log` in the data directory.",
    "log.level": "What is logged to standard error: `debug`, `info`, `warning` or `error`.",
}

# What a setting may be, where its pattern doesn't say it.
VALUES = {
    "infer.verify": "`off`, `sample`, `every`, `twin`, or with a share of calls: `sample=0.1`, `twin=0.1`",
    "host.device": "`cpu`, `auto`, `cuda`, `cuda:1`",
    "infer.device": "`cpu`, `auto`, `cuda`, `cuda:1`",
}

# Flags that the program itself doesn't explain.
FLAGS = {
    ("bench parity", "--model"): "A model's name, folder or GGUF file.",
    ("bench parity", "--dtype"): "Compute in f32, bf16 or f16, on both sides.",
    ("bench expert", "--dim"): "Width of a row.",
    ("bench expert", "--seconds"): "How long to measure.",
}


def make_cli() -> str:
    """``cli.md``: every command that is not hidden."""
    parts = [GENERATED, "# Command line", _join(
        "Every command says the same with `--help`. Exit codes are in [exit-codes.md](exit-codes.md), what `--json`",
        "writes is in [json.md](json.md), settings are in [config.md](config.md).",
    )]  # fmt: skip
    commands = list(get_commands())
    parts.append("\n".join(f"- [`daaswarm {name}`](#daaswarm-{name.replace(' ', '-')})" for name, _ in commands))
    options = [_get_option_row("", param) for param in get_options(typer.main.get_command(app))]
    parts += ["## daaswarm", _table(["Option", "Value", "Default", "Meaning"], options)]
    for name, command in commands:
        parts += _make_command(name, command)
    return "\n\n".join(parts) + "\n"


def get_commands(group: Any = None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``("bench parity", command)`` for each command that help shows, groups left out."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from get_commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def get_options(command: Any) -> list[Any]:
    """The options of a command that help shows; ``--help`` itself left out."""
    found = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    return [p for p in found if p.name not in ("help", "install_completion", "show_completion")]


def get_arguments(command: Any) -> list[Any]:
    return [p for p in command.params if p.param_type_name == "argument"]


def get_help(command: str, param: Any) -> str:
    """What a parameter means; empty if nobody says."""
    name = param.opts[0]
    return param.help or FLAGS.get((command, name), "")


def _make_command(name: str, command: Any) -> list[str]:
    arguments = get_arguments(command)
    usage = "".join(f" {p.name.upper()}" if p.required else f" [{p.name.upper()}]" for p in arguments)
    text, _, example = (command.help or "").partition("Example:")
    parts = [f"## daaswarm {name}", f"    daaswarm {name} [OPTIONS]{usage}", " ".join(text.split())]
    if example:
        parts.append(f"Example:\n\n    {' '.join(example.split())}")
    if arguments:
        rows = [[f"`{p.name.upper()}`", "yes" if p.required else "no", get_help(name, p)] for p in arguments]
        parts.append(_table(["Argument", "Required", "Meaning"], rows))
    parts.append(
        _table(["Option", "Value", "Default", "Meaning"], [_get_option_row(name, p) for p in get_options(command)])
    )
    return parts


def _get_option_row(command: str, param: Any) -> list[str]:
    names = ", ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])
    return [names, _get_value(param), _get_default(command, param), get_help(command, param)]


def _get_value(param: Any) -> str:
    if getattr(param, "is_flag", False):
        return ""
    kind: Any = param.type_descriptor.annotation
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
    names = {str: "text", int: "number", float: "number", Path: "path"}
    value = param.metavar or names.get(kind, getattr(kind, "__name__", str(kind)))
    low, high = getattr(param, "min", None), getattr(param, "max", None)
    return f"{value}, {low} to {high}" if low is not None and high is not None else value


def _get_default(command: str, param: Any) -> str:
    for section in SECTIONS.get(command, []):
        key = f"{section}.{param.name}"
        if key in get_keys():
            return f"setting `{key}`"
    if param.envvar:
        return f"environment `{param.envvar}`"
    if getattr(param, "is_flag", False):
        if param.secondary_opts:
            return f"`{(param.opts if param.default else param.secondary_opts)[0]}`"
        return "on" if param.default else "off"
    return f"`{param.default}`" if param.default not in (None, []) else "none"


def make_config() -> str:
    """``config.md``: every setting with type, bounds and default."""
    parts = [GENERATED, "# Settings", _join(
        "Settings are read from `config.toml` in the data directory (`daaswarm config path` says where), overridden",
        "by the environment, and that by flags. A setting `network.listen` has the variable `DAASWARM_NETWORK_LISTEN`.",
        "In a variable, a list is written with commas. An unknown name or a bad value is an error that names the file",
        "(or variable, or flag) and the setting; the exit code is 2.",
    )]  # fmt: skip
    for section in msgspec.structs.fields(Config):
        kind: Any = section.type
        parts += [f"## {section.name}", (kind.__doc__ or "").strip()]
        rows = [
            [
                f"`{section.name}.{field.name}`",
                VALUES.get(f"{section.name}.{field.name}") or _describe_type(field.type),
                f"`{_format_default(field)}`",
                MEANINGS.get(f"{section.name}.{field.name}", ""),
                f"`DAASWARM_{section.name.upper()}_{field.name.upper()}`",
            ]
            for field in msgspec.structs.fields(kind)
        ]
        parts.append(_table(["Setting", "Type", "Default", "Meaning", "Variable"], rows))
    parts += ["## Variables that are no settings", _table(["Variable", "Meaning"], [
        ["`DAASWARM_HOME`", "Data directory of this node, like `--data-dir`. Default: the platform's data folder."],
        ["`DAASWARM_SWARM_KEY`", "The key of a private swarm itself, a line of text, where no file shall hold it."],
        ["`DAASWARM_CACHE`", "Folder of downloaded and converted models, shared by all nodes of a user. "
         "Default: the platform's cache folder."],
    ]), "## Example", "\n".join([
        "```toml",
        "[network]",
        'bootstrap = ["/ip4/192.0.2.7/tcp/4001/p2p/12D3KooWCUqSPNf2A9ypw1L56Z79FPbn6A5vwswZTLeYN44fy5bU"]',
        'listen = "/ip4/0.0.0.0/tcp/4001"',
        "",
        "[host]",
        'memory = "4GB"',
        "```",
    ])]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _describe_type(kind: Any) -> str:
    """A type as a reader would say it: ``number, 1 to 64``."""
    if get_origin(kind) is list:
        return "list of texts"
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_describe_type(part) for part in get_args(kind))
    described = msgspec.inspect.type_info(kind)
    bounds: list[str] = []
    for name, word in (("ge", "from"), ("gt", "above"), ("le", "to"), ("lt", "below")):
        value = getattr(described, name, None)
        if value is not None:
            bounds.append(f"{word} {value:,}")
    name = {"IntType": "whole number", "FloatType": "number", "BoolType": "`true` or `false`", "StrType": "text"}
    if getattr(described, "pattern", None):
        return ", ".join(f"`{word}`" for word in re.findall(r"[a-z0-9]+", described.pattern))  # type: ignore[attr-defined]
    if getattr(described, "max_length", None):
        bounds.append(f"{described.min_length} to {described.max_length} letters")  # type: ignore[attr-defined]
    return " ".join([name[type(described).__name__], *bounds])


def _format_default(field: Any) -> str:
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def make_limits() -> str:
    """``limits.md``: the shared limits, with the reasons that stand beside them."""
    source = Path(daaswarm.limits.__file__).read_text("utf-8")
    rows: list[list[str]] = []
    for line in source.splitlines():
        match = re.match(r"^([A-Z][A-Z_]*) = [^#]*(?:# (.*))?$", line)
        if match:
            name = match[1]
            rows.append([f"`{name}`", format_limit(name, getattr(daaswarm.limits, name)), match[2] or ""])
    parts = [GENERATED, "# Limits", _join(
        "Over a limit, a request is refused by name (`too_large`, `busy`, `remote_protocol_error`), never dropped",
        "silently. Limits of one file only stand at the top of that file, with their reason.",
    ), _table(["Limit", "Value", "What and why"], rows)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def format_limit(name: str, value: float) -> str:
    """``CHUNK_BYTES, 262144`` → ``256 KiB``."""
    if name.endswith("_BYTES"):
        for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
            if value >= size and value % size == 0:
                return f"{int(value) // size} {unit}"
        return f"{value:,} bytes"
    return f"{value:g} s" if name.endswith("_S") else f"{value:,}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _join(*lines: str) -> str:
    return "\n".join(lines)


FILES = {"cli.md": make_cli, "config.md": make_config, "limits.md": make_limits}


def get_stale() -> list[str]:
    """The generated files that are not what would be written now."""
    stale: list[str] = []
    for name, make in FILES.items():
        path = REFERENCE / name
        if not path.is_file() or path.read_text("utf-8") != make():
            stale.append(name)
    return stale


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        stale = get_stale()
        if stale:
            sys.stderr.write(f"stale: {', '.join(stale)}; run python docs/generate_reference.py\n")
        return 1 if stale else 0
    for name, make in FILES.items():
        (REFERENCE / name).write_text(make(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
