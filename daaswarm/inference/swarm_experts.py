"""The experts of a model, computed by peers: what the trunk calls at each layer, from the model's own thread.

Life of a layer: the router says which replica computes which experts; one frame goes to each chosen host with all
its experts of the layer; each returns one summed row per row sent; the rows are added. A host that fails is left
out, and its share alone is asked of another replica: the answer stays the same, since experts are stateless functions.
A host that takes longer than it mostly does has its share asked of another one too, and the first answer counts.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from daaswarm.core.router import ReplicaRouter
from daaswarm.errors import (
    Busy,
    ConnectionLost,
    DaaswarmError,
    DeadlineExceeded,
    LocalProtocolError,
    RemoteProtocolError,
    TooLarge,
    Unreachable,
)
from daaswarm.inference.auditing import Auditor
from daaswarm.inference.checking import Checks
from daaswarm.inference.hedged import Computed, Part, Race, Sent, wait_for_races
from daaswarm.inference.plan import HostPlan
from daaswarm.inference.shares import Share
from daaswarm.inference.use import LATENCIES, AuditUse, HostUse
from daaswarm.messages import ExpertCall, ExpertReply
from daaswarm.models import codecs
from daaswarm.models.devices import to_device, to_host
from daaswarm.models.opened import read_opened
from daaswarm.net.network import Network
from daaswarm.net.pending import PendingCall
from daaswarm.types import Codec, PeerId

ROWS_PER_CALL = 512  # a longer prefill travels as several calls, so that hosts start before all is sent
BUSY_RETRIES = 20  # times that one share waits for a busy host before the host counts as failing
BUSY_WAIT_S = 2.0  # at once for a busy host, whatever it asks for: it might ask for ever
SILENT_S = 30.0  # a host that was silent even after the swarm was asked again is left out for so long
REPLICA_PATIENCE_S = 2.0  # a silent host is given up after this (or 20 times its usual latency) if a replica exists

TORCH_DTYPES: dict[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

logger = logging.getLogger(__name__)

LocalCompute = Callable[[ExpertCall, memoryview], tuple[ExpertReply, Sequence[Any]]]
"""Computes a call here: this node may be one of its own hosts."""


class Stopped(Exception):
    """The answer was cancelled; unwinds the model's thread."""


class SwarmExperts:
    """``ExpertsFn`` of one answer or batch. Lives in the thread that runs the model.

    Args:
        plan: the hosts found.
        network: carries the calls.
        router: replica choice; shared by all answers of a node.
        refresh: asks the swarm again (blocking; called from the model's thread) when replicas ran out.
        call_timeout_s: the deadline of one call.
        model_name: for messages.
        local: computes the calls that the router gives to this node itself.
        note_gone: is told of a host that may have died (from the model's thread).
        codec: in which hosts that take it get rows and give sums; this node's own experts never.
        auditor: decides whose answers are checked, and judges them.
    """

    def __init__(
        self,
        plan: HostPlan,
        network: Network,
        router: ReplicaRouter,
        *,
        refresh: Callable[[], HostPlan],
        call_timeout_s: float,
        model_name: str,
        local: LocalCompute | None = None,
        note_gone: Callable[[PeerId], None] | None = None,
        codec: Codec = "none",
        auditor: Auditor | None = None,
    ) -> None:
        self.plan = plan
        self.hosts: dict[PeerId, HostUse] = {}
        self.retries = 0
        self.stop = threading.Event()
        self._network = network
        self._router = router
        self._refresh = refresh
        self._call_timeout_s = call_timeout_s
        self._model_name = model_name
        self._local = local
        self._note_gone = note_gone
        self._dtype = TORCH_DTYPES[plan.dtype]
        self._codec = "" if codec == "none" else codec
        self._coded: tuple[torch.Tensor, memoryview | None] | None = None  # the rows encoded last
        self._auditor = auditor
        self._checks = Checks(auditor, self) if auditor is not None else None
        self._dead: set[PeerId] = set()
        self._silent: dict[PeerId, float] = {}  # since when: other answers that need them don't wait as long again
        self._in_flight: list[PendingCall] = []
        self._has_refreshed = False  # in this round of calls
        self._slices = {layer: list(range(count)) for layer, count in plan.layers.items()}

    def __call__(
        self, layer: int, rows: torch.Tensor, index: torch.Tensor | None, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """The layer's experts' weighted sum.

        Args:
            rows: (n, hidden) hidden states.
            index, weights: (n, k) chosen experts and their weights; ``None`` for the slices of a dense FFN.

        Returns:
            (n, hidden) in the dtype of ``rows``.

        Raises:
            NoPeerCouldServe: an expert that is needed has no live host any more.
            Stopped: the answer was cancelled.
            TooLarge, LocalProtocolError: the model's rows don't fit a call, or a bug here; no host is to blame.
        """
        wire_rows = to_host(rows.detach(), self._dtype)
        if index is None or weights is None:
            if len(rows) <= ROWS_PER_CALL:
                whole = [Share(self._slices[layer], wire_rows, None)]
            else:
                starts = range(0, len(rows), ROWS_PER_CALL)
                whole = [
                    Share(
                        self._slices[layer],
                        wire_rows[s : s + ROWS_PER_CALL],
                        torch.arange(s, min(s + ROWS_PER_CALL, len(rows))),
                    )
                    for s in starts
                ]
        else:
            whole = self._make_pair_shares(wire_rows, index.detach().cpu(), weights.detach().float().cpu())
        parts = self._compute(layer, whole)
        if len(parts) == 1 and parts[0][0] is None:
            return to_device(parts[0][1], rows.device, rows.dtype)
        total = torch.zeros(rows.shape, dtype=torch.float32)
        for into, part in parts:
            if into is None:
                total += part
            else:
                total.index_add_(0, into, part)
        return to_device(total, rows.device, rows.dtype)

    def take_use(self) -> tuple[dict[PeerId, HostUse], int]:
        """What each host did since the last time, and how many calls were tried again."""
        use, self.hosts, retries, self.retries = self.hosts, {}, self.retries, 0
        return use, retries

    def take_audits(self) -> AuditUse:
        """What was checked since the last time."""
        return AuditUse() if self._auditor is None else self._auditor.take_use()

    def use_plan(self, plan: HostPlan) -> None:
        """Ask these hosts from now on. Call from the model's thread, between passes."""
        self.plan = plan
        self._dead.clear()
        self._silent.clear()

    def cancel(self) -> None:
        """End the answer at once, from any thread: hosts are told, and the model's thread unwinds with ``Stopped``."""
        self.stop.set()
        for pending in list(self._in_flight):
            pending.cancel()

    def _make_pair_shares(self, rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> list[Share]:
        shares = []
        k = index.shape[1]
        for start in range(0, len(rows), ROWS_PER_CALL):
            chunk = slice(start, start + ROWS_PER_CALL)
            count = len(rows[chunk])
            shares.append(
                Share(
                    experts=index[chunk].unique().tolist(),
                    rows=rows[chunk],
                    into=None if count == len(rows) else torch.arange(start, start + count),
                    pair_rows=torch.arange(count).repeat_interleave(k),
                    pair_experts=index[chunk].reshape(-1),
                    pair_weights=weights[chunk].reshape(-1),
                )
            )
        return shares

    def _compute(self, layer: int, waiting: list[Share]) -> list[Part]:
        """Route, send, wait, retry, until every share is done; returns (rows they are, sums) pairs."""
        done: list[Part] = []
        try:
            while waiting:
                waiting = self._run_round(layer, waiting, done)
        except BaseException:
            for pending in self._in_flight:
                pending.cancel()
            raise
        finally:
            self._in_flight = []
        return done

    def _run_round(self, layer: int, waiting: list[Share], done: list[Part]) -> list[Share]:
        """Ask for every share once. Sums go to ``done``; returns the shares that are left, after a pause if need be."""
        self._in_flight = []
        self._has_refreshed = False
        sent: list[Sent] = []
        here: list[Share] = []
        for share in waiting:
            for peer, part in self._route(layer, share):
                if peer == self._network.peer_id and self._local is not None:
                    here.append(part)  # last, while the others compute theirs
                else:
                    sent.append(self._send(layer, peer, part))
        sent += [self._compute_here(layer, part) for part in here]
        if self.stop.is_set():  # set between sending and listing a call
            raise Stopped
        races = [Race(item.share, item, self._get_hedge_at(item)) for item in sent]
        pause_s = 0.0
        waiting_for = races
        while True:
            for race in waiting_for:
                pause_s = max(pause_s, self._settle(layer, race))
            waiting_for = [race for race in waiting_for if not race.is_over]
            if not waiting_for:
                break
            now = time.monotonic()
            late = [race for race in waiting_for if race.hedge_at <= now]
            for race in late:
                self._hedge(layer, race)
            if not late:
                wait_for_races(waiting_for)
        for race in races:  # in order, whoever answered first: sums of floats depend on it
            done += race.parts
        left = [race.share for race in races if race.has_failed]
        if pause_s:
            for share in left:
                share.waited_s += pause_s
            self.stop.wait(pause_s)
        return left

    def _settle(self, layer: int, race: Race) -> float:
        """Take what has come; returns how long to wait before the share is asked for again (s)."""
        pause_s = 0.0
        now = time.monotonic()
        first = race.first
        if first is not None and first.is_over(now):
            try:
                race.parts = [self._take(first)]
            except LocalProtocolError:
                raise
            except DaaswarmError as error:  # whatever a host answers: another may do better
                pause_s = self._note_failure(layer, first, race.share, error)
                race.asked.add(first.peer)
                race.first = None
                race.is_over = race.has_failed = not race.waiting
                if race.waiting:  # others have it already
                    pause_s = 0.0
            else:
                race.is_over = True
                self._give_up(race)
            if race.is_over or not race.waiting:
                return pause_s
        for item in [item for item in race.waiting if item.is_over(now)]:
            try:
                race.parts.append(self._take(item))
            except LocalProtocolError:
                raise
            except DaaswarmError as error:
                self._note_hedge_failure(layer, item, race.share, error)
                self._give_up(race)
                race.parts, race.hedge_at = [], math.inf
                race.is_over = race.has_failed = race.first is None
                return pause_s
            race.waiting.remove(item)
        if race.others and not race.waiting:
            race.is_over = True
            if race.first is not None:
                self._note_late(race.first)
                race.first.cancel()
        return pause_s

    def _route(self, layer: int, share: Share) -> list[tuple[PeerId, Share]]:
        """Split a share over the replicas that shall compute it."""
        left_out = self._get_left_out(share)
        if self._is_nobody_left(layer, share, left_out):
            self._find_more(layer, share)
            left_out = self._get_left_out(share)
        candidates = self.plan.by_layer[layer]
        if share.busy and not self._is_nobody_left(layer, share, left_out | share.busy):
            left_out |= share.busy
        is_retry = bool(share.failed or share.refreshed)
        now = time.monotonic()
        chosen = self._router.choose(
            layer, share.get_demand(), candidates, now, left_out, is_retry=is_retry, preferred=self.plan.preferred
        )
        if len(chosen) == 1:
            return [(peer, share) for peer in chosen]
        return [(peer, share.restrict(experts)) for peer, experts in sorted(chosen.items())]

    def _get_left_out(self, share: Share) -> set[PeerId]:
        """Hosts that it makes no sense to ask for this share."""
        banned = self._auditor.get_banned() if self._auditor is not None else set()
        return share.failed | self._dead | self._get_silent() | banned

    def _get_silent(self) -> set[PeerId]:
        if self._silent:
            since = time.monotonic() - SILENT_S
            self._silent = {peer: at for peer, at in self._silent.items() if at > since}
        return set(self._silent)

    def _is_nobody_left(self, layer: int, share: Share, left_out: set[PeerId]) -> bool:
        """Is there an expert of the share that only peers in ``left_out`` hold?"""
        candidates = self.plan.by_layer[layer]
        return any(left_out.issuperset(candidates.get(e, ())) for e in share.experts)

    def _find_more(self, layer: int, share: Share) -> None:
        """Ask the swarm again for hosts; the dead stay out unless they answered.

        Raises:
            NoPeerCouldServe: still none.
        """
        if not share.refreshed:
            share.refreshed = True
            # Not if it was asked just now, for another share or because of these very hosts.
            if not self._has_refreshed and not self._is_nobody_left(layer, share, self._get_silent()):
                self._has_refreshed = True
                plan = self._refresh()
                if plan.dtype == self.plan.dtype:
                    self.plan = plan
                    self._dead.clear()
            share.failed.clear()
        left_out = self._get_left_out(share)
        if self._is_nobody_left(layer, share, left_out):
            missing = self.plan.get_missing(frozenset(left_out))
            raise self.plan.describe_missing(missing, self._model_name)

    def _send(self, layer: int, peer: PeerId, share: Share) -> Sent:
        if self.stop.is_set():
            raise Stopped
        opened = self._auditor is not None and self._auditor.opens(peer, layer)
        codec = self._codec if self._codec and self._codec in self.plan.codecs.get(peer, ()) and not opened else ""
        return self.submit(layer, peer, share, codec=codec, opened=opened)

    def submit(self, layer: int, peer: PeerId, share: Share, *, codec: str = "", opened: bool = False) -> Sent:
        """Ask a host for a share.

        Raises:
            TooLarge, LocalProtocolError: ours: no other host would be sent anything else.
        """
        call, body = self._make_call(layer, share, codec, opened)
        size = sum(len(part) for part in body)
        deadline_s = self._get_deadline_s(layer, peer, share)
        try:
            pending = self._network.submit(self.plan.contacts[peer], call, body, deadline_s=deadline_s)
        except (TooLarge, LocalProtocolError):
            raise
        except DaaswarmError as error:
            return Sent(peer, share, error, size, call)
        self._in_flight.append(pending)
        return Sent(peer, share, pending, size, call, codec=codec, has_coded_rows=bool(call.codec))

    def _compute_here(self, layer: int, share: Share) -> Sent:
        if self.stop.is_set():
            raise Stopped
        assert self._local is not None
        call, parts = self._make_call(layer, share)
        body = bytearray().join(parts)
        started = time.monotonic()
        try:
            reply, sums = self._local(call, memoryview(body))
        except (TooLarge, LocalProtocolError):
            raise
        except DaaswarmError as error:
            return Sent(self._network.peer_id, share, error, len(body), call)
        computed = Computed(reply, memoryview(bytearray().join(sums)), time.monotonic() - started)
        return Sent(self._network.peer_id, share, computed, len(body), call)

    def _make_call(
        self, layer: int, share: Share, codec: str = "", opened: bool = False
    ) -> tuple[ExpertCall, list[memoryview]]:
        coded = self._encode(share.rows, codec) if codec else None
        call = ExpertCall(
            model_root=self.plan.root,
            layer=layer,
            experts=share.experts,
            dtype=self.plan.dtype,
            rows=share.rows.shape[0],
            hidden=share.rows.shape[1],
            pairs=0 if share.pair_rows is None else len(share.pair_rows),
            codec="" if coded is None else codec,
            reply_codec=codec,
            opened=opened,
        )
        body = [as_bytes(share.rows) if coded is None else coded]
        if share.pair_rows is not None and share.pair_experts is not None and share.pair_weights is not None:
            body += [
                as_bytes(share.pair_rows.to(torch.int32)),
                as_bytes(share.pair_experts.to(torch.int32)),
                as_bytes(share.pair_weights),
            ]
        return call, body

    def _encode(self, rows: torch.Tensor, codec: str) -> memoryview | None:
        """``None`` if that isn't worth it, or not possible: then they go as they are."""
        if codecs.get_bytes(codec, *rows.shape) >= rows.nbytes:
            return None
        if self._coded is None or self._coded[0] is not rows:  # several hosts get the same
            self._coded = rows, codecs.encode(rows, codec)
        return self._coded[1]

    def _get_deadline_s(self, layer: int, peer: PeerId, share: Share) -> float:
        """Short only while others could do all of the share instead: a slow host is better than none."""
        others_fail = share.refreshed or self._is_nobody_left(
            layer, share, {peer, *share.busy, *self._get_left_out(share)}
        )
        if others_fail:
            return self._call_timeout_s
        usual_s = self._router.get_estimate_s(peer, len(share.rows), len(share.experts), time.monotonic())
        return min(self._call_timeout_s, max(REPLICA_PATIENCE_S, 20 * usual_s))

    def _get_hedge_at(self, item: Sent) -> float:
        """When to ask others too, if there are any. Never for what was refused: more calls won't help a busy host."""
        if not isinstance(item.call, PendingCall):
            return math.inf
        self._router.note_call()
        return math.inf if item.share.busy or item.share.waits else self._get_delay_end(item)

    def _hedge(self, layer: int, race: Race) -> None:
        """Ask others for the same, if there are any and the budget allows it; and yet others if those take long too:
        where several hosts fell silent at once, the second one asked may be one of them.
        """
        share, now = race.share, time.monotonic()
        race.hedge_at, race.pause_s = now + race.pause_s, 2 * race.pause_s
        if race.first is not None:
            race.asked.add(race.first.peer)
        left_out = {*race.asked, *share.busy, *self._get_left_out(share)}
        chosen = self._router.hedge(
            layer,
            share.get_demand(),
            self.plan.by_layer[layer],
            now,
            left_out,
            preferred=self.plan.preferred,
        )
        if not chosen:
            return  # perhaps later: budgets grow, and cool-downs end
        for item in race.waiting:
            self._note_late(item)
        self._give_up(race)
        race.parts = []
        for peer, experts in sorted(chosen.items()):
            part = share if len(chosen) == 1 else share.restrict(experts)
            here = peer == self._network.peer_id and self._local is not None
            race.waiting.append(self._compute_here(layer, part) if here else self._send(layer, peer, part))
        race.others = list(race.waiting)
        race.asked.update(chosen)
        race.hedge_at = max(map(self._get_delay_end, race.others))

    def _get_delay_end(self, item: Sent) -> float:
        """Until when it is waited for alone."""
        if not isinstance(item.call, PendingCall):
            return math.inf
        delay_s = self._router.get_hedge_delay_s(item.peer, item.share.work)
        return math.inf if delay_s is None else item.call.submitted_at + delay_s

    def _give_up(self, race: Race) -> None:
        """The others need not answer any more."""
        for item in race.waiting:
            item.cancel()
        race.waiting, race.others = [], []

    def _take(self, item: Sent) -> Part:
        """The answer, noted.

        Raises:
            DaaswarmError: there is none, or a bad one.
        """
        reply, body = self.wait(item.call)
        if item.request.opened:
            answer = read_opened(item.request, reply, body)
            sums = self._check_finite(item.share, answer.sums)
            self._note_reply(item, reply, len(body))
            if self._checks is not None:
                sums = self._checks.check_opened(item, answer)
            return item.share.into, sums
        sums = self._read(item, reply, body)
        self._note_reply(item, reply, len(body))
        if self._checks is not None and item.peer != self._network.peer_id:
            sums = self._checks.check(item, sums)
        return item.share.into, sums

    def find_twin(self, item: Sent) -> PeerId | None:
        """Another host that holds all experts of a share; any."""
        share, layer = item.share, item.request.layer
        left_out = {item.peer, self._network.peer_id, *share.busy, *self._get_left_out(share)}
        candidates = self.plan.by_layer[layer]
        holders = set.intersection(*(set(candidates.get(expert, ())) for expert in share.experts)) - left_out
        return random.choice(sorted(holders)) if holders else None

    def wait(self, call: PendingCall | Computed | DaaswarmError) -> tuple[ExpertReply, memoryview]:
        if isinstance(call, DaaswarmError):
            raise call
        try:
            reply, body = call.wait()
        except DaaswarmError:
            if self.stop.is_set():
                raise Stopped from None
            raise
        if not isinstance(reply, ExpertReply):
            raise RemoteProtocolError(f"an expert call was answered by {type(reply).__name__}")
        return reply, body

    def read(self, item: Sent) -> torch.Tensor:
        """The sums of a call that isn't opened, and isn't a share's own. Raises as :meth:`_take` does."""
        reply, body = self.wait(item.call)
        return self._read(item, reply, body)

    def _read(self, item: Sent, reply: ExpertReply, body: memoryview) -> torch.Tensor:
        share = item.share
        rows, hidden = share.rows.shape
        if reply.codec:
            if reply.codec != item.codec or (reply.rows, reply.hidden) != (rows, hidden):
                raise RemoteProtocolError(
                    f"an expert reply has {reply.rows} x {reply.hidden} rows in codec {reply.codec!r}; "
                    f"{rows} x {hidden} in {item.codec or 'none'} were due"
                )
            return codecs.decode(body, reply.codec, rows, hidden, torch.float32)
        if (reply.rows, reply.hidden) != (rows, hidden) or len(body) != rows * hidden * 4:
            raise RemoteProtocolError(
                f"an expert reply has {reply.rows} x {reply.hidden} rows in {len(body)} bytes; "
                f"{rows} x {hidden} f32 were due"
            )
        return self._check_finite(share, torch.frombuffer(body, dtype=torch.float32).view(rows, hidden))

    def _check_finite(self, share: Share, sums: torch.Tensor) -> torch.Tensor:
        # What isn't finite on its way out can't come back finite.
        if not is_finite(sums) and is_finite(share.rows) and is_finite(share.pair_weights):
            raise RemoteProtocolError("an expert reply has numbers that are not finite")
        return sums

    def _note_reply(self, item: Sent, reply: ExpertReply, size: int) -> None:
        share = item.share
        assert not isinstance(item.call, DaaswarmError)
        elapsed = item.call.latency_s
        self._silent.pop(item.peer, None)
        if item.peer != self._network.peer_id:
            self._network.links.note_sizes(item.peer, item.sent_bytes + size, elapsed, reply.service_us / 1e6)
        self._router.note_reply(
            item.peer,
            share.work,
            elapsed,
            reply.service_us / 1e6,
            reply.queue_depth,
            time.monotonic(),
            experts=len(share.experts),
        )
        use = self.hosts.setdefault(item.peer, HostUse())
        use.calls += 1
        use.coded_calls += bool(item.has_coded_rows or reply.codec)
        use.rows += len(share.rows)
        use.bytes_sent += item.sent_bytes
        use.bytes_received += size
        if len(use.latencies_s) < LATENCIES:
            use.latencies_s.append(elapsed)

    def _note_late(self, item: Sent) -> None:
        """Others did its share first, or are asked for it now."""
        assert isinstance(item.call, PendingCall)  # it is waited for
        now, share = time.monotonic(), item.share
        waited_s = now - item.call.submitted_at
        if self._router.note_late(item.peer, share.work, waited_s, now, experts=len(share.experts)):
            logger.info("%s is late again and again: left out for a while", item.peer)
            if self._note_gone is not None:
                self._note_gone(item.peer)

    def _note_hedge_failure(self, layer: int, item: Sent, share: Share, error: DaaswarmError) -> None:
        if isinstance(error, Busy):  # nothing is lost but the hedge
            self._router.note_busy()
            share.busy.add(item.peer)
        else:
            self._note_failure(layer, item, share, error)

    def _note_failure(self, layer: int, item: Sent, share: Share, error: DaaswarmError) -> float:
        """Leave the host out for this share, or, if it is only busy, say how long to wait for it (s)."""
        self.retries += 1
        peer, now = item.peer, time.monotonic()
        logger.info("layer %d: %s: %s", layer, peer, error)
        if isinstance(error, Busy):
            self._router.note_busy()
        left_s = self._call_timeout_s - share.waited_s
        if isinstance(error, Busy) and share.waits < BUSY_RETRIES and left_s > 0:
            share.waits += 1
            share.busy.add(peer)
            if not self._is_nobody_left(layer, share, self._get_left_out(share) | share.busy):
                return 0.0
            share.busy.clear()
            return min(error.retry_after_s, BUSY_WAIT_S, left_s)
        share.failed.add(peer)
        waited_s = now - item.call.submitted_at if isinstance(item.call, PendingCall) else 0.0
        self._router.note_failure(peer, now, waited_s)
        if isinstance(error, ConnectionLost | Unreachable):
            self._dead.add(peer)
        if self._note_gone is not None and isinstance(error, ConnectionLost | DeadlineExceeded | Unreachable):
            self._note_gone(peer)
        if share.refreshed and isinstance(error, ConnectionLost | DeadlineExceeded | Unreachable):
            self._silent[peer] = now
        return 0.0


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, without a copy when it is contiguous."""
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has none
        tensor = tensor.view(torch.int16)
    return tensor.numpy().data.cast("B")


def is_finite(tensor: torch.Tensor | None) -> bool:
    """Whether no number is infinite or NaN. A finite sum says so in one pass."""
    return tensor is None or math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())
