"""From a checkpoint on disk to experts that can be served."""

from __future__ import annotations

from daaswarm.experts.service import HostedModel
from daaswarm.models.checkpoint import Checkpoint
from daaswarm.models.experts import read_experts
from daaswarm.models.manifest import Progress
from daaswarm.models.sources import LocalModel
from daaswarm.types import Dtype


def load_hosted(
    model: LocalModel, wanted: dict[int, list[int]], dtype: Dtype, progress: Progress
) -> tuple[HostedModel, int]:
    """Read the wanted experts, each part checked against the manifest. Blocks.

    Args:
        wanted: ``{layer: [experts or slices]}``.

    Returns:
        What can be served, and how many bytes of the checkpoint were read.

    Raises:
        ModelError: a tensor was altered or is missing.
    """
    with Checkpoint(model.folder) as checkpoint:
        layers = read_experts(checkpoint, model, wanted, dtype, progress)
        hosted = HostedModel(model.root, model.name, model.kind, model.hidden, dtype, dict(layers))
        return hosted, checkpoint.bytes_read
