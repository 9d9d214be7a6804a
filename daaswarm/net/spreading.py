"""Carries out what the membership and gossip cores decide."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import trio

from daaswarm.core.adverts import AdvertBook, Known
from daaswarm.core.gossip import WAIT_S, Gossip
from daaswarm.core.membership import TICK_S, Membership
from daaswarm.core.membership_events import (
    Answered,
    Doubtful,
    Effect,
    Event,
    Misbehaved,
    QueryDone,
    Reply,
    ReplyReceived,
    RequestFailed,
    RequestReceived,
    SendRequest,
    WantMembers,
)
from daaswarm.core.notary import Notary
from daaswarm.core.rng import Rng
from daaswarm.errors import (
    Busy,
    ConnectionLost,
    DaaswarmError,
    DeadlineExceeded,
    LocalProtocolError,
    RemoteProtocolError,
    Unreachable,
)
from daaswarm.messages import AskSwarm, Contact, Doubted, Failure, Offers, Pong, Pulled, Pushed, Spreading
from daaswarm.net.failures import get_failure
from daaswarm.net.network import Network
from daaswarm.types import ModelRoot, PeerId

ANSWER_S = 10.0  # for an answer that takes others' answers; no asker waits longer
ANSWERS = 1_024  # such answers under way; a peer has a few dozen

GONE = (Unreachable, ConnectionLost, DeadlineExceeded, RemoteProtocolError)
"""What a call raises if its peer may be dead, or somebody else is where it was. A refusal says that it lives."""

LookUp = Callable[[ModelRoot], Awaitable[Sequence[Contact]]]

logger = logging.getLogger(__name__)


class Spreader:
    """Telling and hearing who serves what.

    Args:
        get_neighbours: whom queries go to.
        look_up: whom the DHT points to for a model.
        get_load: calls that wait in this node.
    """

    def __init__(
        self,
        network: Network,
        notary: Notary,
        rng: Rng,
        swarm: bytes,
        get_neighbours: Callable[[], Sequence[Contact]],
        look_up: LookUp,
    ) -> None:
        self.get_load: Callable[[], float] = lambda: 0.0
        self.membership = Membership(notary, AdvertBook(swarm), rng)
        self.gossip = Gossip(notary, self.membership, rng, get_neighbours, lambda: self.get_load())
        self._network = network
        self._notary = notary
        self._look_up = look_up
        self._nursery: trio.Nursery | None = None
        self._requests = 0
        self._answers: dict[int, tuple[trio.Event, list[Answered]]] = {}
        self._queries: dict[str, tuple[trio.Event, list[QueryDone]]] = {}
        self._waiting: dict[PeerId, dict[trio.CancelScope, float]] = {}  # for its answer; and what is left of its time
        self._said = trio.Event()

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Send what the cores want sent, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                while True:
                    await trio.sleep(TICK_S)
                    self.perform(self.membership.tick(time.time()))
                    self.perform(self.gossip.tick(time.time()), self.gossip)
            finally:
                self._nursery = None

    # -- for this node ----------------------------------------------------------------------------------------------

    async def ask(self, **what: Any) -> list[Known]:
        """What the swarm answers to a query of :meth:`daaswarm.core.gossip.Gossip.ask`; checked, not asked whether it
        still holds."""
        self._requests += 1
        query_id = f"query-{self._requests}"
        done: list[QueryDone] = []
        event = trio.Event()
        self._queries[query_id] = event, done
        try:
            self.perform(self.gossip.ask(query_id, time.time(), **what), self.gossip)
            with trio.move_on_after(WAIT_S + 2 * TICK_S):
                await event.wait()
        finally:
            del self._queries[query_id]
        found: list[Known] = []
        for signed in done[0].found if done else []:
            try:
                found.append(self._notary.open_advert(signed, time.time()))
            except RemoteProtocolError as error:  # it has expired since
                logger.debug("an offer has passed: %s", error)
        return found

    @contextmanager
    def noting(self, peer: PeerId, *, doubted_s: float) -> Iterator[None]:
        """A call to ``peer`` whose outcome says whether it lives.

        Raises:
            DeadlineExceeded: others can't reach it either, and ``doubted_s`` since that became known have passed.
        """
        scope = trio.CancelScope()
        waiting = self._waiting.setdefault(peer, {})
        waiting[scope] = doubted_s
        try:
            with scope:
                yield
            if scope.cancelled_caught:
                raise DeadlineExceeded(f"{peer} doesn't answer others either")
        except GONE:
            self.note_failed(peer)
            raise
        except DaaswarmError:
            raise  # it may live, or this node is at its limits
        else:
            self.perform(self.membership.note_alive(peer, time.time()))
        finally:
            del waiting[scope]
            if not waiting:
                self._waiting.pop(peer, None)

    def note_failed(self, peer: PeerId) -> None:
        """Something of this node's got no answer from it: whether it lives is found out."""
        self.perform(self.membership.note_failed(peer, time.time()))

    async def say_goodbye(self) -> None:
        """Withdraw everything, and wait until that is said. The caller sets the deadline."""
        self.perform(self.membership.leave(time.time()))
        while not self.membership.has_said_goodbye() and self._nursery is not None:
            self._said = trio.Event()
            await self._said.wait()

    # -- for others ---------------------------------------------------------------------------------------------------

    async def answer(
        self, peer: PeerId, contact: Contact | None, message: Spreading
    ) -> Pushed | Pulled | Doubted | Offers | Pong | Failure:
        """The reply to a peer's request.

        Raises:
            Busy: too much is being asked.
            RemoteProtocolError: the request contradicts itself.
        """
        if len(self._answers) >= ANSWERS:
            raise Busy("too many questions wait for their answers", retry_after_s=TICK_S)
        self._requests += 1
        request_id = self._requests
        event = trio.Event()
        replies: list[Answered] = []
        self._answers[request_id] = event, replies
        core = self.gossip if isinstance(message, AskSwarm) else self.membership
        try:
            request = RequestReceived(request_id=request_id, peer=peer, contact=contact, message=message)
            self.perform(core.handle(request, time.time()), core)
            with trio.move_on_after(ANSWER_S):
                await event.wait()
        finally:
            del self._answers[request_id]
        if not replies:
            raise Busy("no answer in time", retry_after_s=TICK_S)
        return replies[0]

    # -- carrying out -------------------------------------------------------------------------------------------------

    def perform(self, effects: list[Effect], core: Membership | Gossip | None = None) -> None:
        """Effects of the membership's, unless said otherwise."""
        core = core or self.membership
        for effect in effects:
            if isinstance(effect, Reply):
                waiting = self._answers.get(effect.request_id)
                if waiting is not None:
                    waiting[1].append(effect.message)
                    waiting[0].set()
            elif isinstance(effect, QueryDone):
                asked = self._queries.get(effect.query_id)
                if asked is not None:
                    asked[1].append(effect)
                    asked[0].set()
            elif isinstance(effect, Misbehaved):
                logger.info("%s misbehaved: %s", effect.peer, effect.reason)
            elif isinstance(effect, Doubtful):
                for scope, seconds in self._waiting.get(effect.peer, {}).items():
                    scope.deadline = min(scope.deadline, trio.current_time() + seconds)
            elif self._nursery is None:  # not started or leaving: nothing is sent any more
                continue
            elif isinstance(effect, SendRequest):
                self._nursery.start_soon(self._send, effect, core)
            else:
                self._nursery.start_soon(self._introduce, effect)

    async def _introduce(self, effect: WantMembers) -> None:
        try:
            contacts = await self._look_up(effect.root)
        except LocalProtocolError as error:  # too many lookups are running; the core will ask again
            logger.debug("%s", error)
            return
        self.perform(self.membership.introduce(effect.root, contacts, time.time()))

    async def _send(self, effect: SendRequest, core: Membership | Gossip) -> None:
        event: Event = RequestFailed(rpc_id=effect.rpc_id)
        try:
            reply, _ = await self._network.call(effect.contact, effect.message, deadline_s=effect.deadline_s)
        except GONE as error:
            logger.debug("%s to %s: %s", type(effect.message).__name__, effect.contact.peer_id, error)
        except DaaswarmError as error:
            event = ReplyReceived(rpc_id=effect.rpc_id, message=get_failure(error))
        else:
            if isinstance(reply, Pong | Pushed | Pulled | Doubted | Offers):
                event = ReplyReceived(rpc_id=effect.rpc_id, message=reply)
        try:
            self.perform(core.handle(event, time.time()), core)
        except Exception:  # a bug of ours costs one request, not the node
            logger.exception("an answer of %s could not be handled", effect.contact.peer_id)
        self._said.set()
