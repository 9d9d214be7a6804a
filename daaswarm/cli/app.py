"""The ``daaswarm`` program: collects the commands and turns every ending into an exit code."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from daaswarm import __version__
from daaswarm.api.control import RemoteError
from daaswarm.cli import (
    bench,
    completion,
    config,
    expert,
    host_expert,
    infer,
    init,
    join,
    logs,
    model,
    network,
    peers,
    plan,
    reset,
    status,
    swarm,
)
from daaswarm.cli.output import Output
from daaswarm.cli.progress import BARS
from daaswarm.cli.streams import finish_writing, set_up_streams
from daaswarm.errors import (
    EXIT_BAD_INPUT,
    EXIT_OK,
    ConfigError,
    DaaswarmError,
    Interrupted,
    OutputLost,
    get_exit_code,
)

app = typer.Typer(
    name="daaswarm",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,  # daaswarm completion does it
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run a model whose experts live on other people's machines.",
    epilog='First time? Try [bold]daaswarm infer "What is the capital of France?"[/bold] '
    "· Tab completes words after [bold]daaswarm completion install[/bold]",
)
app.command("init")(init.init)
app.command("join")(join.join)
app.command("host-expert")(host_expert.host_expert)
app.command("infer")(infer.infer)
app.command("plan")(plan.plan)
app.command("status")(status.status)
app.command("logs")(logs.logs)
app.command("reset")(reset.reset)
app.add_typer(expert.app, name="expert")
app.add_typer(peers.app, name="peers")
app.add_typer(network.app, name="network")
app.add_typer(swarm.app, name="swarm")
app.add_typer(model.app, name="model")
app.add_typer(bench.app, name="bench")
app.add_typer(config.app, name="config")
app.add_typer(completion.app, name="completion")


def show_version(value: bool) -> None:
    if value:
        print(f"daaswarm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The whole program; doesn't return."""
    set_up_streams()
    # Waiting threads of OpenMP must sleep, not spin: requester and hosts may share the cores, and then a spinning
    # team was measured to slow the others down four times. libgomp reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OutputLost as error:  # after what typer itself prints; else it was said already
        if code == EXIT_OK:
            code = tell_lost(error)
    sys.stderr.flush()
    finish_writing()
    if (cache := sys.modules.get("daaswarm.models.cache")) is not None:
        cache.remove_unfinished()  # as at a normal exit
    # Everything is closed by now. Tearing down torch's modules one by one takes over a second, and a thread that was
    # left behind (a download that was interrupted) must not hold the prompt back.
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code. Every error becomes one message, never a traceback."""
    try:
        return run_command(arguments)
    except OutputLost as error:
        return tell_lost(error)
    finally:
        BARS.end()  # an error may have come while one was shown; the cursor is hidden then
        logging.shutdown()


def run_command(arguments: list[str]) -> int:
    """:func:`run`, as long as standard output can be written to.

    Raises:
        OutputLost: it can't.
    """
    output = Output(as_json="--json" in arguments)
    if completion.VARIABLE in os.environ:
        completion.prepare()
    try:
        return app(arguments, prog_name="daaswarm", standalone_mode=False) or 0
    except TyperException as error:  # a word that the parser doesn't know
        if message := error.format_message():  # empty where the help was shown instead
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "daaswarm"
            output.error(ConfigError(message, hint=f"see {command} --help"))
        return EXIT_BAD_INPUT
    except RemoteError as error:
        output.error(error, error.described)
        return error.exit_code
    except OutputLost:
        raise
    except DaaswarmError as error:
        if isinstance(error, Interrupted) and not output.as_json:
            output.message("interrupted")  # the user knows why
        else:
            output.error(error)
        return get_exit_code(error)


def tell_lost(error: OutputLost) -> int:
    """Say that standard output failed, unless its reader just had enough; the exit code."""
    if not error.is_closed:
        Output(as_json=False).error(error)  # on standard error even with --json: the other way is shut
    return get_exit_code(error)
