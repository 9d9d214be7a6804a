"""The calls that a check takes: opening one again, asking a second host, deciding who is right."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

from daaswarm.core.reputation import COMPARED, EXACT, REFUSED
from daaswarm.errors import Busy, DaaswarmError, ExpertError, RemoteProtocolError, WrongAnswer
from daaswarm.inference.auditing import Auditor, is_near
from daaswarm.models.auditing import ABSTAIN, FAIL
from daaswarm.models.opened import OpenedReply, read_opened

if TYPE_CHECKING:
    import threading

    from torch import Tensor

    from daaswarm.inference.hedged import Computed, Sent
    from daaswarm.inference.shares import Share
    from daaswarm.messages import ExpertReply
    from daaswarm.net.pending import PendingCall
    from daaswarm.types import PeerId

BUSY_TRIES = 5  # to have a call opened by a host that is busy
BUSY_S = 0.5  # at most between two of them

logger = logging.getLogger(__name__)


class Asking(Protocol):
    """What a check needs of :class:`daaswarm.inference.swarm_experts.SwarmExperts`."""

    stop: threading.Event

    def submit(self, layer: int, peer: PeerId, share: Share, *, codec: str = "", opened: bool = False) -> Sent: ...

    def wait(self, call: PendingCall | Computed | DaaswarmError) -> tuple[ExpertReply, memoryview]: ...

    def read(self, item: Sent) -> Tensor: ...

    def find_twin(self, item: Sent) -> PeerId | None: ...


class Checks:
    """Checks of one :class:`SwarmExperts`; lives in its thread. Each method returns the sums to go on with.

    Raises (all methods):
        WrongAnswer: the host's answer is not to be used.
        DaaswarmError: the host didn't open its answer, which isn't to be used then either.
    """

    def __init__(self, auditor: Auditor, asking: Asking) -> None:
        self._auditor = auditor
        self._asking = asking

    def check_opened(self, item: Sent, answer: OpenedReply) -> Tensor:
        """A call that was opened at once."""
        return self._conclude(item, answer.sums, self._auditor.judge(item.request, item.share, answer))

    def check(self, item: Sent, sums: Tensor) -> Tensor:
        """A call that was answered, if the coin says so."""
        if not self._auditor.draws(item.peer):
            return sums
        if not self._auditor.fits(item.request.layer) or item.codec:
            return self._compare(item, sums)
        answer = self._open_again(item)
        return self._conclude(item, sums, self._auditor.judge(item.request, item.share, answer, sums))

    def _conclude(self, item: Sent, sums: Tensor, verdict: int) -> Tensor:
        if verdict == ABSTAIN:
            return self._decide(item, sums, None, None)
        self._auditor.use.sketched += 1
        if verdict == FAIL:
            raise self._blame(item.peer, item, EXACT, "an answer did not pass the check by sketches")
        self._auditor.note(item.peer, right=True)
        return sums

    def _open_again(self, item: Sent) -> OpenedReply:
        for attempt in range(BUSY_TRIES):
            again = self._asking.submit(item.request.layer, item.peer, item.share, opened=True)
            try:
                reply, body = self._asking.wait(again.call)
                return read_opened(again.request, reply, body)
            except Busy as error:
                if attempt == BUSY_TRIES - 1:
                    raise
                self._asking.stop.wait(min(error.retry_after_s, BUSY_S))
            except (ExpertError, RemoteProtocolError) as error:
                raise self._blame(item.peer, item, REFUSED, f"an answer was not opened: {error}") from error
        raise AssertionError

    def _compare(self, item: Sent, sums: Tensor) -> Tensor:
        """Have a second host compute the same."""
        twin = self._asking.find_twin(item)
        if twin is None:
            self._auditor.use.unchecked += 1
            return sums
        other = self._asking.submit(item.request.layer, twin, item.share)
        try:
            theirs = self._asking.read(other)
        except DaaswarmError as error:  # it says nothing about the first
            logger.info("layer %d: %s, asked beside another: %s", item.request.layer, twin, error)
            self._auditor.use.unchecked += 1
            return sums
        self._auditor.use.compared += 1
        if is_near(sums, theirs, item.share.rows.dtype):
            for peer in (item.peer, twin):
                self._auditor.note(peer, right=True, false_alarm=COMPARED)
            return sums
        return self._decide(item, sums, twin, theirs)

    def _decide(self, item: Sent, sums: Tensor, twin: PeerId | None, theirs: Tensor | None) -> Tensor:
        """Two hosts say different things, or one can't be judged: compute it here."""
        right = self._auditor.recompute(item.request, item.share)
        if right is None:
            if theirs is None:
                self._auditor.use.unchecked += 1
                return sums
            # Nobody here knows who lies, and two against one would prove nothing: neither is believed.
            if twin is not None:
                item.share.failed.add(twin)
            raise WrongAnswer(f"{item.peer} and {twin} disagree, and the weights to decide it aren't here")
        dtype = item.share.rows.dtype
        if twin is not None and theirs is not None:
            if is_near(theirs, right, dtype):
                self._auditor.note(twin, right=True, false_alarm=COMPARED)
            else:
                self._blame(twin, item, COMPARED, "an answer was not what was computed here")
        if not is_near(sums, right, dtype):
            raise self._blame(item.peer, item, COMPARED, "an answer was not what was computed here")
        self._auditor.note(item.peer, right=True, false_alarm=COMPARED)
        return sums

    def _blame(self, peer: PeerId, item: Sent, false_alarm: float, what: str) -> WrongAnswer:
        where = f"layer {item.request.layer}, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC"
        self._auditor.note(peer, right=False, false_alarm=false_alarm, why=f"{what} ({where})")
        return WrongAnswer(f"{peer}: {what}")
