"""Records move to newcomers: a peer that came near to a key's place should keep what is kept there."""

from __future__ import annotations

from daaswarm.core.places import get_places, get_replicas
from daaswarm.core.publishing import Batch, batch_for
from daaswarm.core.record_store import RecordStore
from daaswarm.core.routing_table import RoutingTable, get_node_number
from daaswarm.messages import Contact, Signed

REPLICATE_S = 60.0  # between walks over the records kept; republishing would reach a newcomer after five minutes
REPLICATORS = 2  # of those who keep a record tell the newcomers: the nearest two, of which one may be gone
KEYS = 1_024  # looked at in one walk; the next goes on where it ended
NEWCOMERS = 32  # told in one walk


def get_replicas_due(
    table: RoutingTable, store: RecordStore, keys: list[bytes], after: float, now: float
) -> list[Batch]:
    """What to tell peers that entered the table later than ``after``: the records under ``keys`` that are kept here,
    to whom they should be kept by, if this node is among the nearest of those who kept them before."""
    fresh = {entry.contact.peer_id for entry in table.get_entries() if entry.since > after}
    if not fresh:
        return []
    own = get_node_number(table.own)
    due: dict[str, tuple[Contact, list[Signed]]] = {}
    for key in keys:
        told: set[str] = set()
        for i, place in enumerate(get_places(key)):
            goal = int.from_bytes(place, "big")
            nearest = table.closest(place, get_replicas(table.k, i))
            nearer = [c for c in nearest if c.peer_id not in fresh and get_node_number(c.peer_id) ^ goal < own ^ goal]
            if len(nearer) >= REPLICATORS:
                continue
            for contact in nearest:
                peer = contact.peer_id
                if peer in fresh and peer not in told and (peer in due or len(due) < NEWCOMERS):
                    told.add(peer)
                    records = [signed for pointer, signed in store.get(key, now) if pointer.peer_id != peer]
                    due.setdefault(peer, (contact, []))[1].extend(records)
    return [batch for contact, records in due.values() for batch in batch_for(contact, records)]
