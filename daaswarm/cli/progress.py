"""Progress bars on the terminal. A process has one terminal, so there is one set of bars, whichever part shows them."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.text import Text

from daaswarm.types import format_bytes

WIDE = 80  # columns; on a narrower terminal the bar gives its room to the words
BAR, BAR_NARROW = 40, 8


class Bars:
    """The bars that are shown now; none most of the time."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def show(self, console: Console, what: str, done: int, total: int, *, unit: str = "") -> None:
        """Show how far ``what`` is; with ``total`` 0 that it goes on, and for how long it has; with
        ``unit`` "bytes" also how fast.

        A bar that is full goes away. Nothing is shown where nobody watches, or a cursor can't be moved.
        """
        if not console.is_terminal or console.is_dumb_terminal:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(BAR if console.width >= WIDE else BAR_NARROW),
                _Percentage(),
                _Rate(),
                _Time(),
                console=console,
                transient=True,
            )
            self._progress.start()
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total or None, unit=unit)
        self._progress.update(self._tasks[what], completed=done, total=total or None)
        if total and done >= total:
            self.drop(what)

    def drop(self, what: str) -> None:
        """Take one bar away."""
        if self._progress is not None and what in self._tasks:
            self._progress.remove_task(self._tasks.pop(what))
            if not self._tasks:
                self.end()

    def end(self) -> None:
        """Take them all away, and give the cursor back."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._tasks = {}

    def print(self, console: Console, text: str) -> None:
        """A line above the bars. No markup; never cut into several."""
        (self._progress.console if self._progress is not None else console).print(text, soft_wrap=True, markup=False)


class _Percentage(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.percentage:>3.0f}%")


class _Rate(ProgressColumn):
    max_refresh = 0.5  # seconds

    def render(self, task: Task) -> Text:
        return Text(f"{format_bytes(task.speed)}/s" if task.fields.get("unit") == "bytes" and task.speed else "")


class _Time(ProgressColumn):
    """What remains, or where nobody can say, what has passed."""

    max_refresh = 0.5  # seconds

    def __init__(self) -> None:
        super().__init__()
        self._remaining, self._elapsed = Remaining(), TimeElapsedColumn()

    def render(self, task: Task) -> Text:
        return (self._elapsed if task.total is None else self._remaining).render(task)


BARS = Bars()
