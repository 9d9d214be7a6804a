"""What transformers knows about a checkpoint: its class, and which of its modules can be split.

This and ``routing`` lean on internals of transformers, which is why its minor version is pinned.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils.generic import ContextManagers

from daaswarm.errors import ModelError
from daaswarm.models.checkpoint import read_config
from daaswarm.models.dense import find_formula
from daaswarm.models.manifest import Kind
from daaswarm.models.quiet import silence_transformers
from daaswarm.models.refusals import REFUSALS, first_line
from daaswarm.models.tensors import COMPUTE_DTYPES
from daaswarm.types import Dtype

_OTHER_TOWER = re.compile(r"(^|\.)(vision|visual|image|audio|speech)")  # how experts for other inputs are named
MAX_NESTED = 32  # objects and lists inside of each other in config.json; real ones have under 6
MAX_LAYERS = 4_096  # of one model; the deepest have fewer than 200
_GENERATORS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
)


# -- the class ----------------------------------------------------------------------------------------------------


def load_config(folder: Path) -> PretrainedConfig:
    """The configuration of a checkpoint folder. Code that lies in the folder is never run.

    Raises:
        ModelError: no config, unknown architecture, quantised.
    """
    silence_transformers()
    try:
        raw: Any = json.loads(read_config(folder))
        quantised = raw.get("quantization_config") or (raw.get("text_config") or {}).get("quantization_config")
    except (ValueError, AttributeError, RecursionError):
        raise ModelError(f"{folder / 'config.json'} is not a JSON object", hint="download it again") from None
    if quantised:
        method = quantised.get("quant_method", "") if isinstance(quantised, dict) else ""
        raise ModelError(
            f"{folder} is quantised ({method or 'quantization_config'}); it would be served with losses",
            hint="use the checkpoint in bf16, f16 or f32",
        )
    _check_depth(folder, raw)
    named = raw.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ModelError(
            f"{folder / 'config.json'}: architectures is no list of names", hint="it is damaged: download it again"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except REFUSALS as error:
        raise ModelError(
            f"{folder}: transformers {transformers.__version__} does not know this configuration "
            f"(model_type {raw.get('model_type')!r}): {first_line(error)}",
            hint="models that need their own code (trust_remote_code) are never run",
        ) from None


def _check_depth(folder: Path, raw: Any, nested: int = 0) -> None:
    """Modules are built one by one, so an absurd number of layers must be refused before."""
    if nested > MAX_NESTED:
        raise ModelError(
            f"{folder / 'config.json'} is nested over {MAX_NESTED} times", hint="it is damaged: download it again"
        )
    pairs: Any = raw.items() if isinstance(raw, dict) else [("", value) for value in raw]
    for key, value in pairs:
        if isinstance(value, (dict, list)):
            _check_depth(folder, value, nested + 1)
        elif isinstance(value, int) and value > MAX_LAYERS and re.search(r"(layers|n_layer|depth)$", key):
            raise ModelError(f"{folder / 'config.json'}: {key} is {value}; {MAX_LAYERS} is the limit")


def get_class(config: PretrainedConfig) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The class that generates text from this configuration, and the configuration that it takes.

    That is the class that the configuration names, or the auto classes' choice: the whole model if they know it, else
    its text part alone.

    Raises:
        ModelError: there is none.
    """
    text = config.get_text_config(decoder=True)
    names = [*(config.architectures or [])]
    names += [getattr(modeling_auto, mapping, {}).get(config.model_type) for mapping in _GENERATORS]
    found = [cls for name in names if (cls := _find_generator(name)) is not None]
    for accepted in (config, text):
        for cls in found:
            if isinstance(accepted, cls.config_class or ()):
                return cls, accepted
    raise ModelError(
        f"{config.model_type} ({', '.join(config.architectures or []) or 'no architecture named'}) generates no text",
        hint="choose a language model",
    )


def _find_generator(name: str | None) -> type[PreTrainedModel] | None:
    found: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    generates = isinstance(found, type) and issubclass(found, PreTrainedModel) and found.can_generate()
    return found if generates else None


def build_skeleton(config: PretrainedConfig, dtype: Dtype) -> PreTrainedModel:
    """The architecture with every parameter and buffer on the meta device, as ``from_pretrained`` builds it.

    Raises:
        ModelError: the configuration contradicts itself.
    """
    cls, config = get_class(config)
    try:
        contexts: list[Any] = cls.get_init_context(COMPUTE_DTYPES[dtype], False, False, None)
        with ContextManagers(contexts):
            return cls(copy.deepcopy(config)).eval()
    except REFUSALS as error:
        raise ModelError(
            f"config.json does not make a {cls.__name__}: {first_line(error)}",
            hint="config.json is damaged: download it again",
        ) from None


# -- what is split ------------------------------------------------------------------------------------------------


@dataclass
class SplitModule:
    """An experts module or dense FFN. ``roles`` (dense only) maps gate, up and down to its linear layers' names."""

    name: str
    module: nn.Module
    activation: str = ""
    roles: dict[str, str] = field(default_factory=dict)


def find_split(model: PreTrainedModel) -> tuple[Kind, dict[int, SplitModule]]:
    """("moe" or "dense", {decoder layer: what is split there}).

    Raises:
        ModelError: nothing in this architecture can be split, with the reason.
    """
    decoder = _get_decoder_prefix(model)
    hooked: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if is_hooked(m)}
    inside = {name: m for name, m in hooked.items() if name.startswith(decoder)} or hooked
    if inside:
        layers: dict[int, SplitModule] = {}
        _refuse_tied(model, inside)
        for name, module in inside.items():
            if _OTHER_TOWER.search(name[len(decoder) :]) and len(inside) > 1:
                continue  # not called for text; stays with the requester
            _put(layers, model, name, SplitModule(name, module))
        return "moe", layers
    unhooked = [(n, m) for n, m in model.named_modules() if n.startswith(decoder) and n.endswith(".experts")]
    if unhooked:
        raise ModelError(
            f"{type(model).__name__}: transformers does not route {type(unhooked[0][1]).__name__} "
            "through its experts interface, so its experts can't be taken out",
            hint="choose another model; any whose experts class has @use_experts_implementation works",
        )
    return "dense", _find_dense(model, decoder)


def is_hooked(module: nn.Module) -> bool:
    """Does transformers route this experts module through its experts interface?"""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "num_experts")


def get_hidden(module: nn.Module) -> int:
    """The width of an experts module's rows."""
    down: Tensor = module.down_proj  # type: ignore[assignment]
    return int(down.shape[2] if module.is_transposed else down.shape[1])


def _find_dense(model: PreTrainedModel, decoder: str) -> dict[int, SplitModule]:
    layers: dict[int, SplitModule] = {}
    checked: dict[tuple[type, str], tuple[str, ...] | None] = {}
    nearest = ""
    for name, module in model.named_modules():
        linears = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear)}
        if not name.startswith(decoder) or len(linears) != 3 or not re.search(r"\.\d+\.", name + "."):
            continue
        owned = {f"{n}.{p}" for n, m in linears.items() for p, _ in m.named_parameters()}
        if owned != {n for n, _ in module.named_parameters()}:
            continue
        kind = type(module), repr(module)
        if kind not in checked:
            checked[kind] = _check_formula(module, linears)
        formula = checked[kind]
        if formula is None:
            nearest = nearest or f"{name} ({type(module).__name__})"
            continue
        gate, up, down, activation = formula
        split = SplitModule(name, module, activation, {"gate": gate, "up": up, "down": down})
        _put(layers, model, name, split)
    if not layers:
        but = f"; {nearest} does not compute down(act(gate(x)) * up(x))" if nearest else ""
        raise ModelError(
            f"{type(model).__name__} can't be split: it has neither experts behind transformers' experts interface "
            f"nor gated FFNs of three linear layers{but}",
            hint="choose a mixture-of-experts model, or a dense one of the Llama kind",
        )
    if len({(s.activation, tuple(s.roles.items())) for s in layers.values()}) > 1:
        raise ModelError(f"{type(model).__name__} can't be split: its layers use different FFN formulas")
    return layers


def _check_formula(module: nn.Module, linears: dict[str, nn.Linear]) -> tuple[str, ...] | None:
    """Run the module's own forward on small random weights and see which formula it follows."""
    small = copy.deepcopy(module)
    hidden = Counter(m.in_features for m in linears.values()).most_common(1)[0][0]
    sizes = {hidden: 8}
    generator = torch.Generator().manual_seed(0)
    for name, linear in linears.items():
        shape = [sizes.get(n, 16) for n in (linear.out_features, linear.in_features)]
        new = nn.Linear(shape[1], shape[0], bias=linear.bias is not None, device="cpu", dtype=torch.float64)
        new.weight.data = torch.randn(shape, generator=generator, dtype=torch.float64)
        if linear.bias is not None:
            nn.init.zeros_(new.bias)  # where biases go is known: each linear layer adds its own
        setattr(small, name, new)
    small = small.eval()
    x = torch.randn(32, 8, generator=generator, dtype=torch.float64)
    weights = {name: getattr(small, name).weight for name in linears}
    try:
        with torch.no_grad():
            return find_formula(small, weights, [x, 30 * x])
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        return None


def _refuse_tied(model: PreTrainedModel, modules: dict[str, nn.Module]) -> None:
    tied = getattr(model, "all_tied_weights_keys", {})
    for name in modules:
        shared = [key for pair in tied.items() for key in pair if key.startswith(name + ".")]
        if shared:
            raise ModelError(
                f"{type(model).__name__} can't be split: the experts {name} are shared with another module",
                hint="choose a model whose experts belong to one layer",
            )


def _put(layers: dict[int, SplitModule], model: PreTrainedModel, name: str, split: SplitModule) -> None:
    number = re.search(r"\.(\d+)(\.|$)", name)
    layer = int(number[1]) if number else 0
    if layer in layers:
        raise ModelError(
            f"{type(model).__name__} can't be split: {layers[layer].name} and {name} are both in layer {layer}",
            hint="choose a model with one block of experts a layer",
        )
    layers[layer] = split


def _get_decoder_prefix(model: PreTrainedModel) -> str:
    """The path of the text decoder inside the model, with a dot, or nothing."""
    with contextlib.suppress(AttributeError, NotImplementedError):
        decoder = model.get_decoder()
        for name, module in model.named_modules():
            if module is decoder and name:
                return name + "."
    return ""
