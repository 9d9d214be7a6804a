"""``daaswarm reset``: forget what this node has learnt."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Annotated

import typer

from daaswarm.cli.options import DataDirOption, JsonOption, open_data_dir
from daaswarm.cli.output import Output
from daaswarm.errors import EXIT_FAILED, ConfigError
from daaswarm.store.reset import ResetPlan, plan_reset, remove
from daaswarm.types import format_bytes


def reset(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Remove identity, swarm keys and settings too: the next node is a new peer.")
    ] = False,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what a node wrote to its folder: database, logs, chat history. Key and settings stay unless --all.

    Models are kept in the cache, which is not touched. Shows what goes, with sizes, and asks.

    Example: daaswarm reset --yes
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    with ExitStack() as stack:
        plan = ResetPlan([], [], [])
        if folder.path.is_dir() and any(folder.path.iterdir()):
            if not folder.is_used():
                raise ConfigError(f"{folder.path} is not the folder of a node", hint="see daaswarm status for yours")
            stack.enter_context(folder.lock())
            plan = plan_reset(folder, everything=everything)
        total = sum(item.bytes for item in plan.doomed)
        if not plan.doomed:
            output.message(f"nothing to remove in {folder.path}")
        else:
            describe(plan, total, output)
            if not yes and not ask(as_json):
                output.message("nothing was removed")
                raise typer.Exit(EXIT_FAILED)
            remove(folder, plan)
            output.message(f"removed {format_bytes(total)} from {folder.path}")
        output.json(
            {
                "data_dir": str(folder.path),
                "removed": [{"path": str(item.path), "bytes": item.bytes} for item in plan.doomed],
                "kept": [str(path) for path in plan.kept],
                "foreign": [str(path) for path in plan.foreign],
                "bytes": total,
            }
        )


def describe(plan: ResetPlan, total: int, output: Output) -> None:
    """Say what goes and what stays, before anything does."""
    output.message("to be removed:")
    for item in plan.doomed:
        output.message(f"  {format_bytes(item.bytes):>9}  {item.path}")
    output.message(f"  {format_bytes(total):>9}  in all")
    if plan.kept:
        output.message(f"kept: {', '.join(path.name for path in plan.kept)} (--all removes these too)")
    if plan.foreign:
        output.message(f"not made by daaswarm, so left alone: {', '.join(path.name for path in plan.foreign)}")


def ask(as_json: bool) -> bool:
    """Whether the user says yes.

    Raises:
        ConfigError: there is nobody to ask.
    """
    if as_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError("reset removes files, and there is no terminal to ask on", hint="say daaswarm reset --yes")
    sys.stderr.write("Remove them? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
