"""Which replica computes which expert of one layer call, so that the slowest part of it ends soonest.

A call's predicted time is ``max over peers (fixed + units x unit) + EXTRA_PEER_S x peers``: makespan scheduling on
unrelated machines with a set-up cost, solved greedily (largest first, Graham 1969) and then by dropping peers that
don't pay for themselves. The estimates come from the replies; a call that looks like an earlier one reuses its plan.

All requesters see the same host being the fastest, and would all go there. So each part of a plan goes to the better of
two replicas drawn from those about as good (Mitzenmacher, "The Power of Two Choices", IEEE TPDS 12:10, 2001).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from daaswarm.core.hedging import Hedging
from daaswarm.core.rng import Rng
from daaswarm.errors import NoPeerCouldServe
from daaswarm.types import PeerId

EXTRA_PEER_S = 100e-6  # a further frame costs the requester about this: encode, send, receive, add
PRIOR_FIXED_S = 1e-3  # of a peer never called: a local network's round trip
PRIOR_UNIT_S = 50e-6  # of one row through one expert
OPTIMISM = 0.9  # a newcomer is thought this much faster than the best known, so that it is tried once
SMOOTHING = 0.2  # weight of the newest observation: five calls to follow a change
MOVED = 0.25  # relative change of an estimate that makes plans worth remaking; less is noise
FORGET_S = 60.0  # a peer not called for this long is a newcomer again, or a slow spell would be for ever, ...
FORGET_CHOICES = 256  # ... if so many were made meanwhile: who asks rarely would do little but try newcomers
COOLDOWN_S = 1.0  # after a failure, doubled by each further one
COOLDOWN_MAX_S = 60.0
COOLDOWN_WAITS = 10.0  # times what the failure took, at least: trying a silent peer takes a tenth of the time at most
LATE_LIMIT = 2  # calls in a row that another replica answered first are a failure: one is a bad moment
QUEUE_FRESH_S = 1.0  # a queue depth older than this says nothing
PLANS = 4_096  # remembered
PLAN_S = 1.0  # that a plan is reused for at most, since cool-downs end and estimates age
NEAR = 2.0  # times the time of the best: as good as any, for two to be drawn of (measured: docs/explanation/tail.md)
EXPLORE_EVERY = 16  # choices; one goes to replicas that the best plan leaves out
EXPLORE_COST = 8.0  # unless it would take this many times as long
PEERS = 8_192  # with an estimate; the longest unused goes

Plan = dict[PeerId, list[int]]
_NOBODY: frozenset[PeerId] = frozenset()
_Near = dict[PeerId, list[PeerId]]
_PlanKey = tuple[tuple[tuple[int, int], ...], tuple[tuple[PeerId, ...], ...], AbstractSet[PeerId]]


_Estimate = tuple[float, float]  # (fixed s, s per unit)


class _Peer:
    """What replies taught about one peer, by size class: large batches cost less per row and more on the wire."""

    __slots__ = (
        "by_size",
        "cool_until",
        "failures",
        "late",
        "planned",
        "queue_at",
        "queue_s",
        "tie",
        "used_at",
        "used_in",
    )

    def __init__(self, tie: float, now: float, choice: int) -> None:
        self.tie = tie  # so that requesters don't all prefer the same one of several equals
        self.by_size: dict[int, _Estimate] = {}
        self.queue_s = 0.0
        self.queue_at = 0.0
        self.used_at = now
        self.used_in = choice  # how many choices had been made when it was last heard of
        self.failures = 0
        self.late = 0  # hedged calls since its last answer
        self.cool_until = 0.0
        self.planned: dict[int, _Estimate] = {}  # what live plans rest on


class ReplicaRouter:
    """One requester's choice of replicas, over all its calls."""

    def __init__(self, rng: Rng) -> None:
        self.hedging = Hedging()
        self._rng = rng
        self._peers: dict[PeerId, _Peer] = {}
        self._plans: dict[_PlanKey, tuple[float, Plan, _Near]] = {}
        self._choices = 0
        self._failing: set[PeerId] = set()  # since their last answer

    def choose(
        self,
        layer: int,
        rows: Mapping[int, int],
        candidates: Mapping[int, Sequence[PeerId]],
        now: float,
        exclude: AbstractSet[PeerId] = _NOBODY,
        *,
        is_retry: bool = False,
        preferred: frozenset[PeerId] = _NOBODY,
    ) -> Plan:
        """``{peer: [experts]}``: every expert of ``rows`` exactly once, at one of its candidates.

        Args:
            rows: how many rows go to each expert.
            candidates: who holds each expert.
            exclude: peers that already failed this call. A cooling peer is used only if nobody else can.
            is_retry: this is no time to try newcomers, of which any number may come and stay silent: peers that have
                answered before come first.
            preferred: who else holds an expert is asked for it only while none of these can be.

        Returns:
            A plan that may be shared with later calls: read it, don't change it.

        Raises:
            NoPeerCouldServe: with every expert of ``layer`` that has no candidate left.
        """
        if exclude or is_retry:
            plan = self._plan(layer, rows, candidates, now, exclude, preferred, is_retry=is_retry)
        else:
            plan, near = self._get_plan(layer, rows, candidates, now, preferred)
            self._choices += 1
            if not self._choices % EXPLORE_EVERY:
                plan = self._explore(plan, layer, rows, candidates, now, preferred)
            elif near:
                plan = self._choose_of_two(plan, near, rows, now)
        if self._failing:
            self._put_on_trial(plan, now)
        return plan

    def _put_on_trial(self, plan: Plan, now: float) -> None:
        """A peer that failed before is tried by one call, not by all that come until it fails again."""
        for peer in self._failing.intersection(plan):
            state = self._get(peer, now)
            if now >= state.cool_until:
                state.cool_until = now + COOLDOWN_S
                self._plans.clear()

    def _get_plan(
        self,
        layer: int,
        rows: Mapping[int, int],
        candidates: Mapping[int, Sequence[PeerId]],
        now: float,
        preferred: frozenset[PeerId],
    ) -> tuple[Plan, _Near]:
        """The best plan by today's estimates, from memory if it was just made; and who could stand in for its peers."""
        key = (tuple(rows.items()), tuple([tuple(candidates.get(expert, ())) for expert in rows]), preferred)
        cached = self._plans.get(key)
        if cached is not None and now < cached[0]:
            return cached[1:]
        plan = self._plan(layer, rows, candidates, now, _NOBODY, preferred)
        near = self._get_near(plan, rows, candidates, now, preferred)
        if len(self._plans) >= PLANS:
            self._plans.clear()
        self._plans[key] = (now + PLAN_S, plan, near)
        return plan, near

    def _get_near(
        self,
        plan: Plan,
        rows: Mapping[int, int],
        candidates: Mapping[int, Sequence[PeerId]],
        now: float,
        preferred: frozenset[PeerId],
    ) -> _Near:
        """For each peer of ``plan`` those outside it that could do its part in at most :data:`NEAR` times its time."""
        near: _Near = {}
        for peer, experts in plan.items():
            first, *others = (candidates[expert] for expert in experts)
            limit_s = NEAR * self._predict(peer, experts, rows, now)
            found = [
                other
                for other in first
                if other not in plan
                and other not in self._failing
                and (not preferred or other in preferred)
                and all(other in holders for holders in others)
                and self._predict(other, experts, rows, now) <= limit_s
            ]
            if len(found) >= 2:
                near[peer] = [peer, *found]
        return near

    def _choose_of_two(self, plan: Plan, near: _Near, rows: Mapping[int, int], now: float) -> Plan:
        """Each part to the better of two that are as good as any, drawn anew for each call."""
        chosen: Plan = {}
        for peer, experts in plan.items():
            one = other = peer
            if peer in near:
                of = near[peer]
                one, other = of[int(self._rng.random() * len(of))], of[int(self._rng.random() * len(of))]
                if one != other and self._predict(other, experts, rows, now) < self._predict(one, experts, rows, now):
                    one = other
            chosen[one if one not in chosen else peer] = experts
        return chosen

    def _explore(
        self,
        best: Plan,
        layer: int,
        rows: Mapping[int, int],
        candidates: Mapping[int, Sequence[PeerId]],
        now: float,
        preferred: frozenset[PeerId],
    ) -> Plan:
        """The same call by replicas that ``best`` leaves out, if there are any that aren't far slower: or else a
        replica that was slow once would never be heard of again, nor missed when it dies. Where there are preferred
        ones, among those.
        """
        if any(best.keys() >= (preferred.intersection(candidates[e]) or set(candidates[e])) for e in rows):
            return best
        other = self._plan(layer, rows, candidates, now, best.keys(), preferred)
        limit_s = EXPLORE_COST * max(self._predict(peer, experts, rows, now) for peer, experts in best.items())
        for peer, experts in other.items():
            if self.is_cooling(peer, now) or self._predict(peer, experts, rows, now) > limit_s:
                return best
        return other

    def _predict(self, peer: PeerId, experts: list[int], rows: Mapping[int, int], now: float) -> float:
        units = sum(rows[expert] for expert in experts)
        estimate = _estimate(self._get(peer, now), _get_size_class(units / len(experts)), now)
        fixed_s, unit_s = estimate or (PRIOR_FIXED_S, PRIOR_UNIT_S)
        return fixed_s + units * unit_s

    def note_reply(
        self,
        peer: PeerId,
        rows_x_experts: int,
        elapsed_s: float,
        service_s: float,
        queue_depth: int,
        now: float,
        *,
        experts: int = 1,
    ) -> None:
        """``peer`` answered: ``rows_x_experts`` units of work (spread over ``experts``) took ``elapsed_s`` in all.

        ``service_s`` and ``queue_depth`` are the peer's own word; neither can make it look faster than ``elapsed_s``.
        """
        state = self._get(peer, now)
        units = max(rows_x_experts, 1)
        service_s = min(max(service_s, 0.0), elapsed_s)
        size = _get_size_class(units / max(experts, 1))
        fixed_s, unit_s = elapsed_s - service_s, service_s / units
        if size in state.by_size:
            old = state.by_size[size]
            fixed_s, unit_s = old[0] + SMOOTHING * (fixed_s - old[0]), old[1] + SMOOTHING * (unit_s - old[1])
        state.by_size[size] = fixed_s, unit_s
        state.queue_s, state.queue_at = queue_depth * service_s, now
        state.used_at, state.used_in = now, self._choices
        state.late = 0
        self.hedging.note_latency(peer, units, elapsed_s)
        if state.failures:
            state.failures, state.cool_until = 0, 0.0
            self._failing.discard(peer)
            self._plans.clear()
        elif any(_moved(_estimate(state, planned, now), old) for planned, old in state.planned.items()):
            self._plans.clear()

    def note_failure(self, peer: PeerId, now: float, waited_s: float = 0.0) -> None:
        """``peer`` didn't answer in ``waited_s``, or wrongly: it cools down for 1 s, 2 s, 4 s ... or several times
        what that took, at most :data:`COOLDOWN_MAX_S`.
        """
        state = self._get(peer, now)
        cool_s = max(COOLDOWN_S * 2.0 ** min(state.failures, 16), COOLDOWN_WAITS * waited_s)
        state.cool_until = now + min(cool_s, COOLDOWN_MAX_S)
        state.failures += 1
        state.late = 0
        state.used_at, state.used_in = now, self._choices
        self._failing.add(peer)
        self._plans.clear()

    def note_late(self, peer: PeerId, rows_x_experts: int, waited_s: float, now: float, *, experts: int = 1) -> bool:
        """Others answered a call for ``peer``, which hadn't after ``waited_s``. True: it happened :data:`LATE_LIMIT`
        times in a row, so it cools down as one that failed.
        """
        units = max(rows_x_experts, 1)
        state = self._get(peer, now)
        self.hedging.note_latency(peer, units, waited_s)
        state.late += 1
        if state.late >= LATE_LIMIT or state.failures:
            self.note_failure(peer, now, waited_s)
            return True
        size = _get_size_class(units / max(experts, 1))
        if size in state.by_size:  # it takes so long at least
            fixed_s, unit_s = state.by_size[size]
            state.by_size[size] = fixed_s + SMOOTHING * max(waited_s - units * unit_s - fixed_s, 0.0), unit_s
        self._plans.clear()
        return False

    def note_call(self) -> None:
        """A call is on its way, and not as another one's hedge."""
        self.hedging.note_call()

    def note_busy(self) -> None:
        """A host refused a call for want of room."""
        self.hedging.note_busy()

    def get_hedge_delay_s(self, peer: PeerId, rows_x_experts: int) -> float | None:
        """How long to wait for ``peer`` before :meth:`hedge`; ``None``: as long as it takes."""
        return self.hedging.get_delay_s(peer, rows_x_experts)

    def hedge(
        self,
        layer: int,
        rows: Mapping[int, int],
        candidates: Mapping[int, Sequence[PeerId]],
        now: float,
        exclude: AbstractSet[PeerId],
        *,
        preferred: frozenset[PeerId] = _NOBODY,
    ) -> Plan:
        """Who shall be asked too for a call that takes long; nobody, if all others cool down or the budget is spent.

        One replica that holds all of it, if there is one: then the sums are the same, to the bit.

        Args:
            exclude: whoever was asked, and others that :meth:`choose` would leave out.
        """
        usable: dict[int, list[PeerId]] = {}
        for expert in rows:
            peers = [p for p in candidates.get(expert, ()) if p not in exclude and not self.is_cooling(p, now)]
            # Who failed before may be as silent as whoever is waited for.
            usable[expert] = [peer for peer in peers if peer not in self._failing] or peers
        if not usable or not all(usable.values()):
            return {}
        first, *others = usable.values()
        whole = [peer for peer in first if all(peer in holders for holders in others)]
        if whole:
            plan = self._plan_whole(rows, whole, preferred, now)
        else:
            plan = self._plan(layer, rows, usable, now, _NOBODY, preferred, is_retry=True)
        if not self.hedging.take(len(plan)):
            return {}
        self._put_on_trial(plan, now)
        return plan

    def _plan_whole(
        self, rows: Mapping[int, int], peers: Sequence[PeerId], preferred: frozenset[PeerId], now: float
    ) -> Plan:
        """All of a call to the one of ``peers`` that ends it soonest."""
        peers = [peer for peer in peers if peer in preferred] or peers
        peers = [peer for peer in peers if self._get(peer, now).by_size] or peers
        experts = sorted(rows)
        best = min(peers, key=lambda peer: (self._predict(peer, experts, rows, now), self._get(peer, now).tie))
        return {best: experts}

    def is_cooling(self, peer: PeerId, now: float) -> bool:
        """True while ``peer`` is used only if nobody else can."""
        state = self._peers.get(peer)
        return state is not None and now < state.cool_until

    def get_estimate_s(self, peer: PeerId, rows: int, experts: int, now: float) -> float:
        """The predicted time of one call: ``rows`` rows through each of ``experts`` experts."""
        fixed_s, unit_s = _estimate(self._get(peer, now), _get_size_class(rows), now) or (PRIOR_FIXED_S, PRIOR_UNIT_S)
        return fixed_s + rows * experts * unit_s

    def _plan(
        self,
        layer: int,
        rows: Mapping[int, int],
        candidates: Mapping[int, Sequence[PeerId]],
        now: float,
        exclude: AbstractSet[PeerId],
        preferred: frozenset[PeerId],
        *,
        is_retry: bool = False,
    ) -> Plan:
        usable: dict[int, Sequence[PeerId]] = {}
        missing: list[int] = []
        for expert in rows:
            peers = [peer for peer in candidates.get(expert, ()) if peer not in exclude]
            usable[expert] = [peer for peer in peers if not self.is_cooling(peer, now)] or peers
            if preferred:
                usable[expert] = [peer for peer in usable[expert] if peer in preferred] or usable[expert]
            if is_retry:
                usable[expert] = [peer for peer in usable[expert] if self._get(peer, now).by_size] or usable[expert]
            if not peers:
                missing.append(expert)
        if missing:
            raise NoPeerCouldServe(
                f"no live host for {len(missing)} of {len(rows)} experts of layer {layer}",
                hint="wait for hosts to return, or host the missing experts yourself",
                missing={layer: sorted(missing)},
            )
        if not rows:
            return {}
        size = _get_size_class(sum(rows.values()) / len(rows))
        states = {peer: self._get(peer, now) for peers in usable.values() for peer in peers}
        estimates = {peer: _estimate(state, size, now) for peer, state in states.items()}
        known = [estimate for estimate in estimates.values() if estimate is not None]
        newcomer = (
            OPTIMISM * min([fixed for fixed, _ in known], default=PRIOR_FIXED_S),
            OPTIMISM * min([unit for _, unit in known], default=PRIOR_UNIT_S),
        )
        costs: dict[PeerId, tuple[float, float, float]] = {}
        for peer, state in states.items():
            estimate = state.planned[size] = estimates[peer] or newcomer
            costs[peer] = (*estimate, state.tie)
        # Largest first; among equals those with the fewest choices first, then by number, so that plans are stable.
        order = sorted(rows, key=lambda expert: (-rows[expert], len(usable[expert]), expert))
        best_s, best = _spread(order, rows, usable, costs)
        # Drop the peer with the least to do for as long as the others do it sooner than an extra frame costs.
        while len(best) > 1:
            least = min(best, key=lambda peer: (len(best[peer]), -costs[peer][0], costs[peer][2]))
            left = {expert: [p for p in usable[expert] if p in best and p != least] for expert in order}
            if not all(left.values()):
                break
            fewer_s, fewer = _spread(order, rows, left, costs)
            if fewer_s >= best_s:
                break
            best_s, best = fewer_s, fewer
        return {peer: sorted(experts) for peer, experts in best.items()}

    def _get(self, peer: PeerId, now: float) -> _Peer:
        state = self._peers.get(peer)
        if state is None:
            if len(self._peers) >= PEERS:
                longest = min(self._peers, key=lambda known: self._peers[known].used_at)
                del self._peers[longest]
                self._failing.discard(longest)
            state = self._peers[peer] = _Peer(self._rng.random(), now, self._choices)
        elif now - state.used_at > FORGET_S and self._choices - state.used_in >= FORGET_CHOICES:
            state.by_size.clear()
        return state


def _spread(
    order: list[int],
    rows: Mapping[int, int],
    usable: Mapping[int, Sequence[PeerId]],
    costs: Mapping[PeerId, tuple[float, float, float]],
) -> tuple[float, Plan]:
    """Each expert in turn to the peer that would end first. Returns (predicted s, plan)."""
    plan: Plan = {}
    ends: dict[PeerId, float] = {}
    for expert in order:
        units = rows[expert]
        chosen: PeerId | None = None
        chosen_end = chosen_tie = 0.0
        for peer in usable[expert]:
            fixed_s, unit_s, tie = costs[peer]
            end = ends.get(peer, fixed_s) + units * unit_s
            if chosen is None or end < chosen_end or (end == chosen_end and tie < chosen_tie):
                chosen, chosen_end, chosen_tie = peer, end, tie
        assert chosen is not None
        ends[chosen] = chosen_end
        plan.setdefault(chosen, []).append(expert)
    return max(ends.values()) + EXTRA_PEER_S * len(plan), plan


def _get_size_class(rows: float) -> int:
    """1 row → 0, 2-7 → 1, 8-31 → 2, 32-127 → 3 ..."""
    return int(rows).bit_length() // 2


def _estimate(state: _Peer, size: int, now: float) -> _Estimate | None:
    """What is known of a peer for a size class, or else for the nearest one; None for a newcomer."""
    if not state.by_size:
        return None
    estimate = state.by_size.get(size) or state.by_size[min(state.by_size, key=lambda known: abs(known - size))]
    if now - state.queue_at < QUEUE_FRESH_S:
        # Waiting shows in the elapsed time too, so the larger of both, not the sum.
        return max(estimate[0], state.queue_s), estimate[1]
    return estimate


def _moved(new: _Estimate | None, old: _Estimate) -> bool:
    return new is None or any(abs(a - b) > MOVED * max(b, 1e-6) for a, b in zip(new, old, strict=True))
