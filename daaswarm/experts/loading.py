"""From a checkpoint on disk to experts that can be served."""

from __future__ import annotations

from daaswarm.experts.service import HostedModel
from daaswarm.models.checkpoint import Checkpoint
from daaswarm.models.devices import choose_device, explaining_full
from daaswarm.models.experts import read_experts
from daaswarm.models.manifest import Progress
from daaswarm.models.sources import LocalModel
from daaswarm.types import Dtype

DEVICE_KEY = "host.device"


def load_hosted(
    model: LocalModel, wanted: dict[int, list[int]], dtype: Dtype, progress: Progress, device: str = "cpu"
) -> tuple[HostedModel, int]:
    """Read the wanted experts, each part checked against the manifest. Blocks.

    Args:
        wanted: ``{layer: [experts or slices]}``.
        device: where they compute, as the setting ``host.device`` says it.

    Returns:
        What can be served, and how many bytes of the checkpoint were read.

    Raises:
        ModelError: a tensor was altered or is missing.
        ConfigError: there is no such device, or its memory is full.
    """
    place = choose_device(device, key=DEVICE_KEY)
    with Checkpoint(model.folder) as checkpoint:
        layers = read_experts(checkpoint, model, wanted, dtype, progress)
        hosted = HostedModel(model.root, model.name, model.kind, model.hidden, dtype, dict(layers))
        if place.type == "cuda":
            from daaswarm.models.cuda import CudaLayer, CudaQueue

            queue = CudaQueue(place)
            with explaining_full(place, DEVICE_KEY):
                for number in list(layers):  # each leaves the processor's memory before the next one moves
                    hosted.layers[number] = CudaLayer(layers.pop(number), queue)
            hosted.device = str(place)
        return hosted, checkpoint.bytes_read
