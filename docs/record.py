"""Records the pictures of docs/images: real commands in a real pseudo-terminal, drawn as SVG.

    python docs/record.py              all of them (the default model is fetched once, 93 MB)
    python docs/record.py error chat   some of them

Needs the extra ``docs`` (pyte, a terminal emulator). The home folder is a scratch one, shown as /home/you. What stands
after ``$`` is what is run; nothing of what is shown is made up, and only that path is replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import pyte

IMAGES = Path(__file__).resolve().parent / "images"
HOME = b"/home/you"
COLUMNS, LINES = 100, 60
WAIT_S = 300.0  # for a text to be shown: the first command may fetch and convert the model
MODEL = "smollm2-135m-instruct"

CELL_WIDTH, CELL_HEIGHT, MARGIN = 8.4, 19, 14  # pixels
FONT = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"
BACKGROUND, FOREGROUND = "#16181d", "#d6d9df"
COLORS = {
    "black": "#4b5263", "red": "#f07178", "green": "#a3d76e", "brown": "#e6c07b", "blue": "#6cb6ff",
    "magenta": "#d19afd", "cyan": "#67d4d8", "white": "#d6d9df", "default": FOREGROUND,
}  # fmt: skip


class Recording:
    """A terminal in which one command after another is run.

    Args:
        home: the scratch home folder.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._shown = b""
        self._screen = pyte.Screen(COLUMNS, LINES)

    def run(self, *words: str, talk: Callable[[Talk], None] | None = None) -> int:
        """Run a command to its end; its exit code."""
        self._shown += b"$ " + " ".join(quote(word) for word in words).encode() + b"\r\n"
        side, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        process = subprocess.Popen(
            list(words), stdin=other, stdout=other, stderr=other, env=get_environment(self._home), cwd=self._home,
            start_new_session=True,
        )  # fmt: skip
        os.close(other)
        talking = Talk(side)
        if talk is not None:
            talk(talking)
        while talking.read():
            pass
        os.close(side)
        self._shown += talking.shown
        return process.wait()

    def draw(self) -> str:
        """What is on the screen now, as SVG."""
        pyte.ByteStream(self._screen).feed(self._shown.replace(os.fsencode(self._home), HOME))
        return make_svg(self._screen)


class Talk:
    """What a person at the terminal sees and types."""

    def __init__(self, side: int) -> None:
        self._side = side
        self.shown = b""
        self._seen = 0

    def read(self) -> bool:
        """Wait for more to be shown; ``False`` at the end."""
        if not select.select([self._side], [], [], WAIT_S)[0]:
            raise TimeoutError(self.shown[-500:])
        try:
            data = os.read(self._side, 65_536)
        except OSError:  # Linux says so when the other side is closed
            return False
        self.shown += data
        return bool(data)

    def wait_for(self, text: str) -> None:
        while text.encode() not in self.shown[self._seen :]:
            if not self.read():
                raise EOFError(self.shown[-500:])
        self._seen = self.shown.index(text.encode(), self._seen) + len(text.encode())

    def type(self, text: str) -> None:
        time.sleep(0.3)  # as a person would, so that the prompt is there
        os.write(self._side, text.encode())


def make_svg(screen: Any) -> str:
    """A terminal's screen as a picture: text stays text, so that it can be read out, searched and copied."""
    rows = [[screen.buffer[y][x] for x in range(screen.columns)] for y in range(screen.lines)]
    while rows and all(cell.data == " " for cell in rows[-1]):
        rows.pop()
    width = round(screen.columns * CELL_WIDTH + 2 * MARGIN)
    height = len(rows) * CELL_HEIGHT + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>',
        f'<g font-family="{FONT}" font-size="14" xml:space="preserve">',
    ]
    for y, row in enumerate(rows):
        parts += draw_row(row, MARGIN + y * CELL_HEIGHT + 14)
    return "\n".join([*parts, "</g>", "</svg>"]) + "\n"


def draw_row(row: list[Any], baseline: int) -> Iterator[str]:
    """One element for each run of cells that look the same."""
    x = 0
    for (color, bold), cells in groupby(row, key=lambda cell: (cell.fg, cell.bold)):
        text = "".join(cell.data for cell in cells)
        start, x = x, x + len(text)
        if not text.strip():
            continue
        start += len(text) - len(text.lstrip())
        text = text.strip()
        fill = COLORS.get(color) or f"#{color}"
        weight = ' font-weight="bold"' if bold else ""
        yield (
            f'<text x="{MARGIN + start * CELL_WIDTH:.1f}" y="{baseline}" fill="{fill}"{weight} '
            f'textLength="{len(text) * CELL_WIDTH:.1f}">{escape(text)}</text>'
        )


def quote(word: str) -> str:
    return f'"{word}"' if " " in word else word


def get_environment(home: Path) -> dict[str, str]:
    """Nothing of this machine's but what programs need to run."""
    kept = {name: value for name, value in os.environ.items() if name in ("LANG", "TMPDIR", "SSL_CERT_FILE")}
    kept |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "OMP_"))}
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    return {**kept, "HOME": str(home), "PATH": path, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}


@contextlib.contextmanager
def hosting(home: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A host in the background; its address, and the process."""
    command = ["daaswarm", "host-expert", MODEL, *options]
    environment = get_environment(home)
    with subprocess.Popen(
        [shutil.which(command[0], path=environment["PATH"]) or command[0], *command[1:]],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=home,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready")
            yield process.stdout.readline().strip(), process
        finally:
            process.send_signal(signal.SIGTERM)


def record_demo(home: Path) -> str:
    recording = Recording(home)
    assert recording.run("daaswarm", "infer", "What is the capital of France?", "--embedded", "3") == 0
    return recording.draw()


def record_swarm(home: Path) -> dict[str, str]:
    """Two hosts with half of the model each: an answer, the state of one, and what is said when the other is gone."""
    pictures: dict[str, str] = {}
    with hosting(home, "--layers", "0-14") as (address, _):
        with hosting(home, "--layers", "15-29", "--data-dir", str(home / "other"), "--bootstrap", address):
            recording = Recording(home)
            ask = ("daaswarm", "infer", "Explain in two sentences what a hash table is.", "--max-tokens", "80")
            assert recording.run(*ask) == 0
            pictures["infer"] = recording.draw()
            recording = Recording(home)
            recording.run("daaswarm", "status")
            pictures["status"] = recording.draw()
        recording = Recording(home)
        assert recording.run("daaswarm", "infer", "Are you still there?") == 3
        assert recording.run("daaswarm", "host-expert", MODEL, "--layers", "0-40", "--data-dir", "third") == 2
        pictures["error"] = recording.draw()
    return pictures


def record_chat(home: Path) -> str:
    def talk(person: Talk) -> None:
        person.wait_for("leaves")
        for question in ("What is the capital of France?", "And of Italy?"):
            person.type(question + "\r")
            person.wait_for("by whom]")
        person.type("/receipt\r")
        person.wait_for("a call")
        person.type("\x04")

    recording = Recording(home)
    assert recording.run("daaswarm", "infer", talk=talk) == 0
    return recording.draw()


def make_home(folder: Path) -> Path:
    """A home with ``daaswarm`` on its path, and the cache that is there already."""
    from daaswarm.config import get_cache_dir

    home = folder / "you"
    program = home / "bin" / "daaswarm"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m daaswarm "$@"\n')
    program.chmod(0o755)
    (home / ".cache").mkdir()
    get_cache_dir().mkdir(parents=True, exist_ok=True)
    (home / ".cache" / "daaswarm").symlink_to(get_cache_dir().absolute())
    return home


def main(wanted: list[str]) -> None:
    IMAGES.mkdir(exist_ok=True)
    pictures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = make_home(Path(folder))
        os.environ["PATH"] = get_environment(home)["PATH"]  # where the commands are looked for
        if not wanted or "demo" in wanted:
            pictures["demo"] = record_demo(home)
        if not wanted or "chat" in wanted:
            pictures["chat"] = record_chat(home)
        if not wanted or {"infer", "status", "error"} & set(wanted):
            pictures |= record_swarm(home)
        for name, picture in pictures.items():
            assert str(folder) not in picture, f"{name} shows the scratch folder"
    for name, picture in pictures.items():
        if not wanted or name in wanted:
            (IMAGES / f"{name}.svg").write_text(picture, "utf-8")
            sys.stdout.write(f"docs/images/{name}.svg\n")


if __name__ == "__main__":
    main(sys.argv[1:])
