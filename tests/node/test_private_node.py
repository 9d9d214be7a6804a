"""A node of a private swarm: its doors, its table, and an allow-list that changes while it runs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import trio

from daaswarm.config import Config, NetworkConfig
from daaswarm.core.swarm_keys import SwarmKey
from daaswarm.errors import ConfigError, NotAllowed
from daaswarm.node.life import describe_binding, open_asker, open_node
from daaswarm.store.data_dir import DataDir
from daaswarm.store.swarm_keys import store_swarm_key

KEY = SwarmKey("home", bytes(range(32)))
CONFIG = Config(network=NetworkConfig(swarm=KEY.swarm_id))


def make_home(path: Path) -> DataDir:
    home = DataDir(path)
    store_swarm_key(home, KEY)
    return home


async def test_the_door_of_libp2p_is_shut(tmp_path: Path) -> None:
    async with open_node(make_home(tmp_path), CONFIG, listen=True, libp2p=True, is_owner=True) as node:
        assert node.network.splicer.settled.is_set()
        await trio.lowlevel.checkpoint()
        assert node.network.splicer.targets == {}
        assert not node.discovery.kademlia.table._limit_subnets
        assert (await node.get_status())["swarm"] == {"id": KEY.swarm_id, "private": True}


async def test_the_allow_list_of_a_running_node(tmp_path: Path) -> None:
    async with (
        open_node(make_home(tmp_path / "a"), CONFIG, listen=True, libp2p=False) as a,
        open_node(make_home(tmp_path / "b"), CONFIG, listen=True, libp2p=False) as b,
    ):
        await b.bootstrap(a.addrs)
        assert a.network.is_connected(b.peer_id)
        assert await a.control("allow", {"peers": [b.peer_id]}, _emit) == {"closed": []}
        assert await a.control("allow", {"peers": [a.peer_id]}, _emit) == {"closed": [b.peer_id]}
        with trio.fail_after(5):
            while b.network.is_connected(a.peer_id):  # noqa: ASYNC110 - nobody tells when a peer has hung up
                await trio.sleep(0.01)
        assert a.network.contact is not None and b.network.contact is not None
        with pytest.raises(NotAllowed):
            await b.network.connect(a.network.contact)
        with pytest.raises(NotAllowed):
            await a.network.connect(b.network.contact)
        with pytest.raises(ConfigError):
            await a.control("allow", {"peers": ["x"]}, _emit)
        assert await a.control("allow", {"peers": []}, _emit) == {"closed": []}
        await b.network.connect(a.network.contact)


async def test_hosts_of_one_answer_are_on_no_list(tmp_path: Path) -> None:
    network = msgspec.structs.replace(CONFIG.network, allow=["12D3KooWH3uVF6wv47WnArKHk5p6cvgCJEb74UTmxztmQDc298L3"])
    config = Config(network=network)
    async with open_asker(make_home(tmp_path), config, embedded=True, serve=False) as node:
        assert node.network.identity.allowed.peers == [] and node.network.identity.swarm_key == KEY


async def test_what_to_do_next_names_the_swarm(tmp_path: Path) -> None:
    async with open_node(make_home(tmp_path / "a"), CONFIG, listen=True, libp2p=False) as node:
        line = describe_binding(CONFIG, node.network)[-1]
        assert f" --swarm-id {KEY.swarm_id} --bootstrap {node.addrs[0]} " in line and "swarm add" in line
    for swarm, option in (("work", " --swarm-id work "), ("main", " MODEL --bootstrap ")):
        config = Config(network=NetworkConfig(swarm=swarm))
        async with open_node(DataDir(tmp_path / swarm), config, listen=True, libp2p=False) as node:
            line = describe_binding(config, node.network)[-1]
            assert option in line and "swarm add" not in line


async def _emit(event: dict[str, object]) -> None:
    """Nothing is told."""
