"""What two members of a model tell each other when they compare what they know, and in how many bytes."""

from __future__ import annotations

from daaswarm.core.adverts import AdvertBook
from daaswarm.core.health import HealthTable, State
from daaswarm.core.marks import MARK_MAX, get_mark, pack_marks, pack_versions, unpack_versions
from daaswarm.core.rng import Rng
from daaswarm.limits import GOSSIP_BYTES
from daaswarm.messages import PullAdverts, Pulled, Signed
from daaswarm.types import ModelRoot, PeerId

PUSHED = 32  # adverts in one push
PUSH_BYTES = 64 * 1024  # of one push
PULL_BYTES = 128 * 1024  # of one answer to a pull
VERSIONS = 1_000  # told in one pull; of models with more hosts, another part each time
PULLED = 256  # adverts in one answer to a pull


def make_pull(book: AdvertBook, root: ModelRoot, rng: Rng, now: float) -> PullAdverts:
    """Says what is known of a model; of very many hosts a part, another one each time."""
    adverts = [known.advert for known in book.get_all(root)]
    versions = [(get_mark(advert.peer_id), advert.seq) for advert in adverts if advert.expires_at > now]
    low, high = 0, MARK_MAX
    if len(versions) > VERSIONS:  # a part of the marks, from a random one on
        versions.sort()
        first = int(rng.random() * len(versions))
        part = versions[first : first + VERSIONS]
        low = part[0][0] if first else 0
        high = part[-1][0] if first + VERSIONS < len(versions) else MARK_MAX
        versions = part
    return PullAdverts(model_root=root, have=pack_versions(versions), low=low, high=high, max_bytes=PULL_BYTES)


def compare(
    book: AdvertBook, health: HealthTable, root: ModelRoot, message: PullAdverts, now: float
) -> tuple[Pulled, int]:
    """What the asker lacks, what it has that is newer, and the bytes of the former."""
    theirs = dict(unpack_versions(message.have))
    budget = min(message.max_bytes, PULL_BYTES)
    adverts: list[Signed] = []
    wanted: list[int] = []
    down: list[tuple[int, int]] = []
    size, more = 0, False
    for known in book.get_all(root):
        advert = known.advert
        mark = get_mark(advert.peer_id)
        if not message.low <= mark <= message.high or advert.expires_at <= now:
            continue
        seq = theirs.pop(mark, -1)
        if health.get_state(PeerId(advert.peer_id)) is State.DOWN:
            if len(down) < VERSIONS:
                down.append((mark, advert.seq))
            if seq > advert.seq:
                wanted.append(mark)
        elif seq < advert.seq:
            bytes_more = len(known.signed.payload) + 128
            if (size + bytes_more > budget and adverts) or len(adverts) >= PULLED:
                more = True
                continue
            adverts.append(known.signed)
            size += bytes_more
        elif seq > advert.seq:
            wanted.append(mark)
    wanted += theirs  # of these this node knows nothing
    return Pulled(adverts=adverts, wanted=pack_marks(wanted[:VERSIONS]), down=pack_versions(down), more=more), size


def batch(adverts: list[Signed]) -> list[list[Signed]]:
    """In messages within the limits."""
    batches: list[list[Signed]] = []
    size = 0
    for signed in adverts:
        if not batches or len(batches[-1]) >= PUSHED or size + len(signed.payload) > PUSH_BYTES - GOSSIP_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(signed)
        size += len(signed.payload)
    return batches
