"""One iterative lookup: ask the nearest contacts known, learn nearer ones, stop when the k nearest have answered.

Maymounkov and Mazieres, "Kademlia" (2002), section 2.3. The ``kademlia`` package supplies nodes and the heap by
distance; it is untyped, so the part used here is declared below.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Literal, Protocol, cast

from kademlia import node as _kademlia_node  # pyright: ignore[reportMissingTypeStubs]

from daaswarm.core.routing_table import get_node_id
from daaswarm.messages import Contact, Pointer, Signed
from daaswarm.types import PeerId

ALPHA = 3  # requests in flight per lookup; the paper's value
CANDIDATES = 256  # contacts a lookup remembers; hostile answers name 20 made-up ones each
REQUESTS = 128  # a lookup gives up after; an honest one among a million nodes needs about 40
LOOKUP_RECORDS = 256  # distinct records a lookup collects: four full keys' worth

Want = Literal["nodes", "records"]


class _Node(Protocol):
    id: bytes


class _NodeHeap(Protocol):
    heap: list[tuple[int, _Node]]

    def push(self, nodes: list[_Node]) -> None: ...
    def remove(self, peers: list[bytes]) -> None: ...
    def mark_contacted(self, node: _Node) -> None: ...
    def get_uncontacted(self) -> list[_Node]: ...
    def __iter__(self) -> Iterator[_Node]: ...


class Lookup:
    """The state of one lookup. It sends nothing: :meth:`take_next` names whom to ask."""

    def __init__(self, target: bytes, want: Want, own: PeerId, k: int) -> None:
        self.target = target
        self.want = want
        self.records: dict[PeerId, tuple[Pointer, Signed]] = {}  # by publisher, highest sequence number
        self._own = own
        self._contacts: dict[bytes, Contact] = {}  # by node id, the heap's members
        self._answered: set[bytes] = set()
        self._gone: set[bytes] = set()
        self._in_flight: set[bytes] = set()
        self._requests = 0
        self._heap = cast("_NodeHeap", _kademlia_node.NodeHeap(_make_node(target), k))

    def add(self, contacts: Iterable[Contact]) -> None:
        """Candidates to ask. Ourselves, the undialable and those that failed in this lookup are passed over."""
        for contact in contacts:
            node_id = get_node_id(contact.peer_id)
            if contact.peer_id == self._own or not contact.addrs or node_id in self._gone or node_id in self._contacts:
                continue
            self._contacts[node_id] = contact
            self._heap.push([_make_node(node_id)])
        if len(self._heap.heap) > CANDIDATES:
            # A sorted list is a heap. The nearest are what the lookup is about.
            self._heap.heap = heapq.nsmallest(CANDIDATES, self._heap.heap)
            kept = {node.id for _, node in self._heap.heap} | self._in_flight
            self._contacts = {node_id: contact for node_id, contact in self._contacts.items() if node_id in kept}

    def add_record(self, pointer: Pointer, signed: Signed) -> None:
        """A checked record; a newer one of the same publisher replaces the older."""
        peer = PeerId(pointer.peer_id)
        known = self.records.get(peer)
        if known is None and len(self.records) >= LOOKUP_RECORDS:
            return
        if known is None or pointer.seq > known[0].seq:
            self.records[peer] = (pointer, signed)

    def take_next(self) -> list[Contact]:
        """Whom to ask now: the nearest not yet asked, as many as :data:`ALPHA` allows."""
        taken: list[Contact] = []
        for node in self._heap.get_uncontacted():
            if len(self._in_flight) >= ALPHA or self._requests >= REQUESTS:
                break
            self._heap.mark_contacted(node)
            self._in_flight.add(node.id)
            self._requests += 1
            taken.append(self._contacts[node.id])
        return taken

    def note_answered(self, peer: PeerId) -> None:
        node_id = get_node_id(peer)
        self._in_flight.discard(node_id)
        self._answered.add(node_id)

    def note_failed(self, peer: PeerId) -> None:
        node_id = get_node_id(peer)
        self._in_flight.discard(node_id)
        self._gone.add(node_id)
        self._heap.remove([node_id])

    def is_done(self) -> bool:
        """True when the k nearest known have all answered, or nobody is left to ask."""
        if all(node.id in self._answered for node in self._heap):
            return True
        return not self._in_flight and (self._requests >= REQUESTS or not self._heap.get_uncontacted())

    def get_closest(self) -> list[Contact]:
        """The nearest contacts that answered, nearest first, at most k."""
        return [self._contacts[node.id] for node in self._heap if node.id in self._answered]


def _make_node(node_id: bytes) -> _Node:
    return cast("_Node", _kademlia_node.Node(node_id))
