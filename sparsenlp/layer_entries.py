"""What a checkpoint says of each sparse linear layer, and the checks of its tensors; checkpoint.py has the format."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .formats import NM, BlockSparse
from .formats.block import INDEX_DTYPE
from .formats.nm import INDEX_DTYPE as NM_INDEX_DTYPE
from .layers import NMLinear, SparseLinear
from .layers.compressed_linear import CompressedLinear
from .ops.bsr_linear import ACTIVATIONS
from .tensor_files import CheckpointError, TensorFiles, crc32_of

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
INT8_FIELDS = ("int8", "input_scale")
PAIRS = ("block", "pattern", "shape")
PLACEHOLDER = "weight"
"""An empty tensor by this name keeps code that expects a dense layer from loading a sparse one."""
NAME = re.compile(r"[\w-]+(\.[\w-]+)*")


class LayerTensors(NamedTuple):
    """What was read and checked of a layer; its memory is its own."""

    weight: Any
    bias: Tensor | None


@dataclass(frozen=True, kw_only=True)
class LayerEntry:
    """What all sparse linear layers have in config.json."""

    layer: ClassVar[type[CompressedLinear]]

    shape: tuple[int, int]
    bias: bool
    activation: str
    dtype: str
    crc32: int
    int8: bool = False
    input_scale: float | None = None

    @property
    def content(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype on disk of values and indices, by name."""
        raise NotImplementedError

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype on disk of all tensors, in the order of crc32."""
        rows, dtype = (self.shape[0],), DTYPES[self.dtype]
        scales = {"scales": (rows, torch.float32)} if self.int8 else {}
        return {**self.content, **scales, **({"bias": (rows, dtype)} if self.bias else {}), PLACEHOLDER: ((0,), dtype)}

    @property
    def value_dtype(self) -> torch.dtype:
        return torch.int8 if self.int8 else DTYPES[self.dtype]

    def tensor_names(self, name: str) -> list[str]:
        """In the order of crc32."""
        return [f"{name}.{part}" for part in self.tensors]

    def weight(self, tensors: Mapping[str, Tensor]) -> Any:
        """The weight of these tensors; not checked."""
        raise NotImplementedError

    def empty_layer(self, dtype: torch.dtype) -> Any:
        """The layer on the meta device."""
        raise NotImplementedError

    def new_layer(self, tensors: LayerTensors) -> Any:
        """The layer with these tensors."""
        layer = self.layer.from_weight(tensors.weight, tensors.bias, self.activation)
        layer.input_scale = self.input_scale
        return layer


@dataclass(frozen=True, kw_only=True)
class BlockEntry(LayerEntry):
    layer = SparseLinear

    block: tuple[int, int]
    nnz_blocks: int

    @property
    def content(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, k = self.block
        column_dtype = torch.int16 if self.shape[1] // k <= 2**15 else INDEX_DTYPE
        return {
            "values": ((self.nnz_blocks, n, k), self.value_dtype),
            "crow_indices": ((self.shape[0] // n + 1,), INDEX_DTYPE),
            "col_indices": ((self.nnz_blocks,), column_dtype),
        }

    def weight(self, tensors: Mapping[str, Tensor]) -> BlockSparse:
        columns = tensors["col_indices"].to(INDEX_DTYPE)
        return BlockSparse(tensors["crow_indices"], columns, tensors["values"], self.shape, tensors.get("scales"))

    def empty_layer(self, dtype: torch.dtype) -> SparseLinear:
        sizes = (self.shape[1], self.shape[0], self.block, self.nnz_blocks)
        return SparseLinear(*sizes, self.bias, self.activation, self.int8, device="meta", dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class NMEntry(LayerEntry):
    layer = NMLinear

    pattern: tuple[int, int]

    @property
    def content(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        n, m = self.pattern
        stored = (self.shape[0], self.shape[1] // m * n)
        return {"values": (stored, self.value_dtype), "indices": (stored, NM_INDEX_DTYPE)}

    def weight(self, tensors: Mapping[str, Tensor]) -> NM:
        return NM(tensors["values"], tensors["indices"], self.shape, self.pattern, tensors.get("scales"))

    def empty_layer(self, dtype: torch.dtype) -> NMLinear:
        sizes = (self.shape[1], self.shape[0], self.pattern)
        return NMLinear(*sizes, self.bias, self.activation, self.int8, device="meta", dtype=dtype)


def describe(name: str, layer: CompressedLinear, state: dict[str, Tensor]) -> dict[str, Any]:
    """The entry of a layer for config.json, of its tensors in `state`, which get their dtypes on disk.

    Raises ValueError where they describe no layer of this shape.
    """
    values, bias = state[f"{name}.values"], state.get(f"{name}.bias")
    int8 = values.dtype == torch.int8
    own = bias if int8 else values
    common: dict[str, Any] = {
        "shape": (layer.out_features, layer.in_features),
        "bias": bias is not None,
        "activation": layer.activation,
        "dtype": "float32" if own is None else str(own.dtype).removeprefix("torch."),
        "crc32": 0,
        "int8": int8,
        "input_scale": layer.input_scale,
    }
    entry: LayerEntry
    if isinstance(layer, NMLinear):
        entry = NMEntry(**common, pattern=layer.pattern)
    elif values.dim() == 3:
        entry = BlockEntry(**common, block=(values.shape[1], values.shape[2]), nnz_blocks=values.shape[0])
    else:
        raise ValueError(f"save_pretrained: {name}: expected values (nnzb, n, k), got {tuple(values.shape)}")
    for part, (_, dtype) in entry.content.items():
        state[f"{name}.{part}"] = state[f"{name}.{part}"].to(dtype)
    state[f"{name}.{PLACEHOLDER}"] = torch.empty(1, dtype=DTYPES[entry.dtype])[:0]  # with an address of its own
    _check_written(name, entry, state)
    written = {key: value for key, value in asdict(entry).items() if int8 or key not in INT8_FIELDS}
    written |= {key: [*written[key]] for key in PAIRS if key in written}
    return {**written, "crc32": crc32_of(state[full] for full in entry.tensor_names(name))}


def _check_written(name: str, entry: LayerEntry, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError for what could not be loaded again."""
    tensors = {part: state[f"{name}.{part}"] for part in entry.tensors}
    for part, wanted in entry.tensors.items():
        if (got := (tuple(tensors[part].shape), tensors[part].dtype)) != wanted:
            raise ValueError(f"save_pretrained: {name}: expected {part} of {wanted}, got {got}")
    try:
        entry.weight(tensors).validate()
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_pretrained: {name}: {error}") from None


def parse_entry(name: Any, entry: Any, where: str) -> LayerEntry:
    """The entry of a layer, or CheckpointError; `where` begins the message."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise CheckpointError(f"{where}: expected a module name like encoder.0.fc1, got {name!r}")
    kind = NMEntry if isinstance(entry, Mapping) and "pattern" in entry else BlockEntry
    names = {field.name for field in fields(kind)} - set(INT8_FIELDS)
    if isinstance(entry, Mapping) and "int8" in entry:
        names |= set(INT8_FIELDS)
    if not isinstance(entry, Mapping) or entry.keys() != names:
        raise CheckpointError(f"{where}: {name}: expected the fields {sorted(names)}, got {entry!r:.200}")
    checks = {
        "block": lambda v: _is_pair(v) and min(v) >= 1,
        "pattern": lambda v: _is_pair(v) and 0 < v[0] <= v[1] <= 256,
        "shape": _is_pair,
        "nnz_blocks": is_count,
        "bias": lambda v: isinstance(v, bool),
        "activation": lambda v: isinstance(v, str) and v in ACTIVATIONS,
        "dtype": lambda v: isinstance(v, str) and v in DTYPES,
        "crc32": is_count,
        "int8": lambda v: v is True,
        "input_scale": lambda v: v is None or (type(v) in (int, float) and 0 < v < math.inf),
    }
    for field, valid in checks.items():
        if field in entry and not valid(entry[field]):
            raise CheckpointError(f"{where}: {name}: expected a valid {field}, got {entry[field]!r:.200}")
    read: dict[str, Any] = {key: tuple(value) if key in PAIRS else value for key, value in entry.items()}
    return kind(**read)


def check_layer(name: str, entry: LayerEntry, files: TensorFiles) -> None:
    """Raise CheckpointError unless the files have the tensors of a layer, of the right sizes; nothing is read."""
    for part, wanted in entry.tensors.items():
        if (got := files.stored(f"{name}.{part}").kind) != wanted:
            raise CheckpointError(f"{files.where}: {name}: expected {part} of {wanted}, got {got}")


def read_layer(name: str, entry: LayerEntry, files: TensorFiles) -> LayerTensors:
    """The checked tensors of a layer, or CheckpointError naming file and layer."""
    check_layer(name, entry, files)
    tensors = {part: files.read(f"{name}.{part}") for part in entry.tensors}
    weight = entry.weight(tensors)
    try:
        weight.validate()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{files.where}: {name}: {error}") from None
    if (crc32 := crc32_of(tensors.values())) != entry.crc32:
        raise CheckpointError(f"{files.where}: {name}: expected crc32 {entry.crc32}, got {crc32}; the data is corrupt")
    return LayerTensors(weight, tensors.get("bias"))


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(is_count, value))
