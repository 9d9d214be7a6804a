"""What a command shows: text and one-line messages for people, JSON lines for scripts."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from daaswarm.api.control import describe_error
from daaswarm.cli.progress import BARS
from daaswarm.errors import DaaswarmError

WAITING = "waiting for the answer"


class Output:
    """The result of a command goes to standard output; progress and chatter go to standard error.

    A result is what the command was run for: an answer, an identity, a setting, the addresses of a node that is ready.

    Args:
        as_json: JSON lines on standard output and nothing else there.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(stderr=True, highlight=False, emoji=False)  # no :x: in a path becomes a picture
        self.answers = Console(highlight=False, emoji=False)
        self._at_line_start = True

    def json(self, event: dict[str, Any]) -> None:
        """One line of JSON, if that was asked for."""
        if self.as_json:
            is_utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
            sys.stdout.write(json.dumps(event, ensure_ascii=not is_utf8) + "\n")
            sys.stdout.flush()

    def result(self, text: str) -> None:
        """A line of the result, for people. Never cut into several: it may be copied, or read by a program."""
        self.end_progress()
        self.end_line()
        if not self.as_json:
            self.answers.print(text, soft_wrap=True, markup=False)
            sys.stdout.flush()

    def rows(self, rows: Iterable[tuple[str, str]]) -> None:
        """A result of named values, one a line."""
        self.end_progress()
        shown = list(rows)
        width = max((len(name) for name, _ in shown), default=0)
        for name, value in shown:
            self.answers.print(f"[bold]{name:<{width}}[/bold]  {escape(value)}", soft_wrap=True)
        sys.stdout.flush()

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A result in columns, a line each: never broken, since a program may read it.

        On a terminal that is narrower than that, the columns of a row are below each other instead, each after its
        name; a word that is too long even so is the terminal's to break, so that it can be copied whole.
        """
        self.end_progress()
        lines = [[clean(cell) for cell in line] for line in (head, *rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        if self.answers.is_terminal and sum(widths) + 2 * (len(widths) - 1) > self.answers.width:
            self._show_below_each_other(lines[0], lines[1:])
        else:
            for number, line in enumerate(lines):
                text = "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
                self.answers.print(Text(text, "" if number else "bold"), soft_wrap=True)
        sys.stdout.flush()

    def _show_below_each_other(self, names: list[str], rows: list[list[str]]) -> None:
        width = max(map(len, names)) + 2
        for number, row in enumerate(rows):
            if number:
                self.answers.print()
            for name, cell in zip(names, row, strict=True):
                room = max(self.answers.width - width, 1)
                for part in textwrap.wrap(cell, room, break_long_words=False, break_on_hyphens=False):
                    self.answers.print(Text.assemble((f"{name:<{width}}", "bold"), part), soft_wrap=True)
                    name = ""

    def message(self, text: str) -> None:
        """A line for people about what is going on. Progress goes on below it."""
        self.end_line()
        if not self.as_json:
            BARS.print(self.console, text)

    def text(self, piece: str) -> None:
        """A piece of the answer, as it comes."""
        self.end_progress()
        if not self.as_json:
            if sys.stdout.isatty():  # hosts have a hand in the text; it must not steer a terminal
                piece = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
            self._at_line_start = piece.endswith("\n")

    def end_line(self) -> None:
        """Start what follows on a line of its own."""
        if not self._at_line_start:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._at_line_start = True

    def event(self, event: dict[str, Any]) -> None:
        """Show one event of a command that runs for a while."""
        if event.get("event") == "progress":
            self.progress(event["what"], event["done"], event["total"], unit=event.get("unit", ""))
            self.json(event)
            return
        self.json(event)
        if event.get("event") == "message":
            self.message(event["text"])

    def progress(self, what: str, done: int, total: int, *, unit: str = "") -> None:
        """A bar on a terminal; nothing where nobody watches. With ``total`` 0 nobody can say how far it is."""
        if not self.as_json:
            BARS.show(self.console, what, done, total, unit=unit)

    def end_progress(self) -> None:
        BARS.end()

    def error(self, error: DaaswarmError, described: dict[str, Any] | None = None) -> None:
        """The last thing a failed command says: cause and next step."""
        self.end_progress()
        self.end_line()
        if self.as_json:
            self.json(described or describe_error(error))
            return
        self.console.print(f"[bold red]error:[/bold red] {escape(error.message)}", soft_wrap=True)
        if error.hint:
            self.console.print(f"[dim]hint:[/dim] {escape(error.hint)}", soft_wrap=True)


def escape(text: str) -> str:
    """:func:`clean`, and not read as markup."""
    from rich.markup import escape as escape_markup

    return escape_markup(clean(text))


def clean(text: str) -> str:
    """Text from outside must not move the cursor, nor take more than its line."""
    line = " ".join(text.split("\n"))
    return "".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in line)


def describe_retries(retries: int) -> str:
    """Calls that were made again, elsewhere."""
    return "1 retry" if retries == 1 else f"{retries} retries"
