"""What users make a node do: find the hosts of an expert, choose one, call it, and try another if that fails.

The waits are those of ``net/finding.py`` and ``inference/swarm_experts.py``, from which the constants come that the
core doesn't have.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from daaswarm.core.adverts import Known
from daaswarm.core.health import State
from daaswarm.core.kademlia_events import LookupDone
from daaswarm.core.membership_events import WantMembers
from daaswarm.errors import LocalProtocolError, NoPeerCouldServe, RemoteProtocolError
from daaswarm.messages import Adverts, Contact, ExpertCall, ExpertReply, Failure, GetAdverts, Pointer
from daaswarm.sim.carrying import Rpc
from daaswarm.types import ModelRoot, PeerId

if TYPE_CHECKING:
    from daaswarm.sim.node import OnDone, OnRecords, SimNode
    from daaswarm.sim.world import World

ADVERT_S = 5.0  # to dial one host and ask for its adverts
DOUBTED_S = 0.5  # ... of one that didn't answer before
ASKED = 256  # hosts asked for adverts at most
REST_S = 0.5  # for the others once one has answered, or as long again as that took
LOOKUP_S = 15.0  # a whole lookup
CALL_S = 30.0  # the longest that a call waits
PATIENCE_S = 2.0  # a silent host is given up after this (or 20 times its usual time) if a replica exists
BUSY_WAIT_S = 2.0  # at once for a busy host
ATTEMPTS = 20  # of one call; then it has failed


class Call:
    """One user's.

    Attributes:
        failed: hosts that it isn't tried at again.
        first, hedge: what it waits for: the host it was sent to, and the one that was asked because that takes long.
        asked: all that were, for this attempt or before.
        is_refused: a host was busy.
    """

    __slots__ = (
        "asked",
        "attempts",
        "failed",
        "first",
        "has_found",
        "hedge",
        "is_refused",
        "node",
        "root",
        "started",
        "waited_for_hosts",
    )

    def __init__(self, node: SimNode, root: ModelRoot, started: float) -> None:
        self.node = node
        self.root = root
        self.started = started
        self.failed: set[PeerId] = set()
        self.first: Rpc | None = None
        self.hedge: Rpc | None = None
        self.asked: set[PeerId] = set()
        self.attempts = 0
        self.has_found = False
        self.waited_for_hosts = self.is_refused = False


class _Finding:
    """Hosts that are being asked for their adverts.

    Attributes:
        contacts: all that were asked.
        left: how many of them have not answered.
        is_looking: the lookup goes on.
        is_enough: one has answered that it serves the expert.
    """

    __slots__ = ("contacts", "is_enough", "is_looking", "is_over", "left", "node", "root", "started")

    def __init__(self, node: SimNode, root: ModelRoot, started: float) -> None:
        self.node = node
        self.root = root
        self.started = started
        self.contacts: dict[PeerId, Contact] = {}
        self.left = 0
        self.is_looking = True
        self.is_enough = self.is_over = False


class Requesting:
    """All users' calls."""

    def __init__(self, world: World) -> None:
        self._world = world

    # -- calling ---------------------------------------------------------------------------------------------------

    def call(self, node: SimNode, root: ModelRoot) -> None:
        """A user asks for an expert, now."""
        world = self._world
        call = Call(node, root, world.heap.now)
        world.figures.calls += 1
        self._follow(node, root)
        if root in node.found:
            self._choose(call)
        else:
            self._find(call)

    def _choose(self, call: Call, _: Any = None) -> None:
        node, world = call.node, self._world
        if not node.is_alive:
            world.figures.abandoned += 1
            return
        now = world.heap.now
        offered = self._get_offered(call)
        world.figures.note_offered(world, node, offered)
        try:
            plan = node.router.choose(0, {0: 1}, {0: offered}, now, call.failed, is_retry=call.attempts > 0)
        except NoPeerCouldServe:
            if call.has_found or call.attempts >= ATTEMPTS:
                self._end(call, None)
            else:
                call.failed.clear()
                self._find(call)
            return
        (peer,) = plan
        call.attempts += 1
        node.router.note_call()
        # Never for what was refused: more calls won't help a busy host.
        late_s = None if call.is_refused else node.router.get_hedge_delay_s(peer, 1)
        call.first = self._send(call, peer, offered, late_s)

    def _get_offered(self, call: Call) -> list[PeerId]:
        node = call.node
        known = node.membership.get_adverts(call.root, self._world.heap.now)
        return [PeerId(k.advert.peer_id) for k in known if k.advert.peer_id != node.peer_id]

    def _send(self, call: Call, peer: PeerId, offered: list[PeerId], late_s: float | None) -> Rpc:
        node, world = call.node, self._world
        deadline_s = CALL_S
        if any(other != peer and other not in call.failed for other in offered):
            deadline_s = min(CALL_S, max(PATIENCE_S, 20 * node.router.get_estimate_s(peer, 1, 1, world.heap.now)))
        known = node.membership.book.get(peer, call.root)
        assert known is not None
        scenario = world.scenario
        message = ExpertCall(
            model_root=call.root, layer=0, experts=[0], dtype="f32", rows=1, hidden=scenario.row_bytes // 4 or 1
        )
        contact = Contact(peer_id=peer, addrs=known.advert.addrs)
        return world.carrier.send(
            node,
            contact,
            message,
            deadline_s,
            self._on_answer,
            (call, peer),
            late_s=late_s,
            late=self._hedge,
            body_bytes=scenario.row_bytes,
        )

    def _hedge(self, rpc: Rpc) -> None:
        """It takes longer than it mostly does: another host is asked too, if there is one and the budget allows it;
        and yet another if that one takes long too.
        """
        call, peer = rpc.note
        offered = self._get_offered(call)
        router, now = call.node.router, self._world.heap.now
        call.asked.add(peer)
        for other in router.hedge(0, {0: 1}, {0: offered}, now, call.asked | call.failed):
            self._world.figures.hedged += 1
            if call.hedge is not None:
                self._note_late(call.hedge)
            call.hedge = self._send(call, other, offered, router.get_hedge_delay_s(other, 1))

    def _on_answer(self, rpc: Rpc, answer: Any) -> None:
        call, peer = rpc.note
        node, now = call.node, self._world.heap.now
        is_hedge = rpc is call.hedge
        if is_hedge:
            call.hedge = None
        else:
            call.first = None
        other = call.first or call.hedge
        if isinstance(answer, ExpertReply):
            node.router.note_reply(peer, 1, now - rpc.sent, answer.service_us / 1e6, answer.queue_depth, now)
            if other is not None:
                self._outrun(other, is_hedge=is_hedge)
            self._end(call, now - call.started)
        elif isinstance(answer, Failure) and answer.code == "busy":
            node.router.note_busy()
            call.is_refused = True
            if other is None and call.attempts < ATTEMPTS:
                self._world.heap.at(now + min(answer.retry_after_s, BUSY_WAIT_S), self._choose, call)
            elif other is None:
                self._end(call, None)
        else:
            node.router.note_failure(peer, now, now - rpc.sent)
            call.failed.add(peer)
            if answer is None:
                self._world.figures.silent += 1
                node.perform(node.membership.note_failed(peer, now))
            if other is not None:
                return
            if call.attempts < ATTEMPTS:
                self._choose(call)
            else:
                self._end(call, None)

    def _outrun(self, loser: Rpc, *, is_hedge: bool) -> None:
        """Another host answered first; ``is_hedge``: the one that was asked later."""
        call, _ = loser.note
        call.first = call.hedge = None
        if is_hedge:
            self._note_late(loser)
        else:
            self._world.carrier.cancel(loser)

    def _note_late(self, loser: Rpc) -> None:
        call, peer = loser.note
        node, now = call.node, self._world.heap.now
        self._world.carrier.cancel(loser)
        if node.router.note_late(peer, 1, now - loser.sent, now):
            node.perform(node.membership.note_failed(peer, now))

    def _end(self, call: Call, seconds: float | None) -> None:
        figures = self._world.figures
        if seconds is None:
            figures.failed += 1
        else:
            (figures.first_s if call.waited_for_hosts else figures.call_s).append(seconds)
            figures.retried += call.attempts > 1

    # -- finding -----------------------------------------------------------------------------------------------------

    def introduce(self, node: SimNode, root: ModelRoot) -> None:
        """The membership wants to know whom the DHT points to."""
        now = self._world.heap.now

        def introduce(done: LookupDone) -> None:
            pointed = self._judge(node, root, done, now)
            node.perform(node.membership.introduce(root, pointed, self._world.heap.now))

        self._look_up(node, root, introduce)

    def _follow(self, node: SimNode, root: ModelRoot) -> None:
        for effect in node.membership.follow(root, self._world.heap.now):
            # A real node looks twice when it asks for the first time, for the membership and for the call.
            if not isinstance(effect, WantMembers) or root in node.found:
                node.perform([effect])

    def _find(self, call: Call) -> None:
        """Then choose. Calls of one node for one expert wait for the same answers."""
        node, root = call.node, call.root
        call.has_found = call.waited_for_hosts = True
        if root in node.finding:
            node.finding[root].append(call)
            return
        node.finding[root] = [call]
        now = self._world.heap.now
        finding = _Finding(node, root, now)
        self._ask(finding, [_get_contact(known) for known in node.membership.book.get_adverts(root, now)])

        def end(done: LookupDone) -> None:
            self._ask(finding, self._judge(node, root, done, now))
            finding.is_looking = False
            if not finding.left:
                self._end_finding(finding)

        self._look_up(node, root, end, lambda records: self._ask(finding, _get_pointed(records)))

    def _look_up(self, node: SimNode, root: ModelRoot, done: OnDone, on_records: OnRecords | None = None) -> None:
        try:
            node.look_up(bytes.fromhex(root), "records", done, on_records)
        except LocalProtocolError:
            done(LookupDone(lookup_id="", contacts=[], records=[]))

    def _judge(self, node: SimNode, root: ModelRoot, done: LookupDone, started: float) -> list[Contact]:
        """Counts how a lookup of records went; what came too late is nothing."""
        world = self._world
        is_late = world.heap.now - started > LOOKUP_S
        records = [] if is_late else done.records
        world.figures.note_lookup(world, node, root, records, done, world.heap.now - started)
        return _get_pointed(records)

    def _ask(self, finding: _Finding, contacts: Iterable[Contact]) -> None:
        """Those that weren't asked yet what they serve."""
        node, membership = finding.node, finding.node.membership
        for contact in contacts:
            peer = PeerId(contact.peer_id)
            if finding.is_over or peer in finding.contacts or peer == node.peer_id or len(finding.contacts) >= ASKED:
                continue
            finding.contacts[peer] = contact
            finding.left += 1
            deadline_s = ADVERT_S if membership.get_state(peer) is State.UP else DOUBTED_S
            message = GetAdverts(model_root=finding.root)
            self._world.carrier.send(node, contact, message, deadline_s, self._on_adverts, finding)

    def _on_adverts(self, rpc: Rpc, answer: Any) -> None:
        finding: _Finding = rpc.note
        if finding.is_over:
            return
        node, now = finding.node, self._world.heap.now
        peer = rpc.target.peer_id if rpc.target is not None else None
        if isinstance(answer, Adverts) and peer is not None:
            node.perform(node.membership.note_alive(peer, now))
            if not any(self._keep(node, finding.root, peer, signed) for signed in answer.adverts):
                node.membership.book.withdraw(peer, finding.root)
            elif not finding.is_enough:
                finding.is_enough = True
                self._world.heap.at(now + max(REST_S, now - finding.started), self._end_finding, finding)
        elif answer is None and peer is not None:
            node.perform(node.membership.note_failed(peer, now))
        finding.left -= 1
        if not finding.left and not finding.is_looking:
            self._end_finding(finding)

    def _keep(self, node: SimNode, root: ModelRoot, peer: PeerId, signed: Any) -> bool:
        try:
            advert = node.notary.peek_advert(signed)
            if advert.peer_id != peer or advert.model_root != root:
                return False
            node.membership.put(signed, self._world.heap.now)
        except RemoteProtocolError:
            return False
        return True

    def _end_finding(self, finding: _Finding, _: Any = None) -> None:
        if finding.is_over:
            return
        finding.is_over = True
        node, now = finding.node, self._world.heap.now
        node.perform(node.membership.introduce(finding.root, finding.contacts.values(), now))
        node.found.add(finding.root)
        for call in node.finding.pop(finding.root):
            self._choose(call)


def _get_pointed(records: Iterable[Pointer]) -> list[Contact]:
    return [Contact(peer_id=pointer.peer_id, addrs=pointer.addrs) for pointer in records]


def _get_contact(known: Known) -> Contact:
    return Contact(peer_id=known.advert.peer_id, addrs=known.advert.addrs)
