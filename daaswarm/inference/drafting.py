"""Prompt lookup: what followed the last few tokens where they stood before is a guess at what follows now.

Guesses go through the model with the next token, in the same pass, so that a round trip brings several tokens where
they are right. What is wrong is thrown away: the answer stays the same (Saxena 2023, "prompt lookup decoding").
"""

from __future__ import annotations

NGRAMS = (3, 2)  # tokens that must have stood there before; longer ones are tried first
MOST = 7  # tokens guessed at once: with the next one eight rows a pass
FEW = 3  # where guesses were wrong of late
WEIGHT = 0.3  # of the newest pass in averages
MARGIN = 0.05  # tokens a pass that a guess must promise beyond its cost
RETRY_TOKENS = 32  # after so many without a guess one is tried again: a text may begin to repeat itself


class Lookup:
    """Where each run of tokens of one text stood last.

    Args:
        ids: the text; grows behind its end only.
    """

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids
        self._seen: dict[tuple[int, ...], int] = {}  # a run: the place behind it
        self._indexed = 0  # places up to here are in it

    def propose(self, most: int) -> list[int]:
        """What may come next, up to ``most`` tokens; nothing where the last tokens are new."""
        ids, end = self._ids, len(self._ids)
        for place in range(self._indexed + 1, end):  # runs that end before the text's end: those can be continued
            for n in NGRAMS:
                if place >= n:
                    self._seen[tuple(ids[place - n : place])] = place
        self._indexed = max(self._indexed, end - 1)
        for n in NGRAMS:
            if end > n and (place := self._seen.get(tuple(ids[end - n :]))) is not None:
                period = end - place  # what follows is taken to go on like that where the text ends
                return [ids[place + i % period] for i in range(most)]
        return []


class Drafts:
    """The guesses of one answer.

    Args:
        ids: its tokens, as they grow.
    """

    def __init__(self, ids: list[int]) -> None:
        self._lookup = Lookup(ids)
        self._ids = ids
        self._gain = float(FEW)  # right guesses a pass with some, averaged; well-disposed at first
        self._tried_at = 0  # tokens there were

    def propose(self, room: int, cost: float) -> list[int]:
        """Args:
        room: tokens that the answer may still grow by.
        cost: of a pass with guesses, in passes without.
        """
        if 1 + self._gain < cost + MARGIN and len(self._ids) - self._tried_at < RETRY_TOKENS:
            return []
        return self._lookup.propose(min(room - 1, MOST if self._gain >= 1 else FEW)) if room > 1 else []

    def note(self, right: int) -> None:
        """So many guesses of a pass were what came."""
        self._gain += WEIGHT * (right - self._gain)
        self._tried_at = len(self._ids)


class PassTimes:
    """What passes cost with guesses and without, as measured."""

    def __init__(self) -> None:
        self._plain_s = self._drafted_s = 0.0

    @property
    def cost(self) -> float:
        """Of a pass with guesses, in passes without; 1 where it isn't known yet."""
        return self._drafted_s / self._plain_s if self._plain_s and self._drafted_s else 1.0

    def note(self, seconds: float, *, drafted: bool) -> None:
        """A pass of answers that grow by a token, or by more."""
        if drafted:
            self._drafted_s += (WEIGHT if self._drafted_s else 1.0) * (seconds - self._drafted_s)
        else:
            self._plain_s += (WEIGHT if self._plain_s else 1.0) * (seconds - self._plain_s)
