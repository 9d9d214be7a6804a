"""A node that leaves."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio

from daaswarm.errors import Busy
from daaswarm.experts.service import HostedModel
from daaswarm.messages import ExpertCall
from tests.experts.test_service import ScaledLayer
from tests.node.node_helpers import node


async def test_calls_in_flight_are_answered_when_the_node_leaves(tmp_path: Path) -> None:
    layer = ScaledLayer([0])
    layer.gate = threading.Event()
    answers: list[object] = []
    async with node(tmp_path / "b") as b:
        async with trio.open_nursery() as nursery, node(tmp_path / "a", bootstrap=b) as a:
            root = "ab" * 32
            service = a.hosting.get_service()
            service.add(HostedModel(root, "slow", "dense", 3, "f32", {0: layer}))  # type: ignore[arg-type]
            a.hosting.advertise(root)  # type: ignore[arg-type]
            contact = a.network.contact
            assert contact is not None
            call = ExpertCall(model_root=root, layer=0, experts=[0], dtype="f32", rows=64, hidden=3)
            body = bytes(4 * 64 * 3)

            async def ask() -> None:
                answers.append(await b.network.call(contact, call, [body], deadline_s=20.0))

            nursery.start_soon(ask)
            while not layer.threads:  # noqa: ASYNC110 - a thread sets it
                await trio.sleep(0.01)

            async def look() -> None:
                while a.neighbour.pause is None:  # noqa: ASYNC110 - until it leaves
                    await trio.sleep(0.01)
                with pytest.raises(Busy, match="leaving"):
                    await b.network.call(contact, call, [body], deadline_s=20.0)
                while list(a.discovery.membership.own):  # noqa: ASYNC110 - withdrawn while the call still runs
                    await trio.sleep(0.01)
                assert not answers
                assert layer.gate is not None
                layer.gate.set()

            nursery.start_soon(look)
        assert len(answers) == 1
