"""What a host holds: some experts of a MoE layer, or some slices of a dense FFN, and how they compute.

Only the held experts' bytes are read, each part checked against its leaf of the manifest, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from daaswarm.errors import ExpertError, ModelError
from daaswarm.models.checkpoint import Checkpoint
from daaswarm.models.dense import ACTIVATIONS, DenseSlices
from daaswarm.models.kernels import EagerMatrix, Matrix, fill, lay_out
from daaswarm.models.manifest import Entry, Progress
from daaswarm.models.parts import read_parts
from daaswarm.models.sources import LocalModel, ignore_progress
from daaswarm.models.tensors import COMPUTE_DTYPES, to_tensor
from daaswarm.types import Dtype, format_range

_OWN_FORWARD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}  # relative to the largest


class LayerExperts:
    """What a host holds of one layer.

    Attributes:
        ids: experts (or slices) held, ascending.
        nbytes: memory of their weights.
    """

    def __init__(self, ids: list[int], nbytes: int, *, moe: MoeExperts | None, dense: DenseSlices | None) -> None:
        self.ids = ids
        self.nbytes = nbytes
        self._moe = moe
        self._dense = dense

    @torch.inference_mode()
    def compute_pairs(self, rows: Tensor, row_index: Tensor, expert_index: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of experts' outputs: each pair adds ``weight * expert(row)`` to its row.

        Args:
            rows: (n, hidden) of the compute dtype.
            row_index, expert_index: (pairs,) integers.
            weights: (pairs,) f32.

        Returns:
            (n, hidden) f32; rows without a pair are zero.

        Raises:
            ExpertError: an expert that is not held here, a row out of range, or a dense layer.
        """
        return self.compute_pairs_with_graph(rows, row_index, expert_index, weights)

    def compute_pairs_with_graph(
        self, rows: Tensor, row_index: Tensor, expert_index: Tensor, weights: Tensor
    ) -> Tensor:
        """:meth:`compute_pairs` where autograd may follow."""
        if self._moe is None:
            raise ExpertError("a dense layer has slices, not experts", hint="ask for slices")
        return self._moe.compute(rows, row_index, expert_index, weights)

    @torch.inference_mode()
    def compute_slices(self, rows: Tensor, slices: list[int]) -> Tensor:
        """The sum of some slices of a dense FFN. rows: (n, hidden) of the compute dtype; returns (n, hidden) f32.

        Raises:
            ExpertError: a slice that is not held here, or a MoE layer.
        """
        return self.compute_slices_with_graph(rows, slices)

    def compute_slices_with_graph(self, rows: Tensor, slices: list[int]) -> Tensor:
        """:meth:`compute_slices` where autograd may follow."""
        if self._dense is None:
            raise ExpertError("a mixture-of-experts layer has experts, not slices", hint="send pairs")
        if slices != self.ids:
            missing = sorted(set(slices) - set(self.ids))
            if missing:
                raise _not_held(missing, self.ids)
        return self._dense.compute(rows, slices)

    @property
    def can_open(self) -> bool:
        """Whether these are gated FFNs without biases, so that what stands between can be opened and checked."""
        held = self._dense or self._moe
        assert held is not None
        return bool(held.activation) and not held.has_bias

    @property
    def activation(self) -> str:
        """A key of :data:`daaswarm.models.dense.ACTIVATIONS`; empty where it is another."""
        held = self._dense or self._moe
        assert held is not None
        return held.activation

    def get_matrices(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Gate, up (width, hidden) and down (hidden, width) of each expert or slice held, if they :attr:`can_open`."""
        held = self._dense or self._moe
        assert held is not None
        return held.get_matrices()

    @torch.inference_mode()
    def open_pairs(
        self, rows: Tensor, row_index: Tensor, expert_index: Tensor, weights: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """:meth:`compute_pairs`, and of each pair its gate, up and hidden activations, (pairs, width), and its expert's
        output, (pairs, hidden), all in the compute dtype.

        Raises:
            ExpertError: as :meth:`compute_pairs`; or the experts are of another form.
        """
        if self._moe is None or not self.can_open:
            raise ExpertError("these experts can't be opened", hint="compare two hosts instead")
        return self._moe.open(rows, row_index, expert_index, weights)

    @torch.inference_mode()
    def open_slices(self, rows: Tensor, slices: list[int]) -> tuple[Tensor, list[Tensor]]:
        """:meth:`compute_slices`, and gate, up and hidden activations, (n, slices * width) in the compute dtype.

        Raises:
            ExpertError: as :meth:`compute_slices`; or the slices are of another form.
        """
        if self._dense is None or not self.can_open:
            raise ExpertError("these slices can't be opened", hint="compare two hosts instead")
        missing = sorted(set(slices) - set(self.ids))
        if missing:
            raise _not_held(missing, self.ids)
        *activations, sums = self._dense.open(rows, slices)
        return sums, activations

    def to(self, device: torch.device) -> LayerExperts:
        """Move the weights to a device, in place."""
        if self._moe is not None:
            self._moe.to(device)
        if self._dense is not None:
            self._dense.unpack()
            for name, value in vars(self._dense).items():
                if isinstance(value, Tensor):
                    setattr(self._dense, name, value.to(device))
        return self


class MoeExperts:
    """The architecture's own experts module, holding only some experts; expert ``ids[i]`` is its number ``i``.

    The formula of transformers' experts interface (``integrations/moe.py``) is followed with the module's own
    weights, gate, bias and norm, one expert at a time. It is compared once with the module's own forward, which is
    used instead where the two differ. Where it is not, the weights are laid out as they are the fastest here
    (:mod:`daaswarm.models.kernels`) until somebody asks for gradients.
    """

    def __init__(self, module: nn.Module, ids: list[int]) -> None:
        self.module: Any = module
        self.ids = ids
        self.place = {number: i for i, number in enumerate(ids)}
        module_type: Any = type(module)
        self._forward: Callable[..., Tensor] = getattr(module_type.forward, "__wrapped__", module_type.forward)
        try:
            self._matrices: list[tuple[Matrix, Matrix]] = self._take_matrices()
            self._bind()
            self.own = not self._agrees()
        except (AttributeError, RuntimeError, TypeError):  # a class that follows the interface only in part
            self.own = True
        self.activation = "" if self.own else self._find_activation()
        self.has_bias = not self.own and module.has_bias
        if not self.own:
            for name in self._get_names():
                delattr(module, name)
            for i, (first, down) in enumerate(self._matrices):  # one by one: at most one is held twice
                self._matrices[i] = lay_out(first.unpack(), down.unpack())

    def _get_names(self) -> tuple[str, str]:
        return ("gate_up_proj" if self.module.has_gate else "up_proj"), "down_proj"

    def _take_matrices(self) -> list[tuple[Matrix, Matrix]]:
        """Each expert's two matrices: indexing at each call costs as much as a small product."""
        both = [getattr(self.module, name) for name in self._get_names()]
        if self.module.is_transposed:
            both = [matrix.transpose(1, 2) for matrix in both]
        return [
            (EagerMatrix(first), EagerMatrix(down)) for first, down in zip(*(m.unbind(0) for m in both), strict=True)
        ]

    def _bind(self) -> None:
        """Take what else a call needs out of the module."""
        module = self.module
        self._first_bias: list[Tensor | None] = [None] * len(self.ids)
        self._down_bias: list[Tensor | None] = [None] * len(self.ids)
        if module.has_bias:
            self._first_bias = list((module.gate_up_proj_bias if module.has_gate else module.up_proj_bias).unbind(0))
            self._down_bias = list(module.down_proj_bias.unbind(0))
        self._gate: Callable[[Tensor], Tensor] = module._apply_gate if module.has_gate else module.act_fn
        self._norm: Callable[[Tensor], Tensor] | None = module.post_expert_norm if module.has_post_expert_norm else None

    def to(self, device: torch.device) -> None:
        """Move the weights to a device."""
        self.module.to(device)
        if not self.own:
            self._matrices = [
                (EagerMatrix(first.unpack().to(device)), EagerMatrix(down.unpack().to(device)))
                for first, down in self._matrices
            ]
            self._bind()

    def unpack(self) -> None:
        """Lay the weights out for autograd, and any device; for good, since more such calls will come."""
        if not self.own and not all(isinstance(matrix, EagerMatrix) for matrix in self._matrices[0]):
            self._matrices = [(EagerMatrix(f.unpack()), EagerMatrix(d.unpack())) for f, d in self._matrices]

    def compute(self, rows: Tensor, row_index: Tensor, expert_index: Tensor, weights: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.unpack()
        out = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        experts = expert_index.tolist()
        self._check(experts, row_index.tolist(), rows.shape[0])
        by_expert: dict[int, list[int]] = {}
        for pair, expert in enumerate(experts):
            by_expert.setdefault(expert, []).append(pair)
        single = rows.shape[0] == 1
        weights, row_index = weights.float(), row_index.long()
        for expert, pairs in by_expert.items():
            place = self.place[expert]
            if single and len(pairs) == 1:  # decoding
                out += self._apply(rows, place).float() * weights[pairs[0]]
                continue
            chosen = torch.tensor(pairs, device=rows.device)
            at = row_index[chosen]
            y = self._apply(rows[at], place).float() * weights[chosen, None]
            out.index_add_(0, at, y)
        return out

    def _check(self, experts: list[int], row_numbers: list[int], rows: int) -> None:
        missing = sorted(set(experts) - self.place.keys())
        if missing:
            raise _not_held(missing, self.ids)
        if row_numbers and not 0 <= min(row_numbers) <= max(row_numbers) < rows:
            raise ExpertError(f"a pair names row {max(row_numbers)}; the call has {rows} rows")

    def _apply(self, rows: Tensor, place: int) -> Tensor:
        """One expert on (n, hidden) rows, unweighted."""
        if self.own:
            index = torch.full((rows.shape[0], 1), place, dtype=torch.int64, device=rows.device)
            return self._forward(self.module, rows, index, torch.ones_like(index, dtype=rows.dtype))
        return self._formula(rows, place)

    def _formula(self, rows: Tensor, place: int) -> Tensor:
        first, down = self._matrices[place]
        h = self._gate(_multiply(fill(rows, first.least_rows), first, self._first_bias[place]))
        y = _multiply(h, down, self._down_bias[place])[: len(rows)]
        return y if self._norm is None else self._norm(y)

    def open(
        self, rows: Tensor, row_index: Tensor, expert_index: Tensor, weights: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """:meth:`compute`, and gate, up, hidden and output of each pair."""
        sums = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        opened: list[Tensor] = []
        row_index = row_index.long()
        self._check(expert_index.tolist(), row_index.tolist(), len(rows))
        for expert in expert_index.unique().tolist():
            chosen = (expert_index == expert).nonzero()[:, 0]
            at = row_index[chosen]
            first, down = self._matrices[self.place[expert]]
            both = first(fill(rows[at], first.least_rows))
            hidden = self._gate(both)
            out = down(hidden)[: len(at)]
            sums.index_add_(0, at, out.float() * weights[chosen, None].float())
            values = [*(each[: len(at)] for each in both.chunk(2, -1)), hidden[: len(at)], out]
            if not opened:
                opened = [torch.empty(len(row_index), each.shape[1], dtype=each.dtype) for each in values]
            for kept, value in zip(opened, values, strict=True):
                kept[chosen] = value
        return sums, opened

    def get_matrices(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Gate, up (width, hidden) and down (hidden, width) of each expert held."""
        every = ((first.unpack(), down.unpack()) for first, down in self._matrices)
        return [(*first.tensor_split(2), down) for first, down in every]  # type: ignore[misc]

    @torch.inference_mode()
    def _find_activation(self) -> str:
        """The activation of a gated FFN without anything else to it; empty where it is none."""
        if not self.module.has_gate or self._norm is not None or self.module.has_bias:
            return ""
        width = self._matrices[0][1].unpack().shape[1]
        both = torch.randn(4, 2 * width, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 4
        gate, up = both.chunk(2, -1)
        got = self._gate(both)
        found = (name for name, act in ACTIVATIONS.items() if torch.allclose(got, act(gate) * up, rtol=1e-7, atol=1e-9))
        return next(found, "")

    @torch.inference_mode()
    def _agrees(self) -> bool:
        down: Tensor = self.module.down_proj
        hidden = down.shape[2] if self.module.is_transposed else down.shape[1]
        rows = torch.randn(3, hidden, generator=torch.Generator().manual_seed(0)).to(down.dtype)
        place = len(self.ids) - 1
        got = self._formula(rows, place).float()
        index = torch.full((3, 1), place, dtype=torch.int64)
        want = self._forward(self.module, rows, index, torch.ones_like(index, dtype=down.dtype)).float()
        return bool((got - want).abs().max() <= _OWN_FORWARD_TOLERANCE[down.dtype] * want.abs().max())


def _multiply(rows: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    out = matrix(rows)
    return out if bias is None else out + bias


def load_experts(
    model: LocalModel, wanted: dict[int, list[int]], dtype: Dtype, progress: Progress = ignore_progress
) -> dict[int, LayerExperts]:
    """Read some experts (or slices) of some layers, and nothing else. Blocks.

    At most one layer is held twice, while it is converted to ``dtype``.

    Args:
        wanted: ``{layer: [experts or slices]}``.

    Raises:
        ModelError: a layer or expert that the model does not have; a tensor that was altered.
    """
    for layer, ids in wanted.items():
        count = model.layers.get(layer)
        if count is None:
            raise ModelError(
                f"{model.name} has no split layer {layer}", hint=f"it has {format_range(sorted(model.layers))}"
            )
        if not ids or min(ids) < 0 or max(ids) >= count:
            raise ModelError(f"{model.name}, layer {layer}: there are experts 0 to {count - 1}, not {ids}")
    with Checkpoint(model.folder) as checkpoint:
        return read_experts(checkpoint, model, wanted, dtype, progress)


def read_experts(
    checkpoint: Checkpoint,
    model: LocalModel,
    wanted: dict[int, list[int]],
    dtype: Dtype,
    progress: Progress = ignore_progress,
) -> dict[int, LayerExperts]:
    """:func:`load_experts` from a checkpoint that is already open."""
    reader = _Reader(checkpoint, model)
    per_layer = {layer: sorted(set(ids)) for layer, ids in sorted(wanted.items())}
    by_layer = {layer: model.manifest.of_layer(layer) for layer in per_layer}
    total = sum(reader.count(entry, ids) for layer, ids in per_layer.items() for entry in by_layer[layer])
    build = (
        _MoeBuilder(model, dtype, reader).build if model.kind == "moe" else _DenseBuilder(model, dtype, reader).build
    )
    held: dict[int, LayerExperts] = {}
    before = checkpoint.bytes_read
    for layer, ids in per_layer.items():
        held[layer] = build(layer, ids, by_layer[layer])
        progress("loading experts", checkpoint.bytes_read - before, total)
    return held


class _Reader:
    """Checked parts of a checkpoint as tensors of the dtype they are stored in."""

    def __init__(self, checkpoint: Checkpoint, model: LocalModel) -> None:
        self._checkpoint = checkpoint
        self._where = model.manifest_path

    def count(self, entry: Entry, ids: list[int]) -> int:
        """The bytes that :meth:`read` will read."""
        nbytes = self._checkpoint.tensors[entry.name].nbytes
        if entry.parts > 1:
            return nbytes // entry.parts * len(ids)
        return nbytes if entry.is_of(set(ids)) else 0

    def read(self, entry: Entry, ids: list[int]) -> Tensor:
        parts = ids if entry.parts > 1 else [0]
        shape = entry.shape_of_part
        if entry.parts > 1:
            shape[entry.axis] *= len(parts)
        return to_tensor(read_parts(self._checkpoint, entry, parts, where=self._where), entry.dtype, shape)


class _DenseBuilder:
    def __init__(self, model: LocalModel, dtype: Dtype, reader: _Reader) -> None:
        self._model, self._dtype, self._reader = model, COMPUTE_DTYPES[dtype], reader

    def build(self, layer: int, ids: list[int], entries: list[Entry]) -> LayerExperts:
        values = {
            entry.param: self._reader.read(entry, ids).to(self._dtype) for entry in entries if entry.is_of(set(ids))
        }
        self._check(layer, values)
        slices = DenseSlices(
            ids,
            self._model.manifest.activation,
            values["gate.weight"],
            values["up.weight"],
            values["down.weight"],
            values.get("gate.bias"),
            values.get("up.bias"),
            values.get("down.bias"),
        )
        return LayerExperts(ids, sum(v.nbytes for v in values.values()), moe=None, dense=slices)

    def _check(self, layer: int, values: dict[str, Tensor]) -> None:
        """A manifest that came with the folder may say anything, and no architecture is built to compare it with."""
        gate = values.get("gate.weight")
        width, hidden = gate.shape if gate is not None and gate.dim() == 2 else (0, 0)
        wanted: dict[str, tuple[int, ...]] = {
            "gate.weight": (width, hidden),
            "up.weight": (width, hidden),
            "down.weight": (hidden, width),
            "gate.bias": (width,),
            "up.bias": (width,),
            "down.bias": (hidden,),
        }
        found = {param: tuple(value.shape) for param, value in values.items()}
        complete = all(param in found for param in ("gate.weight", "up.weight", "down.weight"))
        known = self._model.manifest.activation in ACTIVATIONS
        fits = hidden == self._model.hidden and all(wanted.get(param) == shape for param, shape in found.items())
        if not (complete and known and fits):
            raise ModelError(
                f"{self._model.manifest_path}: layer {layer} is no gated FFN as daaswarm splits it",
                hint=f"delete {self._model.manifest_path}: it is built again from the checkpoint",
            )


class _MoeBuilder:
    def __init__(self, model: LocalModel, dtype: Dtype, reader: _Reader) -> None:
        from daaswarm.models.architecture import build_skeleton, find_split, load_config

        self._model = model
        self._reader = reader
        self._folder = model.folder
        self._skeleton = build_skeleton(load_config(model.folder), dtype)
        _, self._modules = find_split(self._skeleton)

    def build(self, layer: int, ids: list[int], entries: list[Entry]) -> LayerExperts:
        from daaswarm.models.architecture import get_hidden
        from daaswarm.models.routing import convert, get_dtypes, route, set_parameter

        split = self._modules.get(layer)
        count = self._model.layers[layer]
        if split is None or (split.module.num_experts, get_hidden(split.module)) != (count, self._model.hidden):
            raise ModelError(
                f"{self._model.manifest_path}: layer {layer} is not split as its architecture is",
                hint=f"delete {self._model.manifest_path}: it is built again from the checkpoint",
            )
        mine = {entry.name: entry for entry in entries if entry.is_of(set(ids))}
        _shrink(split.module, len(ids))
        dtypes = get_dtypes(self._skeleton)
        for group in route(self._skeleton, mine):
            tensors = {name: self._reader.read(mine[name], ids).to(dtypes(group.target)) for _, name in group.members}
            for name, value in convert(self._skeleton, group, tensors).items():
                set_parameter(self._skeleton, name, value, self._folder)
        left = [name for name, p in split.module.named_parameters() if p.is_meta]
        if left:
            raise ModelError(f"{self._folder}: layer {layer} lacks {split.name}.{left[0]}")
        module = split.module.requires_grad_(False).eval()
        nbytes = sum(p.nbytes for p in module.parameters())
        return LayerExperts(ids, nbytes, moe=MoeExperts(module, ids), dense=None)


def _shrink(module: nn.Module, count: int) -> None:
    """Cut the meta parameters of an experts module down to ``count`` experts."""
    from daaswarm.models.plan import is_per_expert

    for name in [n for n, _ in module.named_parameters() if is_per_expert(module, n)]:
        old = module.get_parameter(name)
        empty = torch.empty((count, *old.shape[1:]), dtype=old.dtype, device="meta")
        setattr(module, name, nn.Parameter(empty, requires_grad=False))
    module.num_experts = count  # type: ignore[assignment]


def _not_held(missing: list[int], held: list[int]) -> ExpertError:
    return ExpertError(
        f"experts {format_range(missing)} are not held here", hint=f"this host holds {format_range(held)}"
    )
