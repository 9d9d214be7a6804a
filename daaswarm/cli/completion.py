"""``daaswarm completion``: Tab in bash, zsh and fish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from daaswarm.cli.options import DataDirOption, JsonOption
from daaswarm.cli.output import Output
from daaswarm.errors import ConfigError, StorageError

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_DAASWARM_COMPLETE"  # set by the scripts when they ask the program

app = typer.Typer(no_args_is_help=True, help="Tab completes commands, options, models, peers and settings.")


def complete_shells(incomplete: str) -> list[str]:
    return [shell for shell in SHELLS if shell.startswith(incomplete)]


ShellArgument = Annotated[
    str | None, typer.Argument(autocompletion=complete_shells, help="bash, zsh or fish; left out: the one you are in.")
]


@app.command("show")
def show(shell: ShellArgument = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Print the script that a shell reads, to put it somewhere yourself.

    Example: source <(daaswarm completion show bash)
    """
    output = Output(as_json=as_json)
    name = find_shell(shell)
    script = make_script(name)
    output.json({"shell": name, "script": script})
    output.result(script)


@app.command("install")
def install(shell: ShellArgument = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Write the script to your home folder, where new shells find it. Running it again changes nothing.

    Example: daaswarm completion install zsh
    """
    from typer._completion_shared import install as install_script

    output = Output(as_json=as_json)
    name = find_shell(shell)
    try:
        _, path = install_script(shell=name, prog_name="daaswarm", complete_var=VARIABLE)
    except OSError as error:
        where = error.filename or Path.home()
        raise StorageError(f"{where} can't be written: {error.strerror}", hint="check its owner") from error
    output.json({"shell": name, "path": str(path)})
    output.result(str(path))
    output.message(f"new {name} windows complete daaswarm with Tab")


def find_shell(given: str | None) -> str:
    """The shell that was named, or in which the program runs.

    Raises:
        ConfigError: none that is known.
    """
    if given is None:
        import shellingham

        try:
            given = str(shellingham.detect_shell()[0])
        except shellingham.ShellDetectionFailure:
            raise ConfigError(
                "can't tell which shell this is", hint="name it: daaswarm completion install bash"
            ) from None
    if given not in SHELLS:
        raise ConfigError(f"{given!r} is no shell that is known", hint=f"choose from {', '.join(SHELLS)}")
    return given


def make_script(shell: str) -> str:
    """What a shell has to read; typer answers what it asks later."""
    from typer._completion_shared import get_completion_script

    return get_completion_script(prog_name="daaswarm", complete_var=VARIABLE, shell=shell)


def prepare() -> None:
    """Have typer answer a shell, which it does when the script's variable is set."""
    from typer.completion import get_completion_inspect_parameters

    get_completion_inspect_parameters()
