"""How many of torch's threads a pass takes: waking a second one costs more than it saves where tensors are small.

Measured on two cores, the default model's trunk in f32: a token takes 27 ms with one thread and 31 ms with two; 100
tokens at once take 0.13 s and 0.12 s. A larger model on a machine with more cores needs more, so it is tried.
"""

from __future__ import annotations

import statistics

TRIES = 3  # passes with each number of threads; the median counts
FEW_ROWS = 4  # a pass of more takes all threads


class ThreadChoice:
    """Tries 1, 2, 4, … and ``most`` threads on the first passes of few rows, and stays with the fastest.

    Args:
        most: threads that this process may take.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._tried: dict[int, list[float]] = {n: [] for n in (*(2**i for i in range(most.bit_length())), most)}
        self._best: int | None = most if len(self._tried) == 1 else None

    def choose(self, rows: int) -> int:
        """Threads for a pass of so many rows."""
        if rows > FEW_ROWS:
            return self.most
        if self._best is not None:
            return self._best
        return min(self._tried, key=lambda n: len(self._tried[n]))

    def note(self, rows: int, threads: int, seconds: float) -> None:
        """A pass took so long, without its waits for others."""
        if rows > FEW_ROWS or self._best is not None:
            return
        self._tried[threads].append(seconds)
        if all(len(times) >= TRIES for times in self._tried.values()):
            self._best = min(self._tried, key=lambda n: statistics.median(self._tried[n]))
