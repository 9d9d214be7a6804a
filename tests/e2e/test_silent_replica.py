"""A replica that falls silent (SIGSTOP) in real processes: nobody notices, and the sums stay the same to the bit."""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from daaswarm.bench.expert_calls import ROOT
from daaswarm.bench.moe import NAME, open_hosts
from daaswarm.config import Config
from daaswarm.core.hedging import BURST, SHARE
from daaswarm.inference.plan import HostPlan
from daaswarm.inference.requester import SharedRouter
from daaswarm.inference.swarm_experts import SwarmExperts
from daaswarm.net.network import connect_all
from daaswarm.node.life import open_node
from daaswarm.store.data_dir import DataDir
from daaswarm.types import ExpertId, PeerId

pytestmark = pytest.mark.e2e

DIM, EXPERTS, HOSTS = 64, 4, 2
CALLS = 80


@pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP")
async def test_a_stopped_host_is_outrun_and_left_out(tmp_path: Path) -> None:
    async def emit(event: dict[str, Any]) -> None:
        pass

    every = list(range(EXPERTS))
    async with open_hosts([every] * HOSTS, DIM, tmp_path, emit) as running:
        contacts = {PeerId(contact.peer_id): contact for _, contact in running}
        holders = {ExpertId(0, expert): list(contacts) for expert in every}
        plan = HostPlan(ROOT, "f32", {0: EXPERTS}, holders, contacts, kind="moe")
        async with open_node(DataDir(tmp_path / "own"), Config(), listen=False, libp2p=False) as node:
            await connect_all(node.network, contacts.values())
            router = SharedRouter(random.Random(0))
            experts = SwarmExperts(
                plan, node.network, router, refresh=lambda: plan, call_timeout_s=30.0, model_name=NAME
            )

            def ask_all() -> list[torch.Tensor]:
                """One expert a request, so that one host has all of it."""
                generator = torch.Generator().manual_seed(0)
                return [
                    experts(
                        0, torch.randn(1, DIM, generator=generator), torch.tensor([[n % EXPERTS]]), torch.ones(1, 1)
                    )
                    for n in range(CALLS)
                ]

            with trio.fail_after(60):
                healthy = await trio.to_thread.run_sync(ask_all)
                stopped, contact = running[0]
                stopped.process.send_signal(signal.SIGSTOP)
                before = experts.hosts[PeerId(contact.peer_id)].calls if contact.peer_id in experts.hosts else 0
                again = await trio.to_thread.run_sync(ask_all)
            after = experts.hosts[PeerId(contact.peer_id)].calls if contact.peer_id in experts.hosts else 0
            assert all(map(torch.equal, healthy, again))
            assert after == before
            assert router.hedging.hedges <= BURST + SHARE * router.hedging.calls
            router.hedging.validate()
