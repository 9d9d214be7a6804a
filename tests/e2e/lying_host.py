"""``daaswarm`` whose experts lie: ``LIES`` says when. Run as a script, with daaswarm's arguments."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from daaswarm.__main__ import main
from daaswarm.models.experts import LayerExperts

WHEN = os.environ["LIES"]  # always, or unopened: a call that it opens is computed as it should be


def falsify(sums: Tensor) -> Tensor:
    sums = sums.clone()
    sums[:, 7] += 0.5 * sums.norm(dim=1)
    return sums


def make_liar(name: str, is_opened: bool) -> None:
    honest = getattr(LayerExperts, name)

    def compute(self: LayerExperts, *arguments: Any) -> Any:
        answer = honest(self, *arguments)
        if is_opened:
            sums, opened = answer
            return (falsify(sums) if WHEN == "always" else sums), opened
        return falsify(answer)

    setattr(LayerExperts, name, compute)


if __name__ == "__main__":
    for name in ("compute_pairs", "compute_slices"):
        make_liar(name, is_opened=False)
    for name in ("open_pairs", "open_slices"):
        make_liar(name, is_opened=True)
    main()
