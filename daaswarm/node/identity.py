"""Who a node is, and to whom it speaks."""

from __future__ import annotations

from daaswarm import __version__
from daaswarm.config import Config
from daaswarm.core.allow_list import AllowList
from daaswarm.core.signing import get_swarm_id
from daaswarm.net.handshake import Identity
from daaswarm.store.data_dir import DataDir
from daaswarm.store.swarm_keys import load_swarm_key


def load_identity(data_dir: DataDir, config: Config) -> Identity:
    """The node's key, swarm and allow-list.

    Raises:
        ConfigError: a bad key, a private swarm without its key, or a bad PeerId in ``network.allow``.
    """
    allowed = AllowList(config.network.allow)
    swarm_key = load_swarm_key(data_dir, config)
    swarm = get_swarm_id(config.network.swarm) if swarm_key is None else swarm_key.realm
    return Identity(data_dir.load_key(), swarm, f"daaswarm/{__version__}", swarm_key, allowed)
