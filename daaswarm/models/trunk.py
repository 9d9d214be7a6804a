"""What a requester holds: the model without its experts (or dense FFNs), which it asks the swarm for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from daaswarm.errors import ModelError
from daaswarm.models.architecture import SplitModule, build_skeleton, find_split, get_class, load_config
from daaswarm.models.checkpoint import Checkpoint
from daaswarm.models.files import has_tokenizer
from daaswarm.models.manifest import TRUNK, Progress
from daaswarm.models.parts import read_parts
from daaswarm.models.quiet import silence_transformers
from daaswarm.models.refusals import REFUSALS, first_line
from daaswarm.models.routing import convert, get_dtypes, route, set_parameter
from daaswarm.models.sources import LocalModel, ignore_progress
from daaswarm.models.tensors import COMPUTE_DTYPES, to_tensor
from daaswarm.types import Dtype

ExpertsFn = Callable[[int, Tensor, "Tensor | None", "Tensor | None"], Tensor]
"""(layer, rows (n, hidden), experts (n, k) or None, weights (n, k) or None) → (n, hidden) of the rows' dtype.

With None, all slices of that layer's dense FFN. Called in the thread that runs the model.
"""

IMPLEMENTATION = "daaswarm"
_REMOTE = "_daaswarm_remote"  # on an experts module: (layer, ExpertsFn)


def load_trunk(
    model: LocalModel, dtype: Dtype, experts: ExpertsFn, progress: Progress = ignore_progress
) -> PreTrainedModel:
    """The model with its experts elsewhere, in evaluation mode on the CPU. Never holds expert weights.

    Each tensor is read when its parameter is made and checked against its leaf of the manifest.

    Args:
        experts: called at each split layer, one for this instance; several trunks live side by side.

    Raises:
        ModelError: a tensor was altered, is missing or has another shape.
    """
    trunk = build_skeleton(load_config(model.folder), dtype)
    kind, modules = find_split(trunk)
    _detach(trunk, kind, modules, experts)
    with Checkpoint(model.folder) as checkpoint:
        _load(trunk, model, checkpoint, progress)
    elsewhere = _get_remote_parameters(trunk)
    _finish(trunk, model, elsewhere)
    for name in elsewhere:
        path, _, leaf = name.rpartition(".")
        delattr(trunk.get_submodule(path), leaf)
    return trunk


def load_reference(model: LocalModel, dtype: Dtype) -> PreTrainedModel:
    """The whole model on this machine, as transformers loads it, to compare with."""
    cls, _ = get_class(load_config(model.folder))
    return cls.from_pretrained(model.folder, dtype=COMPUTE_DTYPES[dtype], local_files_only=True).eval()


def load_tokenizer(model: LocalModel) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, or None if its folder has none.

    Raises:
        ModelError: its files are damaged, or it needs code of its own.
    """
    if not has_tokenizer(model.folder):
        return None
    silence_transformers()
    try:
        return AutoTokenizer.from_pretrained(model.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - tokenizers raises Exception itself for what it can't parse
        raise ModelError(
            f"{model.folder}: its tokenizer can't be loaded: {first_line(error)}",
            hint="download the tokenizer's files again",
        ) from None


# -- the hook -----------------------------------------------------------------------------------------------------


def _forward_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls at each experts module of a model whose implementation is "daaswarm"."""
    remote = self.__dict__.get(_REMOTE)
    if remote is None:  # experts outside the decoder stay with the requester
        return type(self).forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)
    return remote[1](remote[0], hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward_experts)


class RemoteFfn(nn.Module):
    """Stands where a dense FFN was."""

    def __init__(self, layer: int, experts: ExpertsFn) -> None:
        super().__init__()
        self._layer = layer
        self._experts = experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self._experts(self._layer, rows, None, None).view(hidden_states.shape)


def _detach(trunk: PreTrainedModel, kind: str, modules: dict[int, SplitModule], experts: ExpertsFn) -> None:
    for layer, split in modules.items():
        if kind == "dense":
            trunk.set_submodule(split.name, RemoteFfn(layer, experts))
            continue
        module = cast(Any, split.module)
        for part in module.modules():
            part._is_hf_initialized = True
        for parameter in module.parameters():  # on the meta device: no memory, and transformers must leave it alone
            parameter._is_hf_initialized = True
        setattr(module, _REMOTE, (layer, experts))
        module.config._experts_implementation_internal = IMPLEMENTATION


def _get_remote_parameters(trunk: PreTrainedModel) -> set[str]:
    """The full names of the parameters that hosts hold."""
    modules = [(name, m) for name, m in trunk.named_modules() if _REMOTE in m.__dict__]
    return {f"{name}.{parameter}" for name, m in modules for parameter, _ in m.named_parameters()}


# -- the weights --------------------------------------------------------------------------------------------------


def _load(trunk: PreTrainedModel, model: LocalModel, checkpoint: Checkpoint, progress: Progress) -> None:
    entries = {entry.name: entry for entry in model.manifest.entries if entry.layer == TRUNK}
    groups = list(route(trunk, entries))
    total = sum(checkpoint.tensors[name].nbytes for group in groups for _, name in group.members)
    dtypes = get_dtypes(trunk)
    for group in groups:
        dtype = dtypes(group.target)
        tensors: dict[str, Tensor] = {}
        for _, name in group.members:
            entry = entries[name]
            data = read_parts(checkpoint, entry, [0], where=model.manifest_path)
            tensors[name] = to_tensor(data, entry.dtype, entry.shape).to(dtype)
        for name, value in convert(trunk, group, tensors).items():
            set_parameter(trunk, name, value, model.folder)
        progress("loading the model", checkpoint.bytes_read, total)


@torch.no_grad()
def _finish(trunk: PreTrainedModel, model: LocalModel, elsewhere: set[str]) -> None:
    """What ``from_pretrained`` does after loading: tie weights, compute buffers that no checkpoint stores."""
    tied = getattr(trunk, "all_tied_weights_keys", {})
    missing = {name for name, p in trunk.named_parameters(remove_duplicate=False) if p.is_meta}
    missing |= {name for name, b in trunk.named_buffers() if b.is_meta and name in trunk.state_dict()}
    missing -= elsewhere
    for name in tied:
        trunk.get_parameter(name)._is_hf_initialized = True  # type: ignore[attr-defined]
    trunk._move_missing_keys_from_meta_to_device(missing, None, None, None)  # type: ignore[arg-type]
    trunk._initialize_missing_keys(False)
    trunk.tie_weights(missing_keys=missing, recompute_mapping=False)
    tensors = [*trunk.named_parameters(), *trunk.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta and name not in elsewhere]
    if left:
        raise ModelError(f"{model.folder}: the checkpoint has no tensor for {left[0]}", hint="download it again")
    if trunk.can_generate():
        trunk.generation_config = _load_generation_config(model)
    trunk.requires_grad_(False)
    _lay_out_head(trunk)


def _lay_out_head(trunk: PreTrainedModel) -> None:
    """Keep the output head's weights input-major: a pass needs the logits of a row or two, and such a product reads
    them in order then. Measured (576 → 49,152, f32, one row): 5.8 instead of 11.7 ms; two rows 12 and 28, ten 39 and
    33. In bf16 it would be slower. The embedding that shares them reads single rows, which costs nothing beside it.
    """
    head = trunk.get_output_embeddings()
    if isinstance(head, nn.Linear) and head.weight.dtype == torch.float32:
        head.weight.data = head.weight.data.t().contiguous().t()


def _load_generation_config(model: LocalModel) -> GenerationConfig:
    own = (model.folder / "generation_config.json").is_file()
    source: dict[str, Any] = {} if own else {"config_file_name": "config.json", "_from_model_config": True}
    try:
        return GenerationConfig.from_pretrained(model.folder, local_files_only=True, **source)
    except REFUSALS as error:
        raise ModelError(
            f"{model.folder}: its generation_config.json can't be used: {first_line(error)}",
            hint="download it again, or delete it",
        ) from None
