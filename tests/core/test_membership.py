"""Membership over a network that delays, drops, duplicates, reorders, cuts; peers that die, return, leave and lie."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from membership_driver import OTHER, ROOT, PlainNotary, Swarm, make_advert
from swarm_driver import NOW, SWARM, make_contact, make_key, make_peer

from daaswarm import messages
from daaswarm.core.detector import RECENT_S
from daaswarm.core.health import State
from daaswarm.core.marks import get_mark, pack_versions
from daaswarm.core.membership import PULL_S, PUSH_BURST
from daaswarm.core.membership_events import Misbehaved, Reply, RequestReceived, SendRequest, WantMembers
from daaswarm.core.news import FANOUT
from daaswarm.core.signing import MAX_TTL_S
from daaswarm.messages import Doubt, Failure, Ping, PullAdverts, Pulled, PushAdverts, Pushed, Signed

GONE_S = 60.0  # after its death nobody offers a host any more; the figure


def make_swarm(hosts: int, *, seed: int = 1, followers: int = 1) -> Swarm:
    """Hosts 1 to n of one model, and followers from 101 on, who know each other."""
    swarm = Swarm(seed)
    for number in range(1, hosts + 1):
        swarm.add(number)
        swarm.serve(number)
    for number in range(101, 101 + followers):
        swarm.add(number)
        swarm.follow(number)
    swarm.run(45)
    assert all(set(swarm.offered(n)) == set(range(1, hosts + 1)) for n in swarm.nodes)
    return swarm


def count_offers(swarm: Swarm, number: int) -> list[int]:
    return [n for n in swarm.nodes if n not in swarm.dead and number in swarm.offered(n)]


@pytest.mark.parametrize("seed", range(3))
def test_the_dead_are_offered_by_nobody_after_a_minute(seed: int) -> None:
    swarm = make_swarm(12, seed=seed, followers=3)
    killed = [2, 7, 8]
    for number in killed:
        swarm.kill(number)
    swarm.run(GONE_S)
    swarm.validate()
    assert [count_offers(swarm, number) for number in killed] == [[], [], []], f"seed {seed}"
    assert all(len(swarm.offered(n)) == 9 for n in swarm.nodes if n not in swarm.dead)
    for number in killed:  # with nothing in memory
        swarm.add(number)
        swarm.serve(number, {1: [number]})
    swarm.run(60)
    assert all(swarm.offered(n).get(k) == {1: [k]} for n in swarm.nodes for k in killed), f"seed {seed}"


def test_a_partition_of_five_minutes_expires_nothing_and_heals_within_a_minute() -> None:
    swarm = make_swarm(30, followers=2)
    left, right = [*range(1, 16), 101], [*range(16, 31), 102]
    swarm.partition(left, right)
    swarm.run(100)
    swarm.serve(3, {5: [5]})  # something changes on either side
    swarm.withdraw(20)
    swarm.run(200)
    assert all(set(swarm.offered(n)) == set(range(1, 16)) for n in left)  # nobody is offered who can't be reached
    assert all(set(swarm.offered(n)) == set(range(16, 31)) - {20} for n in right)
    for node in swarm.nodes.values():
        adverts = node.book.get_all(ROOT)
        assert len(adverts) == 30 and all(k.advert.expires_at > swarm.now for k in adverts)
    swarm.heal()
    swarm.run(60)
    swarm.validate()
    for number in swarm.nodes:
        offered = swarm.offered(number)
        assert set(offered) == set(range(1, 31)) - {20} and offered[3] == {5: [5]}, number


def test_who_leaves_is_forgotten_at_once() -> None:
    swarm = make_swarm(10, followers=2)
    swarm.withdraw(4)
    assert not swarm.nodes[4].has_said_goodbye()
    swarm.run(1)
    assert swarm.nodes[4].has_said_goodbye()
    swarm.run(2)
    assert count_offers(swarm, 4) == []
    swarm.serve(4, {9: [1]})  # it comes back
    swarm.run(3)
    assert all(swarm.offered(n)[4] == {9: [1]} for n in swarm.nodes)


def test_a_change_reaches_all_in_seconds_and_costs_each_a_few_messages() -> None:
    swarm = make_swarm(40)
    before = swarm.sent["PushAdverts"]
    swarm.serve(5, {3: [1, 2]})
    swarm.run(4)
    assert sum(swarm.offered(n)[5] == {3: [1, 2]} for n in swarm.nodes) >= 38
    assert swarm.sent["PushAdverts"] - before <= 2 * FANOUT * len(swarm.nodes)  # each hands it on once
    swarm.run(60)  # pulls reach the rest
    assert all(swarm.offered(n)[5] == {3: [1, 2]} for n in swarm.nodes)


def test_pulls_alone_converge() -> None:
    swarm = make_swarm(12)
    swarm.forge = lambda asker, target, message: Pushed() if isinstance(message, PushAdverts) else None
    swarm.serve(5, {3: [1, 2]})
    swarm.run(10)
    behind = [n for n in swarm.nodes if swarm.offered(n)[5] != {3: [1, 2]}]
    assert behind
    swarm.run(170)
    assert all(swarm.offered(n)[5] == {3: [1, 2]} for n in swarm.nodes)


def test_one_that_only_this_node_cannot_reach_is_offered_by_the_others() -> None:
    swarm = make_swarm(8)
    swarm.cut.add(frozenset((101, 3)))
    swarm.run(240)
    assert count_offers(swarm, 3) == [n for n in swarm.nodes if n != 101]
    swarm.cut.clear()
    swarm.run(60)
    assert 3 in swarm.offered(101)


def test_a_lie_about_a_living_host_costs_it_a_few_pings_and_is_not_repeated() -> None:
    swarm = make_swarm(12)
    swarm.run(RECENT_S + 1)
    about = Doubt(about=pack_versions([(get_mark(make_peer(3)), 1 << 62)] * 64))
    before = dict(swarm.sent)
    pings: list[int] = []
    swarm.forge = lambda asker, target, message: pings.append(target) if isinstance(message, Ping) else None  # type: ignore[func-returns-value]
    for number in (5, 6):
        request = RequestReceived(request_id=-1, peer=make_peer(99), contact=make_contact(99), message=about)
        swarm.perform(number, [e for e in swarm.nodes[number].handle(request, swarm.now) if not isinstance(e, Reply)])
    swarm.rng.random = lambda: 0.5  # type: ignore[method-assign]
    swarm._asking = type("Any", (dict,), {"pop": lambda self, key: dict.pop(self, key, lambda m: None)})(swarm._asking)
    swarm.run(3)
    assert pings.count(3) <= 4  # two who were told, and its watchers as always
    assert swarm.sent.get("Doubt", 0) == before.get("Doubt", 0)  # nobody repeated it
    assert len(count_offers(swarm, 3)) == len(swarm.nodes)


def test_a_requester_learns_from_others_who_is_down() -> None:
    swarm = make_swarm(6)
    swarm.kill(2)
    swarm.run(GONE_S)
    swarm.add(200)
    swarm.follow(200)  # the DHT still points to the dead
    swarm.run(12)
    assert set(swarm.offered(200)) == {1, 3, 4, 5, 6}


def test_hosts_look_for_others_now_and_then_and_followers_when_they_know_nobody() -> None:
    swarm = make_swarm(2)

    def count_looks(number: int, seconds: float) -> int:
        swarm.effects[number].clear()
        for _ in range(int(seconds / 60)):
            swarm.follow(number)  # somebody goes on asking
            swarm.run(60)
        return sum(isinstance(effect, WantMembers) for effect in swarm.effects[number])

    swarm.effects[1].clear()
    assert count_looks(101, 2_000) == 0
    assert sum(isinstance(effect, WantMembers) for effect in swarm.effects[1]) == 2
    swarm.kill(1)
    swarm.kill(2)
    assert count_looks(101, 1_200) > 10


def test_a_failure_that_the_node_itself_met_counts() -> None:
    swarm = make_swarm(6)
    node = swarm.nodes[101]
    swarm.kill(2)
    swarm.perform(101, node.note_failed(make_peer(2), swarm.now))
    assert node.get_state(make_peer(2)) is State.DOUBTED
    swarm.run(11)
    assert node.get_state(make_peer(2)) is State.DOWN and 2 not in swarm.offered(101)
    swarm.perform(101, node.note_alive(make_peer(2), swarm.now))
    assert node.get_state(make_peer(2)) is State.UP
    stranger = make_peer(77)  # the DHT pointed to it; nobody has its advert
    swarm.perform(101, node.note_failed(stranger, swarm.now))
    swarm.run(200)
    assert node.get_state(stranger) is not State.UP  # it is remembered as long as pointers live
    swarm.run(2 * MAX_TTL_S)
    assert node.get_state(stranger) is State.UP


def test_the_last_life_of_a_key_does_not_speak_for_it() -> None:
    """A host whose clock ran ahead is restarted; others hold its adverts of then."""
    swarm = make_swarm(5)
    swarm.perform(3, swarm.nodes[3].withdraw(ROOT, swarm.now + 50))  # signed with the clock ahead
    swarm.run(3)
    assert count_offers(swarm, 3) == []
    swarm.add(3)
    swarm.serve(3, {8: [8]})
    swarm.run(45)
    assert all(swarm.offered(n).get(3) == {8: [8]} for n in swarm.nodes)


def test_forged_and_unwanted_adverts() -> None:
    swarm = make_swarm(3)
    node = swarm.nodes[1]
    good = PlainNotary(make_key(50), SWARM).seal_advert(
        msgspec.structs.replace(make_advert(50, {0: [1]}), seq=5, expires_at=NOW + 600)
    )
    forged = msgspec.structs.replace(good, signature=b"\1" * 64)
    garbage = msgspec.structs.replace(good, payload=b"garbage")
    for bad in (forged, garbage):
        effects = push(swarm, 1, [bad, good])
        assert [type(e) for e in effects if not isinstance(e, SendRequest)] == [Misbehaved, Reply]
        assert node.book.get(make_peer(50), ROOT) is None  # nothing after it is believed
    other = PlainNotary(make_key(51), SWARM).seal_advert(
        msgspec.structs.replace(make_advert(51, {0: [1]}, OTHER), seq=5, expires_at=NOW + 600)
    )
    (reply,) = [e for e in push(swarm, 1, [other, good]) if isinstance(e, Reply)]
    assert reply.message == Pushed(unwanted=[OTHER])
    assert node.book.get(make_peer(51), OTHER) is None and node.book.get(make_peer(50), ROOT) is not None
    swarm.validate()


def test_an_answer_to_a_pull_of_another_model_is_not_kept() -> None:
    swarm = Swarm()
    node = swarm.add(1)
    swarm.follow(1)
    swarm.follow(1, OTHER)
    advert = msgspec.structs.replace(make_advert(51, {0: [1]}, OTHER), seq=5, expires_at=NOW + 600)
    signed = Signed(public_key=bytes(32), signature=bytes(64), payload=messages.encode(advert))
    swarm.add(2)
    swarm.serve(2)
    swarm.forge = lambda *call: Pulled(adverts=[signed]) if isinstance(call[2], PullAdverts) else None
    swarm.run(60)
    assert node.book.get(make_peer(51), OTHER) is None


def test_who_asks_too_much_is_told_so() -> None:
    swarm = make_swarm(3)

    def ask(message: PushAdverts | PullAdverts | Doubt) -> object:
        request = RequestReceived(request_id=-1, peer=make_peer(9), contact=None, message=message)
        (reply,) = [e for e in swarm.nodes[1].handle(request, swarm.now) if isinstance(e, Reply)]
        return reply.message

    empty = PushAdverts(adverts=[])
    cases: list[PushAdverts | PullAdverts | Doubt] = [empty, PullAdverts(model_root=ROOT), Doubt(about=b"")]
    for message in cases:
        answers = [ask(message) for _ in range(int(PUSH_BURST) + 1)]
        assert not isinstance(answers[0], Failure)
        assert isinstance(answers[-1], Failure) and answers[-1].code == "busy" and answers[-1].retry_after_s > 0
    swarm.run(60)
    assert not any(isinstance(ask(message), Failure) for message in cases)
    failure = ask(PullAdverts(model_root=OTHER))
    assert isinstance(failure, Failure) and failure.code == "not_followed"


def test_a_model_with_thousands_of_hosts_goes_over_in_parts() -> None:
    swarm = Swarm()
    for number in (1, 2):
        swarm.add(number)
        swarm.serve(number)
    notary = PlainNotary(make_key(1), SWARM)
    for i in range(1_300):
        fake = msgspec.structs.replace(
            make_advert(1, {0: [1]}), peer_id=f"12D3KooW{i:044d}", seq=1, expires_at=NOW + 800
        )
        swarm.nodes[1].put(notary.seal_advert(fake), NOW)
    swarm.forge = lambda *call: messages.Pong() if isinstance(call[2], Ping) else None
    swarm.run(300)
    assert len(swarm.nodes[2].book.get_all(ROOT)) > 1_000  # as many as are kept on others' word
    swarm.validate()


def push(swarm: Swarm, number: int, adverts: list[Signed]) -> list[object]:
    request = RequestReceived(
        request_id=-1, peer=make_peer(99), contact=None, message=PushAdverts(adverts=adverts, hops=1)
    )
    return list(swarm.nodes[number].handle(request, swarm.now))


def test_the_clock_is_set() -> None:
    swarm = make_swarm(5)
    for node in swarm.nodes.values():
        node.shift(7_200.0)
    for _ in range(2):
        swarm._heap = [(at + 3_600.0, order, action) for at, order, action in swarm._heap]
        swarm.now += 3_600.0
    for number, node in swarm.nodes.items():
        swarm.perform(number, node.renew(swarm.now))
    swarm.run(2 * PULL_S)
    assert all(set(swarm.offered(n)) == set(range(1, 6)) for n in swarm.nodes)
    swarm.validate()


def test_same_seed_same_course() -> None:
    def run() -> object:
        swarm = make_swarm(8, seed=5)
        swarm.loss = swarm.twice = 0.1
        swarm.kill(3)
        swarm.run(100)
        return swarm.sent, swarm.bytes, [list(swarm.offered(n)) for n in swarm.nodes]

    assert run() == run()


HOSTS, FOLLOWERS = [1, 2, 3, 4, 5, 6], [101, 102]


class MembershipMachine(RuleBasedStateMachine):
    """Against a plain model: what each host that lives serves. While the nemesis is at work only safety holds; once it
    rests, everybody knows the truth within a minute."""

    def __init__(self) -> None:
        super().__init__()
        self.swarm = Swarm(7)
        self.serves: dict[int, dict[int, list[int]]] = {}
        for number in [*HOSTS, *FOLLOWERS]:
            self.swarm.add(number)
            if number in HOSTS:
                self.start(number, number)
            self.swarm.follow(number)

    def start(self, number: int, expert: int) -> None:
        self.serves[number] = {0: [expert]}
        self.swarm.serve(number, self.serves[number])

    @rule(number=st.sampled_from(HOSTS), expert=st.integers(0, 50))
    def advertise(self, number: int, expert: int) -> None:
        if number not in self.swarm.dead:
            self.start(number, expert)

    @rule(number=st.sampled_from(HOSTS))
    def withdraw(self, number: int) -> None:
        if number not in self.swarm.dead:
            self.serves.pop(number, None)
            self.swarm.withdraw(number)

    @rule(number=st.sampled_from([*HOSTS, *FOLLOWERS]))
    def kill(self, number: int) -> None:
        if number not in self.swarm.dead and len(self.swarm.dead) < 4:
            self.swarm.kill(number)
            self.serves.pop(number, None)
            self.swarm.run(0.01)  # no process dies and starts again within a millisecond, of which its seqs are made

    @precondition(lambda self: bool(self.swarm.dead))
    @rule(expert=st.integers(0, 50))
    def restart(self, expert: int) -> None:
        number = min(self.swarm.dead)
        self.swarm.add(number)
        self.swarm.follow(number)
        if number in HOSTS:
            self.start(number, expert)

    @rule(at=st.integers(1, 5), follower=st.booleans())
    def partition(self, at: int, follower: bool) -> None:
        self.swarm.partition([*HOSTS[:at], 101], [*HOSTS[at:], *([102] if follower else [])])

    @rule(
        loss=st.sampled_from([0.0, 0.1, 0.3]), twice=st.sampled_from([0.0, 0.3]), delay_s=st.sampled_from([0.02, 1.5])
    )
    def trouble(self, loss: float, twice: float, delay_s: float) -> None:
        self.swarm.loss, self.swarm.twice, self.swarm.delay_s = loss, twice, delay_s

    @rule(seconds=st.sampled_from([0.3, 3.0, 20.0, 120.0]))
    def wait(self, seconds: float) -> None:
        self.swarm.run(seconds)

    @rule()
    def rest(self) -> None:
        """The nemesis rests for a minute, and a half more for what it left on its way."""
        swarm = self.swarm
        swarm.heal()
        swarm.loss, swarm.twice, swarm.delay_s = 0.0, 0.0, 0.02
        for number in swarm.nodes:
            if number not in swarm.dead:
                swarm.follow(number)  # they ask for the model now and then
        swarm.run(90)
        for number in swarm.nodes:
            if number not in swarm.dead:
                assert swarm.offered(number) == self.serves, f"node {number}"

    @invariant()
    def nothing_impossible(self) -> None:
        self.swarm.validate()
        for number, node in self.swarm.nodes.items():
            if number not in self.swarm.dead:
                for known in node.book.get_all(ROOT):
                    owner = self.swarm.nodes[self.swarm.numbers[known.advert.peer_id]]  # type: ignore[index]
                    own = owner.book.get(owner.peer_id, ROOT)
                    assert own is None or known.advert.seq <= own.advert.seq or owner.peer_id != known.advert.peer_id
                assert all(
                    isinstance(e, SendRequest | Reply) or not isinstance(e, Misbehaved)
                    for e in self.swarm.effects[number]
                )
                self.swarm.effects[number].clear()


MembershipMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestMembership = MembershipMachine.TestCase
