"""The ``daaswarm`` program: collects the commands and turns every ending into an exit code."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from daaswarm import __version__
from daaswarm.api.control import RemoteError
from daaswarm.cli import bench, config, host_expert, infer, init, join, status
from daaswarm.cli.output import Output
from daaswarm.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    ConfigError,
    DaaswarmError,
    Interrupted,
    get_exit_code,
)

app = typer.Typer(
    name="daaswarm",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run a model whose experts live on other people's machines.",
    epilog='First time? Try [bold]daaswarm infer "What is the capital of France?"[/bold]',
)
app.command("init")(init.init)
app.command("join")(join.join)
app.command("host-expert")(host_expert.host_expert)
app.command("infer")(infer.infer)
app.command("status")(status.status)
app.add_typer(bench.app, name="bench")
app.add_typer(config.app, name="config")


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
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character must not end an answer
    # Waiting threads of OpenMP must sleep, not spin: requester and hosts may share the cores, and then a spinning
    # team was measured to slow the others down four times. libgomp reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = run(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is closed by now. Tearing down torch's modules one by one takes over a second, and a thread that was
    # left behind (a download that was interrupted) must not hold the prompt back.
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code. Every error becomes one message, never a traceback."""
    output = Output(as_json="--json" in arguments)
    try:
        return app(arguments, standalone_mode=False) or 0
    except TyperException as error:  # a word that the parser doesn't know
        if message := error.format_message():  # empty where the help was shown instead
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "daaswarm"
            output.error(ConfigError(message, hint=f"see {command} --help"))
        return EXIT_BAD_INPUT
    except RemoteError as error:
        output.error(error, error.described)
        return error.exit_code
    except DaaswarmError as error:
        if isinstance(error, Interrupted) and not output.as_json:
            output.message("interrupted")  # the user knows why
        else:
            output.error(error)
        return get_exit_code(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone: nobody to tell
        sys.stderr.close()
        return EXIT_INTERRUPTED
    finally:
        logging.shutdown()
