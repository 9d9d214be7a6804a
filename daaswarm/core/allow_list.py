"""The peers that a node meets; all, as long as none is named."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from daaswarm.core.signing import get_public_key
from daaswarm.errors import ConfigError, NotAllowed
from daaswarm.types import PeerId

MAX_ALLOWED = 4_096  # a settings file of 1 MiB holds four times as many


class AllowList:
    """Args: ``peers``: their PeerIds; see :meth:`replace`."""

    def __init__(self, peers: Iterable[str] = ()) -> None:
        self._peers: frozenset[str] = frozenset()
        self.replace(peers)

    @property
    def peers(self) -> list[PeerId]:
        return [PeerId(peer) for peer in sorted(self._peers)]

    def admits(self, peer: str) -> bool:
        return not self._peers or peer in self._peers

    def check(self, peer: str) -> None:
        """Raises:
        NotAllowed: the list leaves the peer out.
        """
        if not self.admits(peer):
            hint = f"if it belongs here: daaswarm swarm allow {peer}, on the node that refused"
            raise NotAllowed(f"{peer} is not on this node's allow-list", hint=hint)

    def replace(self, peers: Iterable[str]) -> None:
        """Raises:
        ConfigError: too many, or one isn't a PeerId; then nothing changes.
        """
        found = frozenset(peers)
        check_allowed(found)
        self._peers = found


def check_allowed(peers: Collection[str]) -> None:
    """Raises:
    ConfigError: too many, or one isn't a PeerId.
    """
    if len(peers) > MAX_ALLOWED:
        raise ConfigError(f"network.allow: at most {MAX_ALLOWED} peers", hint="a key keeps strangers out by itself")
    for peer in peers:
        try:
            get_public_key(peer)
        except ConfigError as error:
            raise ConfigError(f"network.allow: {error.message}", hint=error.hint) from error
