"""Who holds what of a checkpoint: the split plan, worked out once from the architecture and kept in the manifest."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Transpose, WeightConverter

from daaswarm.errors import ModelError
from daaswarm.models.architecture import SplitModule, build_skeleton, find_split, get_hidden, load_config
from daaswarm.models.checkpoint import Checkpoint
from daaswarm.models.dense import get_slices
from daaswarm.models.manifest import SHARED, TRUNK, Entry, Kind, Layer
from daaswarm.models.routing import Group, get_expert_number, route


@dataclass
class Plan:
    """The manifest's content, but for the leaves."""

    kind: Kind
    hidden: int
    activation: str
    layers: dict[int, Layer]
    entries: list[Entry]


def make_plan(checkpoint: Checkpoint) -> Plan:
    """Work out the split of a checkpoint.

    Raises:
        ModelError: it can't be split, or tensors are missing or have the wrong shape; names the tensor.
    """
    model = build_skeleton(load_config(checkpoint.folder), "f32")
    kind, modules = find_split(model)
    places: dict[str, dict[str, object]] = {}
    owners = {
        f"{split.name}.{param}": (layer, split, param)
        for layer, split in modules.items()
        for param, _ in split.module.named_parameters()
    }
    locate = _locate_expert if kind == "moe" else _locate_slice
    made: set[str] = set()
    for group in route(model, checkpoint.tensors):
        made |= _get_targets(model, group)
        _check_shape(model, checkpoint, group)
        if group.target in owners:
            layer, split, param = owners[group.target]
            for _, name in group.members:
                shape = checkpoint.tensors[name].shape
                places[name] = {"layer": layer, "param": param, **locate(split, group, param, name, shape)}
    _check_complete(model, checkpoint, made)
    entries = [
        Entry(name=name, dtype=t.dtype, shape=list(t.shape), **places.get(name, {"layer": TRUNK}))  # type: ignore[arg-type]
        for name, t in checkpoint.tensors.items()
    ]
    hidden = {_get_width(kind, split) for split in modules.values()}
    if len(hidden) > 1:
        raise ModelError(f"{checkpoint.folder} can't be split: its layers' experts have different widths")
    return Plan(
        kind=kind,
        hidden=hidden.pop(),
        activation=next(iter(modules.values())).activation,
        layers={layer: _measure(kind, split) for layer, split in sorted(modules.items())},
        entries=entries,
    )


# -- mixture of experts -------------------------------------------------------------------------------------------


def is_per_expert(module: nn.Module, param: str) -> bool:
    """Does this parameter of an experts module have one row for each expert? Others every host of the layer holds."""
    value = module.get_parameter(param)
    return "." not in param and value.dim() > 0 and value.shape[0] == module.num_experts


def _locate_expert(
    split: SplitModule, group: Group, param: str, name: str, shape: tuple[int, ...]
) -> dict[str, object]:
    experts = int(split.module.num_experts)  # type: ignore[arg-type]
    if not is_per_expert(split.module, param):
        return {"parts": 1, "owner": SHARED}
    pattern = next(pattern for pattern, member in group.members if member == name)
    if group.transform is not None and "*" in pattern:
        number = get_expert_number(pattern, name) - group.first
        if number >= experts:
            raise ModelError(f"tensor {name}: this layer has {experts} experts, numbered from 0")
        return {"parts": 1, "owner": number}
    moved = group.transform is not None and any(
        isinstance(op, Transpose) and 0 in (op.dim0, op.dim1) for op in group.transform.operations
    )
    if not shape or shape[0] != experts or moved:
        raise ModelError(
            f"tensor {name} {list(shape)} can't be split: its first dimension is not the {experts} experts",
            hint="save the model again with transformers' save_pretrained",
        )
    return {"axis": 0, "parts": experts, "owner": 0 if experts == 1 else SHARED}


# -- dense --------------------------------------------------------------------------------------------------------


def _locate_slice(split: SplitModule, group: Group, param: str, name: str, shape: tuple[int, ...]) -> dict[str, object]:
    if group.transform is not None:
        raise ModelError(
            f"tensor {name} can't be split: the checkpoint keeps this FFN in another form than the model",
            hint="save the model again with transformers' save_pretrained",
        )
    linear, _, leaf = param.partition(".")
    role = next(role for role, attribute in split.roles.items() if attribute == linear)
    place: dict[str, object] = {"param": f"{role}.{leaf}"}
    if role == "down" and leaf == "bias":
        return {**place, "parts": 1, "owner": 0}  # it must be added once
    slices = _count_slices(split)
    return {**place, "axis": int(role == "down"), "parts": slices, "owner": 0 if slices == 1 else SHARED}


def _count_slices(split: SplitModule) -> int:
    return get_slices(split.module.get_submodule(split.roles["gate"]).out_features)  # type: ignore[arg-type]


# -- sizes and checks ---------------------------------------------------------------------------------------------


def _get_width(kind: str, split: SplitModule) -> int:
    if kind == "moe":
        return get_hidden(split.module)
    return int(split.module.get_submodule(split.roles["gate"]).in_features)  # type: ignore[arg-type]


def _measure(kind: str, split: SplitModule) -> Layer:
    parameters = dict(split.module.named_parameters())
    if kind == "dense":
        slices = _count_slices(split)
        return Layer(experts=slices, numel=math.ceil(sum(p.numel() for p in parameters.values()) / slices))
    experts = int(split.module.num_experts)  # type: ignore[arg-type]
    own = sum(p.numel() for n, p in parameters.items() if is_per_expert(split.module, n))
    return Layer(experts=experts, numel=own // experts, shared=sum(p.numel() for p in parameters.values()) - own)


def _get_targets(model: PreTrainedModel, group: Group) -> set[str]:
    transform = group.transform
    if not isinstance(transform, WeightConverter) or len(transform.target_patterns) == 1:
        return {group.target}
    first = transform.target_patterns[0]
    return {group.target.replace(first, pattern) for pattern in transform.target_patterns}


def _check_shape(model: PreTrainedModel, checkpoint: Checkpoint, group: Group) -> None:
    if group.transform is not None:
        return  # the conversion checks
    value = model.get_parameter_or_buffer(group.target)
    name = group.members[0][1]
    shape = checkpoint.tensors[name].shape
    if shape != tuple(value.shape):
        raise ModelError(
            f"{checkpoint.folder}: tensor {name} is {list(shape)}, config.json makes it {list(value.shape)}",
            hint="config.json and the weights are not of the same model",
        )


def _check_complete(model: PreTrainedModel, checkpoint: Checkpoint, made: set[str]) -> None:
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    pairs: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    tied = pairs.keys() | {source for target, source in pairs.items() if target in made}
    missing = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in made and name not in tied and not any(p.search(name) for p in ignored)
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{checkpoint.folder}: no tensor of the checkpoint becomes {missing[0]}{more}",
            hint="the checkpoint is incomplete: download it again",
        )
