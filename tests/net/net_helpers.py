"""Identities and a small handler for the network tests."""

from __future__ import annotations

import hashlib

import trio

from daaswarm.errors import Busy, ExpertError
from daaswarm.messages import ExpertCall, ExpertReply, FindNode, Found, GetAdverts, Request
from daaswarm.net.handshake import Identity

SWARM = hashlib.sha256(b"test").digest()


def get_identity(number: int, swarm: bytes = SWARM) -> Identity:
    return Identity.from_seed(bytes([number]) * 32, swarm, "test")


async def serve(peer_id, contact, message: Request, body, deadline_s):
    if isinstance(message, FindNode):
        await trio.sleep_forever()
    if isinstance(message, GetAdverts):
        raise Busy("full", retry_after_s=0.5)
    if isinstance(message, ExpertCall):
        if message.layer == 9:
            raise ExpertError("layer 9 is not here", hint="ask another")
        return ExpertReply(rows=message.rows, hidden=message.hidden), [body]
    return Found(), []


def get_call(layer: int = 0) -> ExpertCall:
    return ExpertCall(model_root="0" * 64, layer=layer, experts=[1], dtype="f32", rows=1, hidden=8)
