"""``daaswarm init``: make the data directory and the identity; on a terminal with a few questions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from daaswarm.cli.config import check_value
from daaswarm.cli.host_expert import complete_models, locate_model
from daaswarm.cli.options import DataDirOption, JsonOption, name_folder, open_data_dir, read_config
from daaswarm.cli.output import Output
from daaswarm.config import convert, get_default_data_dir, set_value
from daaswarm.errors import ConfigError, Interrupted
from daaswarm.store.data_dir import DataDir

QUESTIONS = {
    "network.swarm": "Name of the swarm; nodes of other swarms are refused",
    "network.listen": "Where to accept connections; /ip4/0.0.0.0/tcp/4001 lets other machines in",
    "host.memory": "How much memory to give to the experts of others",
    "infer.model": "Which model to ask",
}


def init(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing, as where there is no terminal.")] = False,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make this node's folder and its Ed25519 identity; on a terminal, ask for the settings that matter first.

    Enter accepts what is proposed: the setting as it is. Running it again changes nothing else.

    Example: daaswarm init --data-dir ~/swarm
    """
    from daaswarm.core.signing import get_peer_id

    output = Output(as_json=as_json)
    asks = not yes and not as_json and sys.stdin.isatty() and sys.stderr.isatty()
    if asks:
        output.message("Enter accepts what is proposed, Ctrl-C leaves.")
        if data_dir is None:
            data_dir = ask_folder(output)
    folder = open_data_dir(data_dir)
    read_config(folder)  # what is wrong with it is said before anything is made
    existed = folder.has_key()
    peer_id = get_peer_id(folder.load_key().verify_key.encode())
    if asks:
        ask_settings(folder, output)
    output.json(
        {"peer_id": peer_id, "data_dir": str(folder.path), "config": str(folder.config_path), "created": not existed}
    )
    output.message("this node has an identity already" if existed else "made a new identity")
    output.result(f"peer id   {peer_id}")
    output.result(f"folder    {folder.path}")
    output.result(f"settings  {folder.config_path}")
    option = name_folder(folder)
    output.message(f"next: daaswarm join{option}")
    output.message(f'or:   daaswarm infer "What is the capital of France?"{option}')


def ask_folder(output: Output) -> Path:
    """Where the node's files shall be."""
    return Path(ask(output, "Folder of this node", str(get_default_data_dir()), lambda text: text))


def ask_settings(folder: DataDir, output: Output) -> None:
    """Write to the settings what is answered otherwise than proposed."""
    config = read_config(folder)
    for key, question in QUESTIONS.items():
        section, _, name = key.partition(".")
        current = str(getattr(getattr(config, section), name))
        if key == "infer.model":
            question = f"{question} ({', '.join(complete_models(''))}, or a path)"
        answer = ask(output, question, current, lambda text, key=key: check(key, text))
        if answer != current:
            set_value(folder.config_path, key, answer)


def check(key: str, text: str) -> str:
    """The value that is written.

    Raises:
        ConfigError: it can't be.
    """
    convert(key, text, source="this")
    check_value(key, text)
    return locate_model(text) if key == "infer.model" else text


def ask(output: Output, question: str, proposed: str, read: Callable[[str], Any]) -> Any:
    """Ask until the answer can be used.

    Raises:
        Interrupted: Ctrl-D.
    """
    while True:
        output.message(f"\n{question}")
        sys.stderr.write(f"[{proposed}] ")
        sys.stderr.flush()
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            output.error(ConfigError("this is not UTF-8 text", hint="set the terminal to UTF-8"))
            continue
        if not line:
            sys.stderr.write("\n")
            raise Interrupted("init was left")
        try:
            return read(line.strip() or proposed)
        except ConfigError as error:
            output.error(error)
