"""Admission: bounded by count and by waiting time, fair among peers."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from swarm_driver import NOW

from daaswarm.core.admission import (
    BATCH_S,
    FEW_IN_A_ROW,
    HELD_BYTES,
    HELD_BYTES_PER_PEER,
    RETRY_MAX_S,
    RETRY_MIN_S,
    Admission,
    Admitted,
    Refused,
    Ticket,
)
from daaswarm.types import PeerId

A, B = PeerId("a"), PeerId("b")


def admit(admission: Admission, peer: PeerId, rows: int = 1, deadline_s: float = 1.0) -> Ticket:
    verdict = admission.try_admit(peer, rows, deadline_s, NOW)
    assert isinstance(verdict, Admitted)
    return verdict.ticket


class AdmissionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(calls_per_peer=3, calls_per_host=5)
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []

    @rule(peer=st.sampled_from("abc"), rows=st.integers(1, 50), deadline_s=st.sampled_from([0.01, 1.0, 30.0]))
    def call(self, peer: str, rows: int, deadline_s: float) -> None:
        every = self.waiting + self.running
        full = len(every) >= 5 or sum(t.peer == peer for t in every) >= 3
        wait_s = self.admission.get_wait_s(PeerId(peer))
        verdict = self.admission.try_admit(PeerId(peer), rows, deadline_s, NOW)
        if full or wait_s > deadline_s / 2:
            assert (
                isinstance(verdict, Refused) and RETRY_MIN_S <= verdict.retry_after_s <= RETRY_MAX_S and verdict.reason
            )
        else:
            assert isinstance(verdict, Admitted)
            assert (verdict.ticket.work_rows, verdict.ticket.late_at) == (rows, NOW + deadline_s)
            self.waiting.append(verdict.ticket)

    @rule()
    def start(self) -> None:
        ticket = self.admission.next()
        if not self.waiting:
            assert ticket is None
            return
        assert ticket is not None
        assert ticket is next(t for t in self.waiting if t.peer == ticket.peer), "in order within a peer"
        self.waiting.remove(ticket)
        self.running.append(ticket)

    @rule(data=st.data(), service_s=st.sampled_from([None, 0.001, 0.5]))
    def finish(self, data: st.DataObject, service_s: float | None) -> None:
        every = self.waiting + self.running
        if not every:
            return
        ticket = data.draw(st.sampled_from(every))
        self.admission.finish(ticket, service_s)
        self.admission.finish(ticket, service_s)  # twice does no harm
        (self.waiting if ticket in self.waiting else self.running).remove(ticket)

    @invariant()
    def valid(self) -> None:
        self.admission.validate()
        assert self.admission.queue_depth == len(self.waiting)


TestAdmission = AdmissionMachine.TestCase
TestAdmission.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)


def test_peers_take_turns() -> None:
    admission = Admission()
    mine = [admit(admission, A) for _ in range(4)]
    yours = [admit(admission, B) for _ in range(2)]
    order = [admission.next() for _ in range(6)]
    assert order == [mine[0], yours[0], mine[1], yours[1], mine[2], mine[3]]
    assert admission.next() is None


def test_a_call_is_refused_when_it_would_wait_for_half_of_its_deadline() -> None:
    admission = Admission()
    ticket = admit(admission, A, rows=10)
    assert admission.next() is ticket
    admission.finish(ticket, 0.1)  # 10 ms a row
    admit(admission, A, rows=100)
    assert admission.next() is not None
    refused = admission.try_admit(B, 1, 1.5, NOW)
    assert isinstance(refused, Refused) and "deadline" in refused.reason
    assert abs(refused.retry_after_s - 0.25) < 1e-9
    admit(admission, B, rows=1, deadline_s=3.0)


def test_work_that_came_to_nothing_leaves_the_queue_and_teaches_nothing() -> None:
    admission = Admission()
    ticket = admit(admission, A, rows=100)
    admission.finish(ticket)
    assert admission.next() is None and admission.get_wait_s(A) == 0
    admit(admission, A, rows=100)
    assert admission.get_wait_s(A) == 0


def test_a_greedy_peer_makes_nobody_wait_but_itself() -> None:
    admission = Admission()
    ticket = admit(admission, A, rows=10)
    assert admission.next() is ticket
    admission.finish(ticket, 0.1)  # 10 ms a row
    for _ in range(100):
        admit(admission, A, rows=10, deadline_s=30.0)
    assert admission.next() is not None  # one runs, 99 wait
    assert abs(admission.get_wait_s(A) - 10.0) < 1e-9
    assert abs(admission.get_wait_s(B) - 0.2) < 1e-9  # for the one that runs, and one more
    assert isinstance(admission.try_admit(A, 1, 1.0, NOW), Refused)
    admit(admission, B, rows=10)
    assert abs(admission.get_wait_s(B) - 0.4) < 1e-9


def test_small_calls_do_not_make_a_large_one_look_endless() -> None:
    admission = Admission()

    def do(rows: int, service_s: float) -> None:
        ticket = admit(admission, A, rows)
        assert admission.next() is ticket
        admission.finish(ticket, service_s)

    do(4096, 0.04)  # 10 us a row
    for _ in range(10):
        do(1, 300e-6)  # what a call costs by itself
    admit(admission, A, 4096)
    assert admission.get_wait_s(B) < 0.1


def put(admission: Admission, peer: PeerId, group: object, share: float = 0.25, *, is_few: bool = False) -> Ticket:
    verdict = admission.try_admit(peer, 1, 1.0, NOW, group=group, share=share, is_few=is_few)  # type: ignore[arg-type]
    assert isinstance(verdict, Admitted)
    return verdict.ticket


def test_a_batch_takes_one_of_each_peer_in_turn_until_it_is_full() -> None:
    admission = Admission()
    a = [put(admission, A, "x") for _ in range(4)]
    other = put(admission, A, "y")
    b = [put(admission, B, "x") for _ in range(2)]
    assert admission.next_batch() == [a[0], b[0], a[1], b[1]]
    admission.validate()
    assert admission.next_batch() == [a[2], a[3]]
    assert admission.next_batch() == [other]
    assert admission.next_batch() == []
    for ticket in (*a, *b, other):
        admission.finish(ticket, 0.1)
    admission.validate()


def test_what_has_no_group_or_is_too_large_is_computed_alone() -> None:
    admission = Admission()
    alone = [put(admission, A, None), put(admission, A, None), put(admission, A, "x", 3.0), put(admission, A, "x")]
    assert [admission.next_batch() for _ in alone] == [[ticket] for ticket in alone]


def test_a_batch_is_not_expected_to_take_long() -> None:
    admission = Admission()
    slow = put(admission, A, None)
    assert admission.next_batch() == [slow]
    admission.finish(slow, BATCH_S / 2.5)  # one row
    waiting = [put(admission, A, "x", share=0.01) for _ in range(5)]
    assert [len(admission.next_batch()) for _ in range(3)] == [2, 2, 1]
    for ticket in waiting:
        admission.finish(ticket, 2 * BATCH_S)
    first, second = put(admission, A, "x"), put(admission, A, "x")
    assert admission.next_batch() == [first]  # one in any case
    assert admission.next_batch() == [second]
    admission.validate()


def test_few_rows_go_first_and_many_are_not_forgotten() -> None:
    admission = Admission()
    many = put(admission, A, None)
    few = [put(admission, B, None, is_few=True) for _ in range(FEW_IN_A_ROW + 2)]
    order = [admission.next_batch()[0] for _ in range(FEW_IN_A_ROW + 3)]
    assert order == [*few[:FEW_IN_A_ROW], many, *few[FEW_IN_A_ROW:]]


def test_waiting_bodies_have_a_budget() -> None:
    admission = Admission()

    def hold(peer: str, nbytes: int) -> Admitted | Refused:
        return admission.try_admit(PeerId(peer), 1, 1.0, NOW, nbytes=nbytes)

    first = hold("a", HELD_BYTES_PER_PEER)
    assert isinstance(first, Admitted)
    refused = hold("a", 1)
    assert isinstance(refused, Refused) and "one peer" in refused.reason
    assert isinstance(hold("b", HELD_BYTES - HELD_BYTES_PER_PEER), Admitted)
    refused = hold("c", 1)
    assert isinstance(refused, Refused) and "all the memory" in refused.reason
    admission.finish(first.ticket)
    assert isinstance(hold("a", 1), Admitted) and isinstance(hold("c", 1), Admitted)
    admission.validate()
