"""What a node does again and again goes on after a round that failed: no surprise in one of them may end the node."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class Rounds:
    """One such task.

    Args:
        what: for the log, as "looking at the clocks".
        logger: of the task's room.
    """

    def __init__(self, what: str, logger: logging.Logger) -> None:
        self._what = what
        self._logger = logger
        self._said = ""  # of the error that the last round ended with

    @contextmanager
    def round(self) -> Iterator[None]:
        """Whatever goes wrong in the block ends the block. Said at full length once, and again when it is another.

        Being cancelled is no error, and passes.
        """
        try:
            yield
        except Exception as error:  # too many open files, a bug: the next round may do
            if (text := repr(error)) != self._said:
                self._logger.exception("%s failed, and is tried again", self._what)
            self._said = text
        else:
            if self._said:
                self._logger.warning("%s works again", self._what)
            self._said = ""
