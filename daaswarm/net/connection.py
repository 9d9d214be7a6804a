"""One live connection: a session on a carrier, driven by trio, usable from worker threads.

A lock guards session and carrier; it's only ever held for work that can't block. Writing: whoever queues a frame writes
it at once; what the socket doesn't take is left to the writer task, so no write is ever cancelled half-way. Reading:
at any time one reader. It's trio's task, unless a worker thread waits for an answer: then that thread reads the socket
itself (the *leader*), which spares two thread switches a call, and hands others' answers to whoever waits for them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic

import trio

from daaswarm.errors import Busy, ConnectionLost, DaaswarmError, DeadlineExceeded, RemoteProtocolError, TooLarge
from daaswarm.limits import CALL_S, IDLE_PING_S, WRITE_STALL_S
from daaswarm.messages import Failure, Ping, Reply, Request
from daaswarm.net.addresses import CIRCUIT
from daaswarm.net.carrier import Carrier, Signal
from daaswarm.net.failures import get_failure
from daaswarm.net.frames import Buffer, get_size
from daaswarm.net.handshake import ProvenPeer
from daaswarm.net.holding import Holding
from daaswarm.net.inbound import InboundBudget
from daaswarm.net.network import FastHandler, Handler
from daaswarm.net.pending import PendingCall
from daaswarm.net.serving import INTERNAL_ERROR, Serving
from daaswarm.net.session import Session
from daaswarm.net.transfers import CallFailed, Event, ReplyReceived

log = logging.getLogger(__name__)

FLUSH_BYTES = 1024 * 1024  # written in one go under the lock, about a millisecond; then others have their turn
LEAD_S = 0.005  # trio's reader looks again after this while a worker thread reads; waking it costs that thread time,
LEAD_MAX_S = 0.04  # so it takes twice as long each time that it was needless, up to this, unless a task waits
LOOK_S = 0.25  # a reading thread looks this often whether its call was cancelled meanwhile
PING_ANSWER_S = 10.0  # a peer that computes inline may answer a ping late, but not later than this


class Connection:
    """Args:

    carrier, is_client, peer: as the handshake left them.
    budget: the node's, shared by its connections.
    handler, fast_handler: see ``network.py``.
    early: bytes that came right behind the handshake.

    Create it in trio's thread and run :meth:`run` in a task.
    """

    def __init__(
        self,
        carrier: Carrier,
        peer: ProvenPeer,
        *,
        is_client: bool,
        budget: InboundBudget,
        handler: Handler,
        fast_handler: FastHandler | None = None,
        early: bytes = b"",
        get_near: Callable[[], bytes] = bytes,
    ) -> None:
        self.peer = peer
        self.peer_id = peer.peer_id
        self.remote_addr = carrier.remote_addr
        self.is_client = is_client
        self.is_relayed = CIRCUIT in carrier.remote_addr
        self.is_kept = False  # a relay's, and who is met through it: idle is what it mostly is
        self._carrier = carrier
        self._serving = Serving(self, handler, fast_handler, get_near)
        self._lock = threading.RLock()
        self._error: DaaswarmError | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.get_ident()
        self._session = Session(is_client=is_client, budget=budget, wake=self._on_room, peer=peer.peer_id)
        self._holding = Holding()
        self._unwritten = Signal()
        self._ended = trio.Event()
        self._early = early
        self._heard = 0  # reads that brought something
        self._reader = threading.Lock()  # held by whoever reads the carrier
        self._leads = 0  # how often a worker thread did
        self._tasks_waiting = 0  # calls that trio's tasks wait for
        self._look = trio.Event()  # trio's reader shouldn't wait any longer
        self._followers: deque[PendingCall] = deque()  # threads that wait while another one reads

    @property
    def is_open(self) -> bool:
        return self._error is None

    @property
    def is_idle(self) -> bool:
        """No calls either way."""
        return not (self._session.own_calls or self._session.served_calls)

    @property
    def served_calls(self) -> int:
        """Calls of the peer's whose answers are not wholly sent."""
        return self._session.served_calls

    async def run(self) -> None:
        """Drive the connection until it ends. Calls that are in flight then fail with ConnectionLost."""
        try:
            async with trio.open_nursery() as nursery:
                self._serving.open(nursery)
                nursery.start_soon(self._cancel_when_ended, nursery.cancel_scope)
                nursery.start_soon(self._write_loop)
                nursery.start_soon(self._keep_alive)
                try:
                    if self._early:
                        self._serving.dispatch(self._receive())
                    await self._read_loop()
                finally:
                    # Before the nursery closes: a thread that still reads must find nothing open to start tasks in.
                    self.close(ConnectionLost("this node is shutting down"))
        finally:
            with trio.CancelScope(shield=True):  # pyright: ignore[reportCallIssue] - wrong third-party stubs
                # The carrier was shut down, so a thread that reads it is about to notice. The lock is never given
                # back: no thread may read a socket whose number could belong to another file by then.
                while not self._reader.acquire(blocking=False):  # noqa: ASYNC110 - a thread gives it back, not a task
                    await trio.sleep(LEAD_S)
            self._carrier.close()

    async def call(
        self, message: Request, body: Sequence[Buffer] = (), *, deadline_s: float
    ) -> tuple[Reply, memoryview]:
        """Like ``Network.call``, on this connection."""
        deadline_s = min(deadline_s, CALL_S)
        done = Signal()
        pending = self.submit(message, body, deadline_s=deadline_s, on_done=done.set)
        self._tasks_waiting += 1
        self._look.set()
        try:
            with trio.move_on_after(deadline_s):
                await done.wait()
        except trio.Cancelled:
            pending.cancel()
            raise
        finally:
            self._tasks_waiting -= 1
        return pending.get_result(deadline_s)

    def submit(
        self,
        message: Request,
        body: Sequence[Buffer] = (),
        *,
        deadline_s: float,
        on_done: Callable[[], None] | None = None,
    ) -> PendingCall:
        """Write a call from any thread. The body must stay as it is until the answer.

        Raises:
            ConnectionLost: the connection has ended.
            Busy: too many calls are in flight, or the peer refused such a call a moment ago.
            TooLarge: the message or body is over its limit.
        """
        deadline_s = min(deadline_s, CALL_S)
        nbytes = sum(memoryview(part).nbytes for part in body)
        pending = PendingCall(self, deadline_s, on_done, type(message), nbytes)
        with self._lock:
            if self._error is not None:
                raise self._get_lost()
            self._holding.check(type(message), nbytes, deadline_s, pending.submitted_at)
            try:
                pending._call = self._session.send_request(pending, message, body, deadline_s)
            except ConnectionLost as error:
                self.close(error)
                raise
            self._flush()
        return pending

    def cancel(self, pending: PendingCall) -> None:
        """Tell the peer that nobody waits for this call any more."""
        with self._lock:
            if self._error is None and not pending.is_done():
                try:
                    self._session.cancel(pending._call)
                except RemoteProtocolError as error:
                    self.close(error)
                self._flush()
                if not pending.is_done():
                    pending.finish(None, None, ConnectionLost("the call was given up"))

    def close(self, reason: DaaswarmError) -> None:
        """End the connection. From any thread; the first reason stays."""
        with self._lock:
            if self._error is not None:
                return
            self._error = reason
            tickets = self._session.close()
            self._carrier.shut_down()
        level = logging.INFO if isinstance(reason, RemoteProtocolError) else logging.DEBUG
        log.log(level, "connection with %s at %s ended: %s", self.peer_id, self.remote_addr, reason)
        for ticket in tickets:
            assert isinstance(ticket, PendingCall)
            ticket.finish(None, None, self._get_lost())
        self._in_trio(self._ended.set)

    # -- reading ----------------------------------------------------------------------------------------------

    def wait_for(self, pending: PendingCall, deadline: float) -> None:
        """Block a worker thread until ``pending`` is done or ``deadline`` (monotonic, s) has passed."""
        can_lead = self._carrier.threads_can_read
        while not pending.is_done() and (remaining := deadline - monotonic()) > 0:
            if not can_lead:
                pending.sleep(remaining)
            elif self._reader.acquire(blocking=False):
                self._lead(pending, deadline)
            else:
                self._followers.append(pending)
                # Whoever reads now will wake a follower. If it stopped before we became one, nobody would.
                if self._reader.acquire(blocking=False):
                    self._lead(pending, deadline)
                else:
                    pending.sleep(remaining)

    def _lead(self, pending: PendingCall, deadline: float) -> None:
        """Read the carrier in this thread until ``pending`` is done. Gives ``_reader`` back."""
        self._leads += 1
        try:
            while not pending.is_done() and self._error is None and (remaining := deadline - monotonic()) > 0:
                self._carrier.wait_readable_blocking(min(remaining, LOOK_S))
                self.read_once()
        finally:
            self.stop_leading()

    # For ``racing.py``, which leads several connections at once.

    @property
    def threads_can_read(self) -> bool:
        return self._carrier.threads_can_read

    def try_lead(self) -> bool:
        """True: this thread reads from now on, until :meth:`stop_leading`. The socket isn't closed meanwhile."""
        if not self._carrier.threads_can_read or not self._reader.acquire(blocking=False):
            return False
        self._leads += 1
        return True

    def fileno(self) -> int:
        """The socket's number, for who leads."""
        return self._carrier.fileno()

    def read_once(self) -> None:
        """Read what is there; for who leads."""
        events = self._receive()
        if events:
            self._in_trio(self._serving.dispatch, events)

    def stop_leading(self) -> None:
        """Let others read."""
        self._reader.release()
        while self._followers:
            try:
                follower = self._followers.popleft()
            except IndexError:
                return
            if not follower.is_done():
                follower.wake()
                return

    async def _read_loop(self) -> None:
        leads = 0
        pause_s = LEAD_S
        while self._error is None:
            await self._carrier.wait_readable()
            if leads != self._leads or not self._reader.acquire(blocking=False):
                leads = self._leads
                self._look = trio.Event()
                if self._tasks_waiting:
                    await trio.sleep(LEAD_S)
                else:
                    with trio.move_on_after(pause_s):
                        await self._look.wait()
                    pause_s = min(2 * pause_s, LEAD_MAX_S)
                continue
            pause_s = LEAD_S
            try:
                events = self._receive()
            finally:
                self.stop_leading()
            if events:
                self._serving.dispatch(events)

    def _receive(self) -> list[Event]:
        """Read once and finish the calls that were answered; the events that are left to trio's thread."""
        events: list[Event] = []
        with self._lock:
            if self._error is not None:
                return events
            try:
                data = self._early or self._carrier.receive()
                self._early = b""
                if data is None:
                    return events
                if not len(data):
                    self.close(ConnectionLost("the peer closed it"))
                    return events
                self._heard += 1
                self._session.receive(data, events)
            except OSError as error:
                self.close(ConnectionLost(f"reading failed: {error}"))
            except DaaswarmError as error:
                self.close(error)
            except Exception:
                log.exception("reading on the connection with %s failed", self.peer_id)
                self.close(_get_internal())
            else:
                self._flush()
        others: list[Event] = []
        for event in events:
            if isinstance(event, ReplyReceived):
                assert isinstance(event.ticket, PendingCall)
                if isinstance(event.message, Failure):
                    self._note_refusal(event.ticket, event.message)
                event.ticket.finish(event.message, event.body, None)
            elif isinstance(event, CallFailed):
                assert isinstance(event.ticket, PendingCall)
                event.ticket.finish(None, None, event.error)
            else:
                others.append(event)
        return others

    def _note_refusal(self, pending: PendingCall, failure: Failure) -> None:
        with self._lock:
            self._holding.note(pending.kind, pending.nbytes, pending.deadline_s, failure, monotonic())

    # -- serving ----------------------------------------------------------------------------------------------

    def reply(self, call: int, message: Reply, body: Sequence[Buffer] = ()) -> None:
        """Answer a call of the peer's."""
        with self._lock:
            try:
                self._session.send_reply(call, message, body)
            except TooLarge as error:
                self._session.send_reply(call, get_failure(error))
            except Exception:
                log.exception("the answer to a call of %s can't be sent", self.peer_id)
                self._session.send_reply(call, Failure(code="error", message=INTERNAL_ERROR))
            self._flush()

    def drop(self, call: int) -> None:
        """Count a call of the peer's no more: it gets no answer, since the connection ends."""
        with self._lock:
            self._session.drop_served(call)

    # -- writing ----------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Write what can be written now; the writer task gets the rest. Under the lock."""
        if self._error is None and not self._write_some():
            self._unwritten.set()

    def _write_some(self) -> bool:
        """``True`` when nothing is left to write."""
        written = 0
        try:
            if not self._carrier.flush():
                return False
            while (buffers := self._session.next_buffers()) is not None:
                if not self._carrier.send(buffers):
                    return False
                written += get_size(buffers)
                if written >= FLUSH_BYTES:
                    return False
        except OSError as error:
            self.close(ConnectionLost(f"writing failed: {error}"))
        except DaaswarmError as error:
            self.close(error)
        except Exception:
            log.exception("writing on the connection with %s failed", self.peer_id)
            self.close(_get_internal())
        return True

    async def _write_loop(self) -> None:
        while self._error is None:
            self._unwritten.clear()
            with self._lock:
                done = self._error is not None or self._write_some()
            if done:
                await self._unwritten.wait()
                continue
            with trio.move_on_after(WRITE_STALL_S) as scope:
                await self._carrier.wait_writable()
            if scope.cancelled_caught:
                self.close(ConnectionLost(f"the peer has read nothing for {WRITE_STALL_S:g} s"))

    def _on_room(self) -> None:
        # Never at once: whoever made room holds another connection's lock.
        self._soon(self._grant_windows)

    def _grant_windows(self) -> None:
        with self._lock:
            if self._error is None:
                try:
                    self._session.grant_windows()
                except RemoteProtocolError as error:
                    self.close(error)
                self._flush()

    # -- the rest ---------------------------------------------------------------------------------------------

    async def check(self) -> None:
        """Ping; a connection over which no answer comes ends. Raises nothing."""
        try:
            await self.call(Ping(), deadline_s=PING_ANSWER_S)
        except Busy:
            pass  # so many calls wait for it that each deadline says as much as a ping
        except DeadlineExceeded:
            self.close(ConnectionLost(f"silent for {PING_ANSWER_S:g} s after a ping"))
        except DaaswarmError as error:
            self.close(error)

    async def _keep_alive(self) -> None:
        heard = -1
        while True:
            await trio.sleep(IDLE_PING_S)
            self._drop_stalled()
            if self._heard == heard:
                await self.check()
            heard = self._heard

    def _drop_stalled(self) -> None:
        with self._lock:
            try:
                if self._session.drop_stalled():
                    text = f"the peer has neither taken an answer nor ended a message for {IDLE_PING_S:g} s"
                    self.close(ConnectionLost(text))
            except RemoteProtocolError as error:
                self.close(error)
            self._flush()

    async def _cancel_when_ended(self, scope: trio.CancelScope) -> None:
        await self._ended.wait()
        scope.cancel()

    def _get_lost(self) -> ConnectionLost:
        error = self._error
        lost = ConnectionLost(f"the connection with {self.peer_id} at {self.remote_addr} ended: {error}")
        lost.__cause__ = error
        return lost

    def _in_trio(self, function: Callable[..., object], *args: object) -> None:
        if threading.get_ident() == self._thread:
            function(*args)
        else:
            self._soon(function, *args)

    def _soon(self, function: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(trio.RunFinishedError):  # the node is gone, and its connections with it
            self._token.run_sync_soon(function, *args)


def _get_internal() -> ConnectionLost:
    return ConnectionLost("internal error; the log has the details")
