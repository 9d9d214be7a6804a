"""A simulated host: the core's admission, and a device that computes one call after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from daaswarm.core.admission import Admission, Admitted, Ticket
from daaswarm.messages import ExpertReply, Failure
from daaswarm.sim.carrying import Rpc

if TYPE_CHECKING:
    from daaswarm.sim.node import SimNode

SPEEDS = 0.5  # sigma of the log-normal factor between hosts: the fastest of a hundred is three times the median
VARIES = 0.25  # sigma of it between the calls of one host


class Host:
    """Computes the calls of one node, in the order that admission says."""

    __slots__ = ("_admission", "_is_busy", "_node", "_rpcs", "_service_s")

    def __init__(self, node: SimNode) -> None:
        self._node = node
        self._admission: Admission | None = None  # most hosts of a large swarm are rarely called
        self._service_s = node.world.scenario.service_ms / 1_000 * node.world.effects.lognormvariate(0.0, SPEEDS)
        self._is_busy = False
        self._rpcs: dict[Ticket, Rpc] = {}

    def get_service_s(self) -> float:
        """Of a call, usually."""
        return self._service_s

    def serve(self, rpc: Rpc) -> bool:
        """True: it will be answered, or was."""
        world, node = self._node.world, self._node
        if self._admission is None:
            self._admission = Admission()
        verdict = self._admission.try_admit(rpc.asker.peer_id, 1, rpc.deadline_s, world.heap.now)
        if not isinstance(verdict, Admitted):
            world.figures.refused += 1
            world.carrier.answer(rpc, Failure(code="busy", message="", retry_after_s=verdict.retry_after_s))
            return True
        self._rpcs[verdict.ticket] = rpc
        node.served += 1
        if not self._is_busy:
            self._compute_next()
        return True

    def _compute_next(self) -> None:
        assert self._admission is not None
        world = self._node.world
        while (ticket := self._admission.next()) is not None:
            if self._rpcs[ticket].given_up_at <= world.heap.now:
                self._admission.finish(ticket)
                del self._rpcs[ticket]
                continue
            if ticket.late_at < world.heap.now:  # nobody waits for it any more
                self._admission.finish(ticket)
                rpc = self._rpcs.pop(ticket)
                world.carrier.answer(rpc, Failure(code="deadline_exceeded", message=""))
                continue
            self._is_busy = True
            service_s = self._service_s * world.effects.lognormvariate(0.0, VARIES)
            world.heap.at(world.heap.now + service_s, self._finish, ticket, service_s)
            return
        self._is_busy = False

    def _finish(self, ticket: Ticket, service_s: Any) -> None:
        node = self._node
        if not node.is_alive or self._admission is None:
            return
        self._admission.finish(ticket, service_s)
        rpc = self._rpcs.pop(ticket)
        scenario = node.world.scenario
        reply = ExpertReply(
            rows=1,
            hidden=scenario.row_bytes // 4,
            service_us=int(service_s * 1e6),
            queue_depth=self._admission.queue_depth,
        )
        node.world.carrier.answer(rpc, reply, scenario.row_bytes)
        self._compute_next()
