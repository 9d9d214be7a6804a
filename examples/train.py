"""Trains the parts around one layer's experts, which other peers hold: python examples/train.py ADDRESS MODEL

ADDRESS is one that a daaswarm host printed; MODEL is what that host serves, here too by name or folder.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from daaswarm.training.client import TrainingSwarm, open_swarm
from daaswarm.training.remote_expert import RemoteExpert

STEPS = 20
ROWS = 16
CHOSEN = 2  # experts a row


class Block(nn.Module):
    """A layer here, experts elsewhere, and a layer here. With a mixture of experts, the router is here too."""

    def __init__(self, swarm: TrainingSwarm, name: str) -> None:
        super().__init__()
        model = swarm.find_model(name)
        layer = min(model.layers)
        self.experts = RemoteExpert(swarm, model, layer)
        self.before = nn.Linear(8, model.hidden)
        self.router = nn.Linear(model.hidden, model.layers[layer]) if model.kind == "moe" else None
        self.after = nn.Linear(model.hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.before(x)
        if self.router is None:
            return self.after(self.experts(rows))
        weights, index = self.router(rows).softmax(-1).topk(CHOSEN)
        return self.after(self.experts(rows, index, weights))


def train(address: str, name: str) -> list[float]:
    """The loss of each step."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, 8)
    wanted = x.sum(1, keepdim=True)
    losses: list[float] = []
    with open_swarm([address]) as swarm:
        block = Block(swarm, name)
        optimizer = torch.optim.Adam(block.parameters(), lr=0.01)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(block(x), wanted)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    for step, loss in enumerate(train(*sys.argv[1:]), start=1):
        print(f"step {step}: loss {loss:.4f}")
