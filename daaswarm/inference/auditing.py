"""Checks of what hosts answered, from the model's own thread: by sketches, by a second host, or by computing it here.

An answer is used only when it passed, or wasn't drawn. Which calls of a trusted host are drawn is decided by a private
coin after its answer is here; a host on probation, and every host with ``every``, opens its calls at once instead.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

import msgspec
import torch
from torch import Tensor

from daaswarm.core.reputation import EXACT, Noted, Reputation, Standing
from daaswarm.core.verify import Verify
from daaswarm.errors import ModelError
from daaswarm.inference.shares import Share
from daaswarm.inference.use import AuditUse
from daaswarm.messages import ExpertCall
from daaswarm.models.auditing import (
    ABSTAIN,
    FAIL,
    PASS,
    TOLERANCES,
    Opened,
    check_again,
    check_ffn,
    check_sum,
    get_spread,
    judge,
)
from daaswarm.models.opened import OpenedReply
from daaswarm.models.secrets import Secrets
from daaswarm.types import ModelRoot, PeerId

Recompute = Callable[[ExpertCall, Share], Tensor]
"""(rows, hidden) f32, computed here from the checkpoint; blocks. Raises ModelError where the weights aren't here."""

logger = logging.getLogger(__name__)


class Ledger:
    """The reputations of a node, for its models' threads.

    Args:
        reputation: is the ledger's from now on.

    Attributes:
        exempt: who isn't checked: this node, and hosts that it started itself.
    """

    def __init__(self, reputation: Reputation) -> None:
        self.exempt: set[PeerId] = set()
        self._reputation = reputation
        self._lock = threading.Lock()

    def get_rate(self, peer: PeerId, model: ModelRoot, floor: float) -> float:
        with self._lock:
            return self._reputation.get_rate(peer, model, floor, time.time())

    def note(self, peer: PeerId, model: ModelRoot, *, right: bool, false_alarm: float = EXACT, why: str = "") -> Noted:
        with self._lock:
            noted = self._reputation.note(peer, model, time.time(), right=right, false_alarm=false_alarm, why=why)
        if noted.is_ban:
            logger.warning("%s is asked no more: %s", peer, why)
        return noted

    def get_banned(self) -> set[PeerId]:
        with self._lock:
            return set(self._reputation.get_banned(time.time()))

    def get_standings(self) -> list[Standing]:
        with self._lock:
            return [msgspec.structs.replace(each) for each in self._reputation.get_standings(time.time())]

    def forgive(self, peer: PeerId) -> bool:
        with self._lock:
            return self._reputation.forgive(peer)

    def take_changed(self) -> list[Standing]:
        """What is to be written down."""
        with self._lock:
            return [msgspec.structs.replace(each) for each in self._reputation.take_changed()]

    def give_back(self, standings: list[Standing]) -> None:
        """These could not be written down."""
        with self._lock:
            self._reputation.mark_changed((each.peer_id, each.model_root) for each in standings)


class Auditor:
    """Decides which calls of one model are checked, and judges what was opened.

    Args:
        secrets: of this model and dtype, if they were made.
        recompute: computes a call here.
    """

    def __init__(
        self, verify: Verify, ledger: Ledger, root: ModelRoot, secrets: Secrets | None, recompute: Recompute | None
    ) -> None:
        self.verify = verify
        self.use = AuditUse()
        self._ledger = ledger
        self._root = root
        self._secrets = secrets if verify.kind in ("sample", "every") else None
        self._recompute = recompute
        self._coin = random.SystemRandom()

    def take_use(self) -> AuditUse:
        use, self.use = self.use, AuditUse()
        return use

    def is_checked(self, peer: PeerId) -> bool:
        return self.verify.kind != "off" and peer not in self._ledger.exempt

    def get_banned(self) -> set[PeerId]:
        return self._ledger.get_banned()

    def fits(self, layer: int) -> bool:
        """Whether the layer can be checked by sketches."""
        return self._secrets is not None and self._secrets.fits(layer)

    def opens(self, peer: PeerId, layer: int) -> bool:
        """Whether a call is opened at once."""
        return self.is_checked(peer) and self.fits(layer) and self._get_rate(peer) >= 1.0

    def draws(self, peer: PeerId) -> bool:
        """Toss the coin for a call that was answered."""
        return self.is_checked(peer) and self._coin.random() < self._get_rate(peer)

    def _get_rate(self, peer: PeerId) -> float:
        return 1.0 if self.verify.kind == "every" else self._ledger.get_rate(peer, self._root, self.verify.share)

    def note(self, peer: PeerId, *, right: bool, false_alarm: float = EXACT, why: str = "") -> Noted:
        if not right:
            self.use.wrong[peer] = self.use.wrong.get(peer, 0) + 1
        return self._ledger.note(peer, self._root, right=right, false_alarm=false_alarm, why=why)

    def judge(self, call: ExpertCall, share: Share, reply: OpenedReply, sums: Tensor | None = None) -> int:
        """The verdict on a call that was opened.

        Args:
            sums: what was delivered, if the call was opened afterwards: then it was computed again.
        """
        verdicts, reach = (
            self._judge_pairs(call, share, reply) if call.pairs else self._judge_slices(call, share, reply)
        )
        if sums is not None:
            verdicts = judge(torch.stack([verdicts, check_again(sums, reply.sums, reach, share.rows.dtype)]))
        if bool((verdicts == FAIL).any()):
            return FAIL
        return PASS if bool((verdicts == PASS).all()) else ABSTAIN

    def _judge_slices(self, call: ExpertCall, share: Share, reply: OpenedReply) -> tuple[Tensor, Tensor]:
        assert self._secrets is not None
        secrets = self._secrets.join(call.layer, tuple(sorted(call.experts)))
        gate, up, hidden = reply.opened
        if gate.shape[1] != secrets.down.inputs:
            return torch.full((call.rows,), FAIL), torch.zeros(call.rows)
        verdicts = check_ffn(secrets, share.rows, Opened(gate, up, hidden, reply.sums))
        return verdicts, get_spread(secrets, hidden)

    def _judge_pairs(self, call: ExpertCall, share: Share, reply: OpenedReply) -> tuple[Tensor, Tensor]:
        assert self._secrets is not None and share.pair_rows is not None
        assert share.pair_experts is not None and share.pair_weights is not None
        per_row = torch.full((call.rows,), PASS)
        wide = share.rows.shape, torch.float64
        parts, sizes = torch.zeros(wide[0], dtype=wide[1]), torch.zeros(wide[0], dtype=wide[1])
        reach = torch.zeros(call.rows, dtype=torch.float64)
        weights, at = share.pair_weights.double(), share.pair_rows.long()
        for expert in share.pair_experts.unique().tolist():
            mine = (share.pair_experts == expert).nonzero()[:, 0]
            secrets = self._secrets.get(call.layer, expert)
            opened = Opened(*(each[mine] for each in reply.opened))
            if opened.gate.shape[1] != secrets.down.inputs:
                return torch.full((call.rows,), FAIL), reach
            found = check_ffn(secrets, share.rows[at[mine]], opened)
            # A row's verdict is the worst of its pairs', and a failure is worse than an abstention.
            for verdict in (ABSTAIN, FAIL):
                per_row[at[mine[found == verdict]]] = verdict
            reach.index_add_(0, at[mine], (weights[mine] * get_spread(secrets, opened.hidden)).square())
        out = weights[:, None] * reply.opened[3].double()
        parts.index_add_(0, at, out)
        sizes.index_add_(0, at, out.abs())
        terms = int(torch.bincount(at, minlength=1).max())
        return judge(torch.stack([per_row, check_sum(reply.sums, parts, sizes, terms)])), reach.sqrt()

    def recompute(self, call: ExpertCall, share: Share) -> Tensor | None:
        """``None``: the weights aren't here."""
        if self._recompute is None:
            return None
        try:
            sums = self._recompute(call, share)
        except ModelError as error:
            logger.info("layer %d can't be computed here: %s", call.layer, error)
            return None
        self.use.recomputed += 1
        return sums


def is_near(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two hosts' sums differ by rounding only, each row relative to its length."""
    away = (one - other).norm(dim=1)
    near = away <= TOLERANCES[dtype] * torch.maximum(one.norm(dim=1), other.norm(dim=1)) + torch.finfo(dtype).tiny
    return bool((near | (one == other).all(1)).all())
