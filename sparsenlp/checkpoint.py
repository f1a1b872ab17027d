"""Checkpoints of sparsified models: model.safetensors + config.json, checked in full before a kernel sees them.

Format version 1. config.json holds, under `quantization_config`, quant_method "sparsenlp",
format_version, and `modules`: for every sparse linear layer

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

`crc32` runs over the bytes of these tensors in this order. All other tensors are stored as they are.

A model with fused encoders has `fused_encoders` beside `modules`: {name: {precision, tile}}, which are fused
again when they are loaded on a CPU; one whose decoder runs as one op has `fused_decoder`: true.

A transformers model whose layers have lost heads or neurons in a way that its configuration cannot express has
`structure`: {"heads": numbers, "neurons": numbers}, each if needed, a number for every layer (see models.structure).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from .layer_entries import NAME, BlockEntry, CheckpointError, LayerEntry, describe, is_count, parse_entry, read_layer
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

METHOD = "sparsenlp"
FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
STRUCTURE_FIELDS = ("heads", "neurons")


def save_pretrained(model: nn.Module, directory: str | os.PathLike, tokenizer: Any = None) -> Path:
    """Write a checkpoint of a sparsified (or dense) model; a transformers model gets its usual directory.

    Everything is written beside `directory` and flushed to disk first, and only then moved there: a
    new directory appears complete or not at all, and in an existing one the files of the same names are
    replaced, others stay. On an error (a full disk) nothing is changed and nothing is left behind.

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
    with _staged(target) as staging:
        if is_transformers_model(model):
            from .models.hf import save

            save(model, staging)
        else:
            state, description = to_disk(model)
            save_file(state, staging / WEIGHTS_FILE, metadata={"format": "pt"})
            config = {"architectures": [type(model).__name__], "quantization_config": description}
            (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
    return target


def from_pretrained(
    directory: str | os.PathLike, model: nn.Module | None = None, model_class: type | None = None, **kwargs: Any
) -> nn.Module:
    """Load what `save_pretrained` wrote. No code is taken from the files, and nothing is unpickled.

    model         a dense skeleton with the same structure, for a plain module: its nn.Linear and recurrent layers
                  are replaced as the file says, its other tensors filled. It is changed only after all checks.
    model_class   for a transformers model: the class to build, by default the one config.json names
    kwargs        passed on to the transformers class's from_pretrained
    returns       the filled `model` itself, or a new transformers model in eval mode

    Raises CheckpointError for anything wrong with the files, ValueError if `model` is missing for a plain
    checkpoint or is on the meta device.
    """
    path = Path(directory)
    config = read_config(path)
    dense = "model_type" in config and "quantization_config" not in config
    entries = {} if dense else parse_description(config.get("quantization_config"), str(path / CONFIG_FILE))
    if model is not None:
        fused = parse_fused(config.get("quantization_config") or {}, str(path / CONFIG_FILE))
        fuse_again_(_fill(model, path / WEIGHTS_FILE, entries), fused)
        return model
    if "model_type" not in config:
        raise ValueError(f"from_pretrained: expected model=<dense skeleton> for {path}, a plain module, got None")
    from .models.hf import load

    return load(path, config, model_class, **kwargs)


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
    description = {"quant_method": METHOD, "format_version": FORMAT_VERSION, "modules": entries}
    optional = {
        "fused_encoders": fused_options(model),
        "fused_decoder": has_fused_decoder(model),
        "structure": structure_of(model),
    }
    return written, {**description, **{field: value for field, value in optional.items() if value}}


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


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as a dict, or CheckpointError."""
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a readable JSON file, got {type(error).__name__}: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def parse_description(description: Any, where: str = CONFIG_FILE) -> dict[str, LayerEntry]:
    """{layer name: entry} from a `quantization_config` block, or CheckpointError; `where` begins the message."""
    if not isinstance(description, Mapping) or description.get("quant_method") != METHOD:
        raise CheckpointError(f"{where}: expected quantization_config with quant_method {METHOD!r}, got none")
    version, modules = description.get("format_version"), description.get("modules")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(f"{where}: expected format_version {FORMAT_VERSION}, got {version!r}")
    if not isinstance(modules, Mapping):
        raise CheckpointError(f"{where}: expected modules to be an object, got {type(modules).__name__}")
    return {name: parse_entry(name, entry, where) for name, entry in modules.items()}


def parse_fused(description: Any, where: str = CONFIG_FILE) -> dict[str, FusionOptions]:
    """`fused_encoders` of a `quantization_config` block, {} if it has none, or CheckpointError."""
    if type(description.get("fused_decoder", True)) is not bool:
        raise CheckpointError(
            f"{where}: expected fused_decoder to be a bool, got {description['fused_decoder']!r:.200}"
        )
    fused = description.get("fused_encoders", {})
    if not isinstance(fused, Mapping):
        raise CheckpointError(f"{where}: expected fused_encoders to be an object, got {type(fused).__name__}")
    for name, options in fused.items():
        valid = isinstance(name, str) and NAME.fullmatch(name) and isinstance(options, Mapping)
        if not valid or options.keys() != {"precision", "tile"}:
            raise CheckpointError(
                f"{where}: expected precision and tile of fused encoder {name!r}, got {options!r:.200}"
            )
        if options["precision"] not in (None, *FUSED_PRECISIONS) or options["tile"] not in (None, *TILES):
            raise CheckpointError(f"{where}: expected a valid precision and tile of {name}, got {options!r:.200}")
    return {name: dict(options) for name, options in fused.items()}


def parse_structure(description: Any, where: str = CONFIG_FILE) -> dict[str, list[int]]:
    """`structure` of a `quantization_config` block, {} if it has none, or CheckpointError."""
    structure = description.get("structure", {})
    if not isinstance(structure, Mapping) or not structure.keys() <= set(STRUCTURE_FIELDS):
        raise CheckpointError(
            f"{where}: expected structure with {' and '.join(STRUCTURE_FIELDS)}, got {structure!r:.200}"
        )
    for field, numbers in structure.items():
        if not isinstance(numbers, list | tuple) or not all(is_count(n) and n for n in numbers):
            raise CheckpointError(f"{where}: expected {field} as a list of positive numbers, got {numbers!r:.200}")
    return {field: [*numbers] for field, numbers in structure.items()}


def read_layers(files: Iterable[str | os.PathLike], entries: Mapping[str, LayerEntry]) -> dict[str, Any]:
    """The checked weights of all sparse layers, or CheckpointError naming file and layer."""
    with open_tensors(files) as tensors:
        return {name: read_layer(name, entry, tensors) for name, entry in entries.items()}


class TensorFiles:
    """The tensors of some open safetensors files, read one at a time."""

    def __init__(self, handles: Mapping[str, Any]) -> None:
        self.where = ", ".join(handles)
        self._handles = {name: handle for handle in handles.values() for name in handle.keys()}  # noqa: SIM118

    def names(self) -> set[str]:
        return set(self._handles)

    def read(self, name: str) -> Tensor:
        """Raises CheckpointError if there is no such tensor."""
        if name not in self._handles:
            raise CheckpointError(f"{self.where}: expected a tensor {name}, got none")
        return self._handles[name].get_tensor(name)


@contextmanager
def open_tensors(files: Iterable[str | os.PathLike]) -> Iterator[TensorFiles]:
    """Open safetensors files; CheckpointError for one that is missing, truncated, corrupt or of another kind."""
    with ExitStack() as stack:
        handles = {}
        for file in map(Path, files):
            if file.suffix != ".safetensors":
                raise CheckpointError(f"{file}: expected a .safetensors file; pickled weights are never loaded")
            try:
                handles[str(file)] = stack.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: expected a safetensors file, got {error}") from None
        yield TensorFiles(handles)


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


def _fill(model: nn.Module, file: Path, entries: Mapping[str, LayerEntry]) -> nn.Module:
    """Load a plain checkpoint into a skeleton, which stays as it is if a check fails."""
    twins = split_composites_(model, composites_of(entries))
    try:
        check_composites(model, entries, str(file))
        return _fill_split(model, file, entries)
    except BaseException:
        replace_modules(model, {twin: module for module, twin in twins.items()})
        raise


def _fill_split(model: nn.Module, file: Path, entries: Mapping[str, LayerEntry]) -> nn.Module:
    """All checks come before the first change."""
    state = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    if meta := next((name for name, tensor in state.items() if tensor.is_meta), None):
        raise ValueError(f"from_pretrained: expected a skeleton with memory (model.to_empty), got {meta} on meta")
    modules = dict(model.named_modules(remove_duplicate=False))
    if missing := next((name for name in entries if name not in modules), None):
        raise CheckpointError(f"{file}: expected only layers of the model, got {missing}")
    linears = {name: linear_for(model, name, entry, str(file)) for name, entry in entries.items()}
    replaced = {id(linear) for linear in linears.values()}
    inside = {f"{name}.{part}" for name, m in modules.items() if id(m) in replaced for part in ("weight", "bias")}
    dense = {name: tensor for name, tensor in state.items() if name not in inside}
    with open_tensors([file]) as tensors:
        weights = {name: read_layer(name, entry, tensors) for name, entry in entries.items()}
        biases = {name: tensors.read(f"{name}.bias") for name, entry in entries.items() if entry.bias}
        sparse_names = {full for name, entry in entries.items() for full in entry.tensor_names(name)}
        values = _read_dense(dense, tensors, sparse_names)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, linear in linears.items():
        layer = entries[name].layer.from_weight(weights[name], biases.get(name), entries[name].activation)
        layer.input_scale = entries[name].input_scale
        layer.requires_grad_(linear.weight.requires_grad and not entries[name].int8)
        replacements[linear] = layer.train(linear.training)
    replace_modules(model, replacements)
    with torch.no_grad():
        for name, value in values.items():
            dense[name].copy_(value)
    watch_incoming_(model)
    return model


def _read_dense(expected: Mapping[str, Tensor], files: TensorFiles, sparse_names: set[str]) -> dict[str, Tensor]:
    """{name: value} for the tensors of a skeleton; a tied one may be in the file under any of its names."""
    stored = files.names() - sparse_names
    if unknown := sorted(stored - expected.keys()):
        raise CheckpointError(f"{files.where}: expected only tensors of the model, got {unknown[0]}")
    found = {id(expected[name]) for name in stored}
    if missing := next((name for name, tensor in expected.items() if id(tensor) not in found), None):
        raise CheckpointError(f"{files.where}: expected a tensor {missing}, got none")
    values = {name: files.read(name) for name in stored}
    for name, value in values.items():
        wanted, got = ((tuple(t.shape), t.dtype) for t in (expected[name], value))
        if wanted != got:
            raise CheckpointError(f"{files.where}: expected {name} of {wanted}, got {got}")
    return values


@contextmanager
def _staged(directory: Path) -> Iterator[Path]:
    """A scratch directory whose files reach `directory` when the block ends well, and vanish when it does not."""
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"save_pretrained: expected a directory, got a file: {directory}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as scratch:
        staging = Path(scratch, "new")
        staging.mkdir()
        try:
            yield staging
        except SafetensorError as error:
            raise OSError(f"save_pretrained: cannot write {directory}: {error}") from None
        files = [path for path in staging.rglob("*") if path.is_file()]
        for path in files:
            if (staging / CONFIG_FILE).exists():
                shutil.copymode(staging / CONFIG_FILE, path)  # safetensors leaves its files readable by the owner only
            _flush(path)
        if not directory.exists():
            staging.rename(directory)
        else:
            for path in files:
                target = directory / path.relative_to(staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
        if os.name == "posix":
            _flush(directory)
            _flush(directory.parent)


def _flush(path: Path) -> None:
    """fsync a file, or on POSIX a directory."""
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
