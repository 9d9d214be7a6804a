"""What users make a node do: find the hosts of an expert, choose one, call it, and try another if that fails.

The waits are those of ``net/finding.py`` and ``inference/swarm_experts.py``, from which the constants come that the
core doesn't have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from daaswarm.core.health import State
from daaswarm.core.kademlia_events import LookupDone
from daaswarm.core.membership_events import WantMembers
from daaswarm.errors import LocalProtocolError, NoPeerCouldServe, RemoteProtocolError
from daaswarm.messages import Adverts, Contact, ExpertCall, ExpertReply, Failure, GetAdverts
from daaswarm.sim.carrying import Rpc
from daaswarm.types import ModelRoot, PeerId

if TYPE_CHECKING:
    from daaswarm.sim.node import SimNode
    from daaswarm.sim.world import World

ADVERT_S = 5.0  # to dial one host and ask for its adverts
DOUBTED_S = 0.5  # ... of one that didn't answer before
ASKED = 256  # hosts asked for adverts at most
LOOKUP_S = 15.0  # a whole lookup
CALL_S = 30.0  # the longest that a call waits
PATIENCE_S = 2.0  # a silent host is given up after this (or 20 times its usual time) if a replica exists
BUSY_WAIT_S = 2.0  # at once for a busy host
ATTEMPTS = 20  # of one call; then it has failed


class Call:
    """One user's. ``failed``: hosts that it isn't tried at again."""

    __slots__ = ("attempts", "failed", "has_found", "node", "root", "started", "waited_for_hosts")

    def __init__(self, node: SimNode, root: ModelRoot, started: float) -> None:
        self.node = node
        self.root = root
        self.started = started
        self.failed: set[PeerId] = set()
        self.attempts = 0
        self.has_found = False
        self.waited_for_hosts = False


class _Finding:
    """Hosts that are being asked for their adverts."""

    __slots__ = ("left", "node", "root")

    def __init__(self, node: SimNode, root: ModelRoot, left: int) -> None:
        self.node = node
        self.root = root
        self.left = left


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
        offered = [PeerId(known.advert.peer_id) for known in node.membership.get_adverts(call.root, now)]
        offered = [peer for peer in offered if peer != node.peer_id]
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
        deadline_s = CALL_S
        if any(other != peer and other not in call.failed for other in offered):
            deadline_s = min(CALL_S, max(PATIENCE_S, 20 * node.router.get_estimate_s(peer, 1, 1, now)))
        known = node.membership.book.get(peer, call.root)
        assert known is not None
        scenario = world.scenario
        message = ExpertCall(
            model_root=call.root, layer=0, experts=[0], dtype="f32", rows=1, hidden=scenario.row_bytes // 4 or 1
        )
        contact = Contact(peer_id=peer, addrs=known.advert.addrs)
        world.carrier.send(
            node, contact, message, deadline_s, self._on_answer, (call, peer), body_bytes=scenario.row_bytes
        )

    def _on_answer(self, rpc: Rpc, answer: Any) -> None:
        call, peer = rpc.note
        node, now = call.node, self._world.heap.now
        if isinstance(answer, ExpertReply):
            node.router.note_reply(peer, 1, now - rpc.sent, answer.service_us / 1e6, answer.queue_depth, now)
            self._end(call, now - call.started)
        elif isinstance(answer, Failure) and answer.code == "busy" and call.attempts < ATTEMPTS:
            self._world.heap.at(now + min(answer.retry_after_s, BUSY_WAIT_S), self._choose, call)
        else:
            node.router.note_failure(peer, now)
            call.failed.add(peer)
            if answer is None:
                self._world.figures.silent += 1
                node.perform(node.membership.note_failed(peer, now))
            if call.attempts < ATTEMPTS:
                self._choose(call)
            else:
                self._end(call, None)

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

        def fetch(done: LookupDone) -> None:
            pointed = self._judge(node, root, done, now)
            self._fetch(node, root, pointed)

        self._look_up(node, root, fetch)

    def _look_up(self, node: SimNode, root: ModelRoot, done: Any) -> None:
        try:
            node.look_up(bytes.fromhex(root), "records", done)
        except LocalProtocolError:
            done(LookupDone(lookup_id="", contacts=[], records=[]))

    def _judge(self, node: SimNode, root: ModelRoot, done: LookupDone, started: float) -> list[Contact]:
        """Counts how a lookup of records went; what came too late is nothing."""
        world = self._world
        is_late = world.heap.now - started > LOOKUP_S
        records = [] if is_late else done.records
        world.figures.note_lookup(world, node, root, records, done, world.heap.now - started)
        return [Contact(peer_id=pointer.peer_id, addrs=pointer.addrs) for pointer in records]

    def _fetch(self, node: SimNode, root: ModelRoot, pointed: list[Contact]) -> None:
        now = self._world.heap.now
        membership = node.membership
        contacts = {
            PeerId(k.advert.peer_id): Contact(peer_id=k.advert.peer_id, addrs=k.advert.addrs)
            for k in membership.book.get_adverts(root, now)
        }
        contacts |= {PeerId(contact.peer_id): contact for contact in pointed}
        contacts.pop(node.peer_id, None)
        node.perform(membership.introduce(root, contacts.values(), now))
        asked = sorted(contacts.values(), key=lambda c: membership.get_state(PeerId(c.peer_id)) is not State.UP)[:ASKED]
        finding = _Finding(node, root, len(asked))
        for contact in asked:
            is_up = membership.get_state(PeerId(contact.peer_id)) is State.UP
            message = GetAdverts(model_root=root)
            deadline_s = ADVERT_S if is_up else DOUBTED_S
            self._world.carrier.send(node, contact, message, deadline_s, self._on_adverts, finding)
        if not asked:
            self._end_finding(finding)

    def _on_adverts(self, rpc: Rpc, answer: Any) -> None:
        finding: _Finding = rpc.note
        node, now = finding.node, self._world.heap.now
        peer = rpc.target.peer_id if rpc.target is not None else None
        if isinstance(answer, Adverts) and peer is not None:
            node.perform(node.membership.note_alive(peer, now))
            if not any(self._keep(node, finding.root, peer, signed) for signed in answer.adverts):
                node.membership.book.withdraw(peer, finding.root)
        elif answer is None and peer is not None:
            node.perform(node.membership.note_failed(peer, now))
        finding.left -= 1
        if not finding.left:
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

    def _end_finding(self, finding: _Finding) -> None:
        node = finding.node
        node.found.add(finding.root)
        for call in node.finding.pop(finding.root):
            self._choose(call)
