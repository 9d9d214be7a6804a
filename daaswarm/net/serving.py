"""What a peer asks over one connection: carried out inline where the handler can, else in a task of the connection's.

All of it runs in trio's thread. A task ends with the call's deadline, or when the peer gives the call up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

import trio

from daaswarm.errors import ConnectionLost, DaaswarmError, DeadlineExceeded
from daaswarm.messages import Failure, Ping, Pong
from daaswarm.net.failures import get_failure
from daaswarm.net.network import Answer, FastHandler, Handler
from daaswarm.net.transfers import CallCancelled, Event, RequestReceived

if TYPE_CHECKING:
    from daaswarm.net.connection import Connection

log = logging.getLogger(__name__)

INLINE_S = 0.01  # of one read's requests are computed inline before the rest get tasks: other peers wait meanwhile
ECHO_BYTES = 64 * 1024  # of a ping's body that come back; it costs the asker as much as this node
INTERNAL_ERROR = "internal error; the host's log has the details"


class Serving:
    """The serving side of ``connection``.

    Args:
        handler, fast_handler: see ``network.py``.
        get_near: what a ping is answered with.
    """

    def __init__(
        self,
        connection: Connection,
        handler: Handler,
        fast_handler: FastHandler | None,
        get_near: Callable[[], bytes],
    ) -> None:
        self._connection = connection
        self._handler = handler
        self._fast_handler = fast_handler
        self._get_near = get_near
        self._scopes: dict[int, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None

    def open(self, nursery: trio.Nursery) -> None:
        """Calls get their tasks there from now on."""
        self._nursery = nursery

    @property
    def tasks(self) -> int:
        """Calls that have a task which has not ended."""
        return len(self._scopes)

    def dispatch(self, events: list[Event]) -> None:
        """Begin the calls that were received, end the tasks of those that were given up. Never raises: a bug ends the
        connection."""
        try:
            self._carry_out(events)
        except Exception:
            log.exception("serving on the connection with %s failed", self._connection.peer_id)
            self._connection.close(ConnectionLost("internal error; the log has the details"))
            for event in events:
                if isinstance(event, RequestReceived) and event.call not in self._scopes:
                    self._connection.drop(event.call)

    def _carry_out(self, events: list[Event]) -> None:
        begin = monotonic()
        for event in events:
            if isinstance(event, RequestReceived):
                if not self._connection.is_open:
                    self._connection.drop(event.call)
                else:
                    self._serve(event, inline=monotonic() - begin < INLINE_S)
            elif isinstance(event, CallCancelled):
                scope = self._scopes.get(event.call)
                if scope is not None:
                    scope.cancel()

    def _serve(self, request: RequestReceived, inline: bool) -> None:
        if isinstance(request.message, Ping):
            pong = Pong(near=self._get_near(), time=time.time())
            if request.message.echo and len(request.body) <= ECHO_BYTES:
                self._connection.reply(request.call, pong, [bytes(request.body)])
            else:
                self._connection.reply(request.call, pong)
            return
        if inline and self._fast_handler is not None:
            try:
                answer = self._fast_handler(self._connection.peer_id, request.message, request.body, request.deadline_s)
            except DaaswarmError as error:
                answer = get_failure(error), ()
            except Exception:  # a bug of ours costs the call that met it, not the node
                log.exception("serving %s for %s failed", type(request.message).__name__, self._connection.peer_id)
                answer = Failure(code="error", message=INTERNAL_ERROR), ()
            if answer is not None:
                self._connection.reply(request.call, *answer)
                return
        assert self._nursery is not None
        # The scope stands before the task runs: a CANCEL may be the very next event.
        scope = trio.CancelScope(deadline=trio.current_time() + request.deadline_s)
        self._scopes[request.call] = scope
        self._nursery.start_soon(self._serve_in_task, request, scope)

    async def _serve_in_task(self, request: RequestReceived, scope: trio.CancelScope) -> None:
        answer: Answer = get_failure(DeadlineExceeded("not done by the call's deadline")), ()
        peer = self._connection.peer
        try:
            with scope:
                if not scope.cancel_called:
                    answer = await self._handler(
                        peer.peer_id, peer.contact, request.message, request.body, request.deadline_s
                    )
        except DaaswarmError as error:
            answer = get_failure(error), ()
        except Exception:  # likewise
            log.exception("serving %s for %s failed", type(request.message).__name__, peer.peer_id)
            answer = Failure(code="error", message=INTERNAL_ERROR), ()
        except BaseException:  # the connection ends, and with it what it counts
            self._connection.drop(request.call)
            raise
        finally:
            del self._scopes[request.call]
        self._connection.reply(request.call, *answer)
