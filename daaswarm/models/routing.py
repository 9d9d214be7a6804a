"""Which checkpoint tensor becomes which parameter, as transformers would load it, one parameter at a time.

``from_pretrained`` converts a whole checkpoint at once; a host and a requester each want a part of it, read lazily.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from daaswarm.errors import ModelError


@dataclass
class Group:
    """Checkpoint tensors that become one parameter, or several of one converter.

    Attributes:
        target: the parameter, the first of them if several.
        transform: the converter, or None if the tensor only changes its name.
        members: (pattern of the converter that matched, checkpoint name), in transformers' order.
        first: the number of the first expert, where several modules' experts are numbered in one row.
    """

    target: str
    transform: WeightConverter | None
    members: list[tuple[str, str]]
    first: int = 0


def route(model: PreTrainedModel, names: Iterable[str]) -> Iterator[Group]:
    """Group checkpoint tensors by what they become, as transformers would load them.

    Tensors of which the model has no parameter are left out, as transformers leaves them out.
    """
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, Group] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            continue
        group = groups.get(target)
        if group is None:
            transform = copy.deepcopy(by_pattern[pattern]) if pattern is not None else None
            group = groups[target] = Group(target, transform, [])
        group.members.append((pattern or name, name))
    for group in groups.values():
        yield from _part_towers(model, group)


def _part_towers(model: PreTrainedModel, group: Group) -> Iterator[Group]:
    """Ernie VL numbers a layer's text experts and then its vision experts in one row; each kind is a group here."""
    transform = group.transform
    if transform is None or not any(isinstance(o, ErnieFuseAndSplitTextVisionExperts) for o in transform.operations):
        yield group
        return
    experts = model.config.get_text_config().moe_num_experts
    sources, targets = transform.source_patterns, transform.target_patterns
    operations: list[Any] = [MergeModulelist(dim=0)] + ([Concatenate(dim=1)] if len(sources) > 1 else [])
    for tower, target in enumerate(targets):
        members = [(p, n) for p, n in group.members if get_expert_number(p, n) // experts == tower]
        if members:
            plain = WeightConverter(list(sources), [target], operations=operations)
            yield Group(group.target.replace(targets[0], target), plain, members, first=tower * experts)


def get_expert_number(pattern: str, name: str) -> int:
    """The number in a checkpoint name where the converter's pattern has its star."""
    body = re.escape(pattern.replace("\\.", ".")).replace(r"\*", r"(?P<number>\d+)").lstrip("^")
    found = re.search(body, name)
    if found is None:  # renamed before the converter saw it
        numbers = re.findall(r"\.experts\.(\d+)\.", name)
        if len(numbers) != 1:
            raise ModelError(f"tensor {name} has no expert number where {pattern} has its star")
        return int(numbers[0])
    return int(found["number"])


def convert(model: PreTrainedModel, group: Group, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that a group's tensors become, by full name.

    Raises:
        ModelError: the conversion failed.
    """
    if group.transform is None:
        return {group.target: tensors[group.members[0][1]]}
    transform = copy.deepcopy(group.transform)
    for pattern, name in group.members:
        transform.collected_tensors[pattern].append(tensors.pop(name))  # type: ignore[arg-type]
    try:
        made: dict[str, Any] = transform.convert(group.target, model=model, config=model.config)
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
        names = ", ".join(name for _, name in group.members[:3])
        raise ModelError(f"tensors {names} can't be made into {group.target}: {str(error)[:200]}") from None
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def get_dtypes(model: PreTrainedModel) -> Callable[[str], torch.dtype]:
    """The dtype to load each parameter in: the model's, but for those that the architecture keeps in f32."""
    plan = model._get_dtype_plan(model.dtype)
    keep, by_group, _ = build_glob_alternation(list(plan)) if plan else (None, {}, {})

    def get_dtype(target: str) -> torch.dtype:
        found = keep.search(target) if keep is not None else None
        if found is not None and found.lastgroup is not None:
            return plan[by_group[found.lastgroup]]
        return model.get_parameter_or_buffer(target).dtype

    return get_dtype


def set_parameter(model: PreTrainedModel, name: str, value: Tensor, folder: Path) -> None:
    """Put a loaded tensor in its place.

    Raises:
        ModelError: it has another shape than the architecture says.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old: Tensor | None = getattr(module, leaf)
    if old is None or old.shape != value.shape:
        raise ModelError(
            f"{folder}: {name} would be {list(value.shape)}, config.json makes it "
            f"{None if old is None else list(old.shape)}",
            hint="config.json and the weights are not of the same model",
        )
    if leaf in module._parameters:
        value = nn.Parameter(value, requires_grad=False)
    value._is_hf_initialized = True  # type: ignore[attr-defined]  # else transformers would initialise it again
    setattr(module, leaf, value)
