"""One iterative lookup: ask the nearest contacts known, learn nearer ones, stop when the nearest have answered.

Maymounkov and Mazieres, "Kademlia" (2002), section 2.3, along several paths that share no peer (Baumgart and Mies,
"S/Kademlia", 2007, section 4.4): what a liar names is asked by its own path alone, with that path's own requests. A
lookup of nodes has all its paths to the target; one of records has a path to each place of the key
(:mod:`daaswarm.core.places`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Literal

from daaswarm.core.places import SIDE_PLACES, get_places, get_replicas
from daaswarm.core.rng import Rng
from daaswarm.core.routing_table import get_node_number
from daaswarm.messages import Contact, FindNode, FindValue, Pointer, Signed
from daaswarm.types import PeerId

PATHS = 1 + SIDE_PLACES  # of a lookup
ALPHA = 3  # requests in flight per path that are not late; the paper's value for a lookup
CANDIDATES = 256  # contacts a path remembers; hostile answers name 20 made-up ones each
REQUESTS = 64  # a path gives up after; an honest one among a million nodes needs about 30
LOOKUP_RECORDS = 256  # distinct records a lookup collects: four full keys' worth
HOLDERS = 4  # of the nearest that gave records let a path end early, or ...
HOLDERS_SHARE = 0.3  # ... this share of its k nearest if those are more, ...
QUIET = 2  # ... if the last so many of them gave nothing new
AGREEING = (
    3,
    2,
    2,
)  # holders on each path that, if all gave the same records, end all: near one place liars feign nothing
FALSE_WORDS = 3  # more dead contacts than live ones that a peer named: the others it named are not asked

Want = Literal["nodes", "records"]

_IN_FLIGHT, _LATE, _ANSWERED, _GONE = 1, 2, 3, 4


class _Candidate:
    """``depth``: requests from us to its name. ``source``: who named it, 0 for our own table or several. ``state``:
    what the lookup knows of the peer, on whichever path it was asked. ``gave``: it gave records on this path."""

    __slots__ = ("contact", "depth", "gave", "number", "source", "state")

    def __init__(self, contact: Contact, number: int, depth: int, source: int, state: int | None) -> None:
        self.contact = contact
        self.number = number
        self.depth = depth
        self.source = source
        self.state = state
        self.gave = False


class _Path:
    """``order``: the sorted distances in ``known``; ``ranked``: the candidates in that order. ``gave``: by distance,
    how many records came from there. ``waiting``: what the last survey found, ``None`` after anything changed."""

    __slots__ = (
        "gave",
        "goal",
        "holders",
        "in_flight",
        "is_near",
        "is_over",
        "k",
        "known",
        "message",
        "order",
        "quiet",
        "ranked",
        "requests",
        "waiting",
    )

    def __init__(self, goal: int, k: int, message: FindNode | FindValue) -> None:
        self.goal = goal
        self.k = k
        self.holders = min(max(HOLDERS, int(HOLDERS_SHARE * k)), k)
        self.message = message
        self.order: list[int] = []
        self.ranked: list[_Candidate] = []
        self.waiting: list[_Candidate] | None = None
        self.known: dict[int, _Candidate] = {}
        self.gave: dict[int, int] = {}
        self.in_flight = 0
        self.requests = 0
        self.quiet = 0
        self.is_near = False  # the last answer named nobody nearer than known
        self.is_over = False


class Lookup:
    """The state of one lookup. It sends nothing: :meth:`take_next` names whom to ask, and by which path.

    Args:
        own: is never asked.
        rng: chooses whom to ask among the nearest, so that nobody can be sure to be asked first.
    """

    __slots__ = (
        "_answered",
        "_balance",
        "_own",
        "_rng",
        "_state",
        "hops",
        "paths",
        "records",
        "target",
        "want",
    )

    def __init__(self, target: bytes, want: Want, own: PeerId, k: int, rng: Rng) -> None:
        self.target = target
        self.want = want
        self.records: dict[PeerId, tuple[Pointer, Signed]] = {}  # by publisher, highest sequence number
        self.hops = 0  # requests one after the other until the first record, or until the nearest answered
        self._own = get_node_number(own)
        self._rng = rng
        self._state: dict[int, int] = {}  # by node number; who is not in it was not asked
        self._answered: dict[int, Contact] = {}
        self._balance: dict[int, int] = {}  # of a source: dead contacts that it named less live ones
        if want == "nodes":
            goal, message = int.from_bytes(target, "big"), FindNode(target=target)
            self.paths = [_Path(goal, k, message) for _ in range(PATHS)]
        else:
            self.paths = [
                _Path(
                    int.from_bytes(place, "big"),
                    get_replicas(k, i),
                    FindValue(key=target, place=place if i else None),
                )
                for i, place in enumerate(get_places(target))
            ]

    def start(self, contacts: Iterable[Contact], path: int | None = None) -> None:
        """Candidates of our own: for one path, or dealt out to all in turn."""
        if path is not None:
            self._add(self.paths[path], contacts, 1, 0)
            return
        dealt = list(contacts)
        for i, each in enumerate(self.paths):
            self._add(each, dealt[i :: len(self.paths)], 1, 0)

    def add(self, path: int, informant: PeerId, contacts: Iterable[Contact]) -> None:
        """Candidates that a peer named on a path. Ourselves, the undialable and those that failed are passed over."""
        each = self.paths[path]
        source = get_node_number(informant)
        asked = each.known.get(source ^ each.goal)
        nearest = each.order[0] if each.order else None
        self._add(each, contacts, asked.depth + 1 if asked is not None else 1, source)
        each.is_near = not each.order or each.order[0] == nearest

    def add_record(self, pointer: Pointer, signed: Signed) -> bool:
        """A checked record; a newer one of the same publisher replaces the older. True if it tells anything new."""
        peer = PeerId(pointer.peer_id)
        known = self.records.get(peer)
        if known is None and len(self.records) >= LOOKUP_RECORDS:
            return False
        if known is not None and pointer.seq <= known[0].seq:
            return False
        self.records[peer] = (pointer, signed)
        return True

    def take_next(self) -> list[tuple[int, Contact]]:
        """Whom to ask now, and by which path: the nearest not yet asked, as many as :data:`ALPHA` allows. While all
        holders agree, no more than have to."""
        if self.want == "records" and not self._is_disputed():
            taken = self._take([min(least - len(path.gave), ALPHA) for path, least in self._least()])
            if taken or any(path.in_flight for path in self.paths):
                return taken
        return self._take([ALPHA] * len(self.paths))

    def note_answered(self, path: int, peer: PeerId, gave: int = 0, *, is_news: bool = False) -> None:
        """``peer`` answered on ``path``, with so many records, of which some were new or none."""
        each = self.paths[path]
        number = get_node_number(peer)
        if self._state.get(number) == _IN_FLIGHT:
            each.in_flight -= 1
        self._mark(number, _ANSWERED)
        distance = number ^ each.goal
        candidate = each.known.get(distance)
        if candidate is None:
            return  # far off: nearer ones pushed it out
        self._answered[number] = candidate.contact
        self._judge(candidate, -1)
        if gave:
            each.gave[distance] = gave
            candidate.gave = True
            each.waiting = None
            each.quiet = 0 if is_news else each.quiet + 1
            if self._is_agreed():
                for other in self.paths:
                    other.is_over = True
        if self.want == "records":
            if is_news and not self.hops:
                self.hops = candidate.depth
        elif distance == min(n ^ each.goal for n in self._answered):
            self.hops = candidate.depth

    def note_late(self, path: int, peer: PeerId) -> None:
        """``peer`` takes long. Another may be asked in its place; an answer still counts."""
        number = get_node_number(peer)
        if self._state.get(number) != _IN_FLIGHT:
            return
        each = self.paths[path]
        self._mark(number, _LATE)
        each.in_flight -= 1
        if (candidate := each.known.get(number ^ each.goal)) is not None:
            self._judge(candidate, 1)

    def note_failed(self, path: int, peer: PeerId) -> None:
        """``peer`` will not answer."""
        number = get_node_number(peer)
        each = self.paths[path]
        state = self._state.get(number)
        self._mark(number, _GONE)
        if state == _IN_FLIGHT:
            each.in_flight -= 1
            if (candidate := each.known.get(number ^ each.goal)) is not None:
                self._judge(candidate, 1)
        for other in self.paths:
            self._forget(other, number ^ other.goal)

    def is_done(self) -> bool:
        """True when every path has ended: its k nearest known have answered, or enough of them agree on the records,
        or nobody is left to ask. Late ones are waited for while fewer have answered than are late."""
        for path in self.paths:
            if not path.is_over:
                self._survey(path)
        return all(path.is_over for path in self.paths)

    def get_requests(self) -> int:
        return sum(path.requests for path in self.paths)

    def get_closest(self, n: int) -> list[Contact]:
        """The ``n`` contacts nearest to the target that answered, nearest first."""
        goal = self.paths[0].goal
        return [self._answered[distance ^ goal] for distance in sorted(number ^ goal for number in self._answered)[:n]]

    def get_lacking(self, records: int) -> list[Contact]:
        """For each path, the nearest that answered if it's one of those that should have given as many ``records``
        and gave fewer."""
        lacking: list[Contact] = []
        for path in self.paths:
            for distance in path.order[: path.k]:
                number = distance ^ path.goal
                if number in self._answered and path.gave.get(distance, 0) < records:
                    if path.known[distance].contact not in lacking:
                        lacking.append(path.known[distance].contact)
                    break
        return lacking

    # -- parts --------------------------------------------------------------------------------------------------

    def _mark(self, number: int, state: int) -> None:
        """Notes it on all paths."""
        self._state[number] = state
        for path in self.paths:
            candidate = path.known.get(number ^ path.goal)
            if candidate is not None:
                candidate.state = state
                path.waiting = None

    def _take(self, room: list[int]) -> list[tuple[int, Contact]]:
        """``room``: for each path, how many may be in flight."""
        taken: list[tuple[int, Contact]] = []
        for i, path in enumerate(self.paths):
            if path.is_over:
                continue
            waiting = self._survey(path)
            while waiting and path.in_flight < room[i] and path.requests < REQUESTS:
                candidate = waiting.pop(self._choose(path, len(waiting)))
                self._mark(candidate.number, _IN_FLIGHT)
                path.in_flight += 1
                path.requests += 1
                taken.append((i, candidate.contact))
        return taken

    def _least(self) -> Iterable[tuple[_Path, int]]:
        return zip(self.paths, AGREEING, strict=True)

    def _is_disputed(self) -> bool:
        """Whether somebody gave other records than somebody else, or too few on some path ever will give any."""
        count = len(self.records)
        if any(path.is_over and len(path.gave) < least for path, least in self._least()):
            return True
        return any(gave != count for path in self.paths for gave in path.gave.values())

    def _is_agreed(self) -> bool:
        return all(len(path.gave) >= least for path, least in self._least()) and not self._is_disputed()

    def _add(self, path: _Path, contacts: Iterable[Contact], depth: int, source: int) -> None:
        states, known, goal, order, ranked = self._state, path.known, path.goal, path.order, path.ranked
        path.waiting = None
        offered = list(contacts)
        numbers = map(get_node_number, [contact.peer_id for contact in offered])
        for contact, number in zip(offered, numbers, strict=True):
            distance = number ^ goal
            if distance in known:
                candidate = known[distance]
                if candidate.source != source:
                    candidate.source = 0
                continue
            state = states.get(number)
            if number == self._own or not contact.addrs or state == _GONE:
                continue
            known[distance] = candidate = _Candidate(contact, number, depth, source, state)
            at = bisect_left(order, distance)
            order.insert(at, distance)
            ranked.insert(at, candidate)
        if len(order) > CANDIDATES:  # the nearest are what the lookup is about
            for distance in order[CANDIDATES:]:
                del known[distance]
            del order[CANDIDATES:], ranked[CANDIDATES:]

    def _survey(self, path: _Path) -> list[_Candidate]:
        """Those to ask, nearest first, among the k nearest that aren't late. Notes if it is over."""
        if path.waiting is not None:
            return path.waiting
        waiting: list[_Candidate] = []
        answered = in_flight = late = holders = 0
        left = path.k
        for candidate in path.ranked:
            state = candidate.state
            if state is None:
                waiting.append(candidate)
            elif state == _ANSWERED:
                answered += 1
                holders += candidate.gave
            elif state == _LATE:
                late += 1
                continue
            else:
                in_flight += 1
            left -= 1
            if not left:
                break
        if path.requests >= REQUESTS:
            waiting = []
        path.is_over = (holders >= path.holders and path.quiet >= QUIET) or (
            not waiting and not in_flight and (answered >= path.k or not late or answered > late)
        )
        path.waiting = [] if path.is_over else waiting
        return path.waiting

    def _choose(self, path: _Path, waiting: int) -> int:
        # One goes to the nearest, which leads on; the others to any of the near ones: liars can be the nearest, and not
        # most of those.
        if self.want == "records" and (path.is_near or path.in_flight):
            return int(self._rng.random() * waiting)
        return 0

    def _judge(self, candidate: _Candidate, by: int) -> None:
        """A contact turned out to be dead (1) or alive (-1). Whoever names mostly dead ones is not believed."""
        source = candidate.source
        if not source:
            return
        self._balance[source] = balance = self._balance.get(source, 0) + by
        if balance < FALSE_WORDS:
            return
        for path in self.paths:
            named = [distance for distance, c in path.known.items() if c.source == source and c.state is None]
            for distance in named:
                self._forget(path, distance)

    def _forget(self, path: _Path, distance: int) -> None:
        if path.known.pop(distance, None) is not None:
            at = bisect_left(path.order, distance)
            del path.order[at], path.ranked[at]
            path.waiting = None
