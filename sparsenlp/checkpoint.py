"""Checkpoints of sparsified models: model.safetensors + config.json, checked in full before a kernel sees them.

Format version 2. config.json holds, under `quantization_config`, quant_method "sparsenlp", format_version, `modules`,
`tensors` and crc32. `modules` has for every sparse linear layer

    shape [N, K], bias (bool), activation, dtype, crc32
    block [n, k] and nnz_blocks of a SparseLinear, pattern [n, m] of an NMLinear
    for int8 weights also int8 (true) and input_scale (number or null)

and model.safetensors holds for each of them

    <name>.values        (nnz_blocks, n, k)  dtype, or int8   canonical BSR: each block row-major
    <name>.crow_indices  (N / n + 1,)        int32
    <name>.col_indices   (nnz_blocks,)       int16 where K / k <= 32768, else int32
    or, of an NMLinear,
    <name>.values        (N, K / m * n)      dtype, or int8
    <name>.indices       (N, K / m * n)      uint8

    <name>.scales        (N,)                float32  where `int8` is true
    <name>.bias          (N,)                dtype   where `bias` is true
    <name>.weight        (0,)                dtype

The last one holds the place of the dense weight: loading such a file into a dense layer gives a mismatch of shapes, and
not a layer that keeps its random weights. For transformers without this package config.json also has a `fusion_config`,
which it refuses with an error that says what to import.

The matrices of a sparse recurrent layer "rnn" are such layers, "rnn.ih_l0", "rnn.hh_l0" and so on (see
layers.recurrent): all of them, of one dtype, without activation or input_scale. That of a sparse nn.Conv1d "conv" is
"conv.filters".

A layer's crc32 runs over the bytes of these tensors in this order. `tensors` has {name: crc32} for all other tensors,
which are stored as they are; there the checksum runs over dtype, shape and bytes. A tensor with several names may be in
the file under one of them. The crc32 beside them is that of the description itself, without this field (see `seal`).

A model with fused encoders has `fused_encoders` beside `modules`: {name: {precision, tile}}, which are fused
again when they are loaded on a CPU; one whose decoder runs as one op has `fused_decoder`: true.

A transformers model whose layers have lost heads or neurons in a way that its configuration cannot express has
`structure`: {"heads": numbers, "neurons": numbers}, each if needed, a number for every layer (see models.structure).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from .layer_entries import (
    NAME,
    BlockEntry,
    LayerEntry,
    check_layer,
    describe,
    is_count,
    parse_entry,
    read_layer,
)
from .layers.adapters import has_adapters
from .layers.composite import Twin, replace_modules, split_composites_
from .layers.compressed_linear import CompressedLinear
from .layers.encoder import FUSED_PRECISIONS
from .layers.incoming import watch_incoming_
from .layers.recurrent import SparseRecurrent
from .models import has_fused_decoder, is_transformers_model
from .models.encoders import FusionOptions, fuse_again_, fused_options
from .models.structure import structure_of
from .ops.encoder_layer import TILES
from .report import torch_pruned
from .staging import replacing
from .tensor_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    OpenCheckpoint,
    TensorFiles,
    checksum,
    memory_of,
    open_checkpoint,
)

METHOD = "sparsenlp"
FORMAT_VERSION = 2
STRUCTURE_FIELDS = ("heads", "neurons")
FIELDS = {
    *("quant_method", "format_version", "modules", "tensors", "crc32"),
    *("fused_encoders", "fused_decoder", "structure"),
}
ATTEMPTS = 20
"""At loading a checkpoint that is replaced again and again meanwhile."""


def save_pretrained(model: nn.Module, directory: str | os.PathLike, tokenizer: Any = None) -> Path:
    """Write a checkpoint of a sparsified (or dense) model; a transformers model gets its usual directory.

    Everything is written beside `directory`, flushed to disk and then put in its place as a whole (see `staging`): who
    reads it meanwhile has the old checkpoint or the new one, and so has a process that is killed. Other files of an
    existing directory, as a tokenizer's, stay. On an error (a full disk) nothing is changed and nothing is left behind.

    tokenizer   saved along by its own save_pretrained
    returns     the directory

    Raises ValueError if a layer still carries a pruning mask, one is still split into its matrices, an adapter sits
    in a transformers model, or the state holds something other than tensors, NotADirectoryError if `directory` is a
    file, OSError if it cannot be written.
    """
    check_unmasked(model)
    if is_transformers_model(model) and has_adapters(model):
        raise ValueError(
            f"save_pretrained: expected a {type(model).__name__} without adapters, got one; save the adapter by peft, "
            "merge it (merge_and_unload) or take it off (unload)"
        )
    target = Path(directory).resolve()
    with replacing(target) as staging:
        try:
            _write(model, staging)
        except SafetensorError as error:
            raise OSError(f"save_pretrained: cannot write {target}: {error}") from None
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
    return target


def _write(model: nn.Module, staging: Path) -> None:
    if is_transformers_model(model):
        from .models.hf import save

        save(model, staging)
        return
    state, description = to_disk(model)
    save_file(state, staging / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {"architectures": [type(model).__name__], "quantization_config": description}
    (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def from_pretrained(
    directory: str | os.PathLike, model: nn.Module | None = None, model_class: type | None = None, **kwargs: Any
) -> nn.Module:
    """Load what `save_pretrained` wrote. No code is taken from the files, and nothing is unpickled.

    The loaded tensors have memory of their own: what becomes of the files later does not matter. Files that are
    replaced by `save_pretrained` meanwhile are read as they were before or as they are after.

    model         a dense skeleton with the same structure, for a plain module: its nn.Linear and recurrent layers
                  are replaced as the file says, its other tensors filled. It is changed only after all checks.
    model_class   for a transformers model: the class to build, by default the one config.json names
    kwargs        passed on to the transformers class's from_pretrained
    returns       the filled `model` itself, or a new transformers model in eval mode

    Raises CheckpointError for anything wrong with the files, ValueError if `model` is missing for a plain
    checkpoint or is on the meta device.
    """
    path = Path(directory)
    for left in reversed(range(ATTEMPTS)):
        with open_checkpoint(path) as checkpoint:
            try:
                return _load(checkpoint, model, model_class, **kwargs)
            except CheckpointError:
                if not left or not checkpoint.was_replaced():
                    raise
    raise AssertionError("unreachable")


def _load(checkpoint: OpenCheckpoint, model: nn.Module | None, model_class: type | None, **kwargs: Any) -> nn.Module:
    config, where = checkpoint.config, str(checkpoint.path / CONFIG_FILE)
    dense = "model_type" in config and "quantization_config" not in config
    description = Description() if dense else parse_description(config.get("quantization_config"), where)
    if model is not None:
        with checkpoint.weights() as tensors:
            filled = _fill(model, tensors, description)
        fuse_again_(filled, description.fused)
        return filled
    if "model_type" not in config:
        expected = "expected model=<dense skeleton>"
        raise ValueError(f"from_pretrained: {expected} for {checkpoint.path}, a plain module, got None")
    from .models.hf import load

    return load(checkpoint, model_class, **kwargs)


def to_disk(
    model: nn.Module, keep_tied: bool = False, state: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict in canonical form, the description for config.json), of the model or of this state of it.

    A tensor under several names is kept once, under the first, unless `keep_tied`. An empty state is that of a process
    which has no part of the model: no layer is described.

    Raises ValueError if a layer carries a mask, the state holds something other than tensors or lacks one of a sparse
    layer, those describe no layer of the model, or the name of a sparse layer has characters other than letters,
    digits, "_", "-" and dots between.
    """
    check_unmasked(model)
    source = model.state_dict(keep_vars=True) if state is None else state
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CompressedLinear)}
    for name in layers:
        if not NAME.fullmatch(name):
            raise ValueError(f"save_pretrained: expected a module name like encoder.0.fc1, got {name!r}")
        part = next((p for p in layers[name].state_dict() if f"{name}.{p}" not in source), "")
        if source and part:
            raise ValueError(
                f"save_pretrained: expected all tensors of sparse layers in the state, got no {name}.{part}"
            )
    written: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in source.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"save_pretrained: expected tensors only in the state, got {type(tensor).__name__} {name}")
        if keep_tied or id(tensor) not in seen:
            seen.add(id(tensor))
            written[name] = tensor.detach().cpu().contiguous()
    entries = {name: describe(name, layer, written) for name, layer in layers.items()} if source else {}
    checksums = {
        name: checksum(tensor.dtype, tensor.shape, memory_of(tensor))
        for name, tensor in written.items()
        if name.rpartition(".")[0] not in layers
    }
    description = {"quant_method": METHOD, "format_version": FORMAT_VERSION, "modules": entries, "tensors": checksums}
    optional = {
        "fused_encoders": fused_options(model),
        "fused_decoder": has_fused_decoder(model),
        "structure": structure_of(model),
    }
    description |= {name: value for name, value in optional.items() if value}
    return written, {**description, "crc32": seal(description)}


def check_unmasked(model: nn.Module) -> None:
    """Raise ValueError if a tensor of `model` is computed from a mask, or a layer is split into its matrices.

    torch's own parametrizations, such as a weight norm, are part of the model and stay.
    """
    for name, module in model.named_modules():
        chains = module.parametrizations.values() if parametrize.is_parametrized(module) else ()
        unknown = [part for chain in chains for part in chain if type(part).__module__ != parametrizations.__name__]
        if unknown or torch_pruned(module):
            raise ValueError(
                f"save_pretrained: expected masks burned in (finalize_), got a mask on {name or type(model).__name__}"
            )
        if isinstance(module, Twin) and any(isinstance(m, nn.Linear) for m in module.children()):
            raise ValueError(f"save_pretrained: expected masks burned in (finalize_), got {name} split for pruning")


@dataclass(frozen=True)
class Description:
    """A `quantization_config` block, parsed and plausible in itself.

    layers     {name: entry} of the sparse linear layers
    tensors    {name: crc32} of all other tensors
    fused      {name: options} of the fused encoders
    structure  {"heads" or "neurons": a number for each layer}
    """

    layers: Mapping[str, LayerEntry] = field(default_factory=dict)
    tensors: Mapping[str, int] = field(default_factory=dict)
    fused: Mapping[str, FusionOptions] = field(default_factory=dict)
    fused_decoder: bool = False
    structure: Mapping[str, list[int]] = field(default_factory=dict)

    def sparse_names(self) -> set[str]:
        """The tensors of all sparse layers."""
        return {full for name, entry in self.layers.items() for full in entry.tensor_names(name)}

    def check_names(self, files: TensorFiles) -> None:
        """Raise CheckpointError unless the files have every tensor that is described, and no other."""
        stored, sparse = files.names(), self.sparse_names()
        if missing := sorted(sparse - stored):
            raise CheckpointError(f"{files.where}: expected a tensor {missing[0]}, got none")
        if unknown := sorted(stored - sparse - self.tensors.keys()):
            raise CheckpointError(f"{files.where}: expected only tensors of the model, got {unknown[0]!r}")
        kept = {self.tensors[name] for name in stored - sparse}
        if missing := sorted(name for name in self.tensors if name not in stored and self.tensors[name] not in kept):
            raise CheckpointError(f"{files.where}: expected a tensor {missing[0]}, got none")


def parse_description(description: Any, where: str = CONFIG_FILE) -> Description:
    """What a `quantization_config` block says, or CheckpointError; `where` begins the message."""
    if not isinstance(description, Mapping) or description.get("quant_method") != METHOD:
        raise CheckpointError(f"{where}: expected quantization_config with quant_method {METHOD!r}, got none")
    version = description.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        remedy = "; convert and save the model again" if version == 1 else ""
        raise CheckpointError(f"{where}: expected format_version {FORMAT_VERSION}, got {version!r:.50}{remedy}")
    if unknown := sorted(map(str, description.keys() - FIELDS)):
        raise CheckpointError(f"{where}: expected no other fields in quantization_config, got {unknown!r:.200}")
    if type(description.get("fused_decoder", True)) is not bool:
        raise CheckpointError(
            f"{where}: expected fused_decoder to be a bool, got {description['fused_decoder']!r:.200}"
        )
    modules = _object(description, "modules", where)
    parsed = Description(
        {name: parse_entry(name, entry, where) for name, entry in modules.items()},
        _parse_tensors(_object(description, "tensors", where), modules, where),
        _parse_fused(_object(description, "fused_encoders", where), where),
        description.get("fused_decoder", False),
        _parse_structure(_object(description, "structure", where), where),
    )
    if description.get("crc32") != (crc32 := seal(description)):
        got = description.get("crc32")
        raise CheckpointError(f"{where}: expected crc32 {crc32} of the description, got {got!r:.50}; it is corrupt")
    return parsed


def seal(description: Mapping[str, Any]) -> int:
    """CRC-32 of a description without its own: of its JSON with sorted keys, no spaces and ASCII alone."""
    content = {key: value for key, value in description.items() if key != "crc32"}
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii"))


def _object(description: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    value = description.get(name, {})
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: expected {name} to be an object, got {type(value).__name__}")
    return value


def _parse_tensors(tensors: Mapping[str, Any], modules: Mapping[str, Any], where: str) -> dict[str, int]:
    for name, crc32 in tensors.items():
        if not isinstance(name, str) or not is_count(crc32):
            raise CheckpointError(f"{where}: expected a crc32 of tensor {name!r:.200}, got {crc32!r:.50}")
        if name.rpartition(".")[0] in modules:
            raise CheckpointError(f"{where}: expected no other tensors of a sparse layer, got {name!r:.200}")
    return dict(tensors)


def _parse_fused(fused: Mapping[str, Any], where: str) -> dict[str, FusionOptions]:
    for name, options in fused.items():
        valid = isinstance(name, str) and NAME.fullmatch(name) and isinstance(options, Mapping)
        if not valid or options.keys() != {"precision", "tile"}:
            raise CheckpointError(
                f"{where}: expected precision and tile of fused encoder {name!r}, got {options!r:.200}"
            )
        if options["precision"] not in (None, *FUSED_PRECISIONS) or options["tile"] not in (None, *TILES):
            raise CheckpointError(f"{where}: expected a valid precision and tile of {name}, got {options!r:.200}")
    return {name: dict(options) for name, options in fused.items()}


def _parse_structure(structure: Mapping[str, Any], where: str) -> dict[str, list[int]]:
    if not structure.keys() <= set(STRUCTURE_FIELDS):
        raise CheckpointError(
            f"{where}: expected structure with {' and '.join(STRUCTURE_FIELDS)}, got {structure!r:.200}"
        )
    for name, numbers in structure.items():
        if not isinstance(numbers, list | tuple) or not all(is_count(n) and n for n in numbers):
            raise CheckpointError(f"{where}: expected {name} as a list of positive numbers, got {numbers!r:.200}")
    return {name: [*numbers] for name, numbers in structure.items()}


def composites_of(entries: Iterable[str]) -> set[str]:
    """Names of the layers that would hold these ones."""
    return {name.rpartition(".")[0] for name in entries}


def check_composites(model: nn.Module, entries: Mapping[str, LayerEntry], where: str) -> None:
    """Raise CheckpointError unless the matrices of each recurrent layer, split in `model`, can be sparse together."""
    for name, module in model.named_modules():
        own = [f"{name}.{matrix}" for matrix in module.matrices] if isinstance(module, SparseRecurrent) else []
        found = {matrix: entries[matrix] for matrix in own if matrix in entries}
        if not found:
            continue
        if missing := next((matrix for matrix in own if matrix not in found), None):
            raise CheckpointError(f"{where}: expected all matrices of {name} or none, got none for {missing}")
        first = found[own[0]]
        for matrix, entry in found.items():
            if not isinstance(entry, BlockEntry):
                raise CheckpointError(f"{where}: expected {matrix} in blocks, got a pattern")
            wanted, got = ((e.dtype, e.int8, e.activation, e.input_scale) for e in (first, entry))
            if got != wanted or entry.activation != "none" or entry.input_scale is not None:
                raise CheckpointError(
                    f"{where}: expected {matrix} of dtype {first.dtype} with int8={first.int8} as {own[0]}, without "
                    f"activation and input_scale, got {got}"
                )


def linear_for(model: nn.Module, name: str, entry: LayerEntry, where: str) -> nn.Linear:
    """The nn.Linear of `model` that a sparse layer replaces, or CheckpointError if it does not fit."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise CheckpointError(f"{where}: expected {name} to be an nn.Linear in the model, got {type(module).__name__}")
    if tuple(module.weight.shape) != entry.shape:
        raise CheckpointError(f"{where}: expected {name} of shape {tuple(module.weight.shape)}, got {entry.shape}")
    if (module.bias is not None) != entry.bias:
        raise CheckpointError(f"{where}: expected {name} with bias={module.bias is not None}, got {entry.bias}")
    return module


def _fill(model: nn.Module, files: TensorFiles, description: Description) -> nn.Module:
    """Load a plain checkpoint into a skeleton, which stays as it is if a check fails."""
    twins = split_composites_(model, composites_of(description.layers))
    try:
        check_composites(model, description.layers, files.where)
        return _fill_split(model, files, description)
    except BaseException:
        replace_modules(model, {twin: module for module, twin in twins.items()})
        raise


def _fill_split(model: nn.Module, files: TensorFiles, description: Description) -> nn.Module:
    """All checks come before the first change: first of names and sizes, then of what the tensors hold."""
    state = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    if meta := next((name for name, tensor in state.items() if tensor.is_meta), None):
        raise ValueError(f"from_pretrained: expected a skeleton with memory (model.to_empty), got {meta} on meta")
    modules = dict(model.named_modules(remove_duplicate=False))
    entries = description.layers
    if missing := next((name for name in entries if name not in modules), None):
        raise CheckpointError(f"{files.where}: expected only layers of the model, got {missing}")
    linears = {name: linear_for(model, name, entry, files.where) for name, entry in entries.items()}
    refuse_aliases({name: id(linear) for name, linear in linears.items()}, files.where)
    replaced = {id(linear) for linear in linears.values()}
    inside = {f"{name}.{part}" for name, m in modules.items() if id(m) in replaced for part in ("weight", "bias")}
    dense = {name: tensor for name, tensor in state.items() if name not in inside}
    names = _check_dense(dense, files, description)
    weights = {name: read_layer(name, entry, files) for name, entry in entries.items()}
    for name in names:
        files.read_checked(name, description.tensors[name])
    replacements: dict[nn.Module, nn.Module] = {}
    for name, linear in linears.items():
        layer = entries[name].new_layer(weights[name])
        layer.requires_grad_(linear.weight.requires_grad and not entries[name].int8)
        replacements[linear] = layer.train(linear.training)
    replace_modules(model, replacements)
    with torch.no_grad():
        for name in names:  # read once more: one at a time, the values need no memory beside the model's
            dense[name].copy_(files.read_checked(name, description.tensors[name]))
    watch_incoming_(model)
    return model


def refuse_aliases(targets: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError if two names stand for one target."""
    names: dict[Any, str] = {}
    for name, target in targets.items():
        if (first := names.setdefault(target, name)) != name:
            raise CheckpointError(
                f"{where}: expected one name for each part of the model, got {first} and {name} for one"
            )


def _check_dense(expected: Mapping[str, Tensor], files: TensorFiles, description: Description) -> list[str]:
    """The names to read for the tensors of a skeleton; a tied one may be in the file under any of its names."""
    for name, entry in description.layers.items():
        check_layer(name, entry, files)
    stored = sorted(files.names() - description.sparse_names())
    if unknown := next((name for name in stored if name not in expected), None):
        raise CheckpointError(f"{files.where}: expected only tensors of the model, got {unknown!r}")
    refuse_aliases({name: id(expected[name]) for name in stored}, files.where)
    found = {id(expected[name]) for name in stored}
    if missing := next((name for name, tensor in expected.items() if id(tensor) not in found), None):
        raise CheckpointError(f"{files.where}: expected a tensor {missing}, got none")
    for name in stored:
        wanted, got = (tuple(expected[name].shape), expected[name].dtype), files.stored(name).kind
        if wanted != got:
            raise CheckpointError(f"{files.where}: expected {name} of {wanted}, got {got}")
    description.check_names(files)
    return stored
