"""``daaswarm logs``: what a node wrote to its log file."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from daaswarm.cli.options import DataDirOption, JsonOption, open_data_dir
from daaswarm.cli.output import Output
from daaswarm.errors import ConfigError, StorageError
from daaswarm.store.log_file import LEVELS, LogReader, LogRecord, get_log_files

LINES = 50  # shown when nobody says how many: a screen or two
LINES_MAX = 1_000_000  # more than all files hold
POLL_S = 0.25  # between two looks; a person reads no faster


def complete_levels(incomplete: str) -> list[str]:
    return [level for level in LEVELS if level.startswith(incomplete)]


def logs(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on showing new ones until Ctrl-C.")] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, max=LINES_MAX, help="How many records to show, the last ones.")
    ] = LINES,
    level: Annotated[
        str, typer.Option("--level", autocompletion=complete_levels, help="Only this and worse: debug to error.")
    ] = "debug",
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the log of the node on this folder, running or not. Times are UTC.

    With --json each record is a line, and the last line says how many there were and where they are.

    Example: daaswarm logs -f --level warning
    """
    if level not in LEVELS:
        raise ConfigError(f"--level {level!r} is not known", hint=f"choose from {', '.join(LEVELS)}")
    output = Output(as_json=as_json)
    path = open_data_dir(data_dir).log_path
    try:
        with LogReader(path, LEVELS[level]) as reader:
            if not get_log_files(path):
                output.message(f"no log yet: daaswarm join and host-expert write it to {path}")
            last = reader.read_last(lines)
            for record in last:
                show(record, output)
            if not follow:
                output.json({"path": str(path), "records": len(last)})
            while follow:
                time.sleep(POLL_S)
                for record in reader.read_new():
                    show(record, output)
    except OSError as error:
        raise StorageError(
            f"{error.filename} can't be read: {error.strerror}", hint="check its owner and mode"
        ) from error


def show(record: LogRecord, output: Output) -> None:
    if output.as_json:
        level = record.level.lower()
        output.json({"event": "log", "time": record.time, "level": level, "logger": record.logger, "text": record.text})
    else:
        for line in record.format().split("\n"):
            output.result(line)
