"""``daaswarm config``: read and change settings."""

from __future__ import annotations

import json
from typing import Annotated

import msgspec
import typer

from daaswarm.cli.options import DataDirOption, JsonOption, open_data_dir
from daaswarm.cli.output import Output
from daaswarm.config import Config, NetworkConfig, convert, get_keys, load_config, set_value, unknown_key

app = typer.Typer(no_args_is_help=True, help="Read and change settings (defaults < file < environment < flags).")


def get_completions(incomplete: str) -> list[str]:
    return [key for key in get_keys() if key.startswith(incomplete)]


KeyArgument = Annotated[str, typer.Argument(autocompletion=get_completions, help="Like network.listen.")]


@app.command("get")
def get(
    key: Annotated[str | None, typer.Argument(autocompletion=get_completions, help="Leave out to see all.")] = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one setting, or all.

    Example: daaswarm config get network.listen
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    config = msgspec.to_builtins(load_config(folder.config_path))
    values = {name: config[name.split(".")[0]][name.split(".")[1]] for name in get_keys()}
    if key is not None:
        if key not in values:
            raise unknown_key(key, source="config get")
        values = {key: values[key]}
    if as_json:
        output.json(values)
    elif key is not None:
        output.result(_format(values[key]))
    else:
        for name, value in values.items():
            output.result(f"{name} = {_format(value)}")


@app.command("set")
def set_(
    key: KeyArgument,
    value: Annotated[str, typer.Argument(help="A list is written with commas.")],
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write one setting to the file.

    Example: daaswarm config set network.bootstrap /ip4/192.0.2.7/tcp/4001/p2p/12D3Koo…
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    check_value(key, value)
    folder.create()
    typed = set_value(folder.config_path, key, value)
    output.json({key: typed})
    output.result(f"{key} = {_format(typed)}")


def check_value(key: str, value: str) -> None:
    """Refuse an address that no command could use later, while whoever writes it is there.

    Raises:
        ConfigError: it is none.
    """
    section, _, name = key.partition(".")
    if section == "network" and name in ("bootstrap", "listen", "announce"):
        from daaswarm.node.life import check_addresses

        network = NetworkConfig(**{name: convert(key, value, source="config set")})
        check_addresses(Config(network=network), listen=True)


@app.command("path")
def path(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show where the settings file is.

    Example: $EDITOR "$(daaswarm config path)"
    """
    folder = open_data_dir(data_dir)
    output = Output(as_json=as_json)
    output.json({"path": str(folder.config_path)})
    output.result(str(folder.config_path))


def _format(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
