"""transformers: our checkpoints as a quantization method, so that plain from_pretrained and save_pretrained work.

Importing this file registers it. It is imported while transformers itself is still being imported, so
at module level it may only use what transformers.quantizers.auto uses.
"""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import (
    FIELDS,
    FORMAT_VERSION,
    METHOD,
    Description,
    check_composites,
    composites_of,
    linear_for,
    parse_description,
    refuse_aliases,
    to_disk,
)
from ..layer_entries import LayerEntry, LayerTensors, check_layer, read_layer
from ..layers import NMLinear
from ..layers.adapters import has_adapters
from ..layers.composite import join_composites_, replace_modules, split_composites_
from ..layers.compressed_linear import CompressedLinear
from ..layers.incoming import watch_incoming_
from ..ops.nm_linear import pack
from ..private_copies import PrivateCopies, own_
from ..prune.masked import BESIDE_WEIGHTS
from ..tensor_files import CONFIG_FILE, WEIGHTS_FILE, CheckpointError, OpenCheckpoint, TensorFiles, open_tensors
from . import is_transformers_model
from .block_sparse_attention import restore_
from .encoders import fuse_again_
from .hf_saving import allow_loading, attach, describe_in_config, strip_config
from .own import own_class
from .structure import restructure_, structure_of

LARGEST_COUNTS = {"layers": 10_000, "num_labels": 10_000_000}
"""What config.json may ask for at most, by a part of the field's name: more would be built for hours, or not at all."""

MEMORY_FOR_ALL, MEMORY_PER_BYTE = 2**30, 16
"""Bytes that a model may need whatever its files hold, and for each byte of them."""

LOADING_ARGUMENTS = ("dtype", "torch_dtype", "quantization_config", "attn_implementation", "experts_implementation")
"""Arguments of from_pretrained that look like fields of a configuration."""

_opened: ContextVar[OpenCheckpoint | None] = ContextVar("_opened", default=None)
"""The files that `load` has opened; transformers passes on their paths alone."""


@register_quantization_config(METHOD)
class SparseNlpConfig(QuantizationConfigMixin):
    """The `quantization_config` block of config.json, which is checked when a model is loaded."""

    def __init__(self, quant_method: str = METHOD, **description: Any) -> None:
        """Raises CheckpointError for fields that it does not have."""
        if unknown := sorted(description.keys() - FIELDS):
            raise CheckpointError(f"{CONFIG_FILE}: expected no other fields in quantization_config, got {unknown}")
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers compares it with plain strings
        for name, value in {"format_version": FORMAT_VERSION, "modules": {}, **description}.items():
            setattr(self, name, value)


@register_quantizer(METHOD)
class SparseNlpQuantizer(HfQuantizer):
    """Checks the files, lets transformers load copies that nobody else can change, and puts in what was checked."""

    quantization_config: SparseNlpConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state_to_save: dict[str, Tensor] | None = None
        self._description = Description()
        self._layers: dict[Any, LayerTensors] = {}
        self._copies: PrivateCopies | None = None
        self._names: dict[Any, str] = {}
        self._renamings: dict[int, Any] = {}
        self._where = METHOD
        self._dense = False

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, device_map: Any = None, **_: Any
    ) -> nn.Module:
        """Check the files in full, then replace layers; the model is on the meta device."""
        if not checkpoint_files:
            raise CheckpointError(f"{METHOD}: expected checkpoint files to check, got a state dict")
        config_file = str(Path(checkpoint_files[0]).parent / CONFIG_FILE)
        self._description = description = parse_description(self.quantization_config.to_dict(), config_file)
        self._where = where = ", ".join(checkpoint_files)
        with _open(checkpoint_files) as files:
            self._dense = _holds_dense_weights(model, files, description.layers)
        if self._dense:
            warnings.warn(
                f"{where}: {CONFIG_FILE} describes sparse layers, but all weights are dense, as of a model built "
                "from a sparse one's configuration. They are loaded as they are; save the model again to end this",
                stacklevel=2,
            )
            return model
        try:
            restructure_(model, description.structure)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from None
        with _open(checkpoint_files) as files:
            description.check_names(files)
            self._replace_layers(model, files)
            _check_memory(model, files)
            layers = {name: read_layer(name, entry, files) for name, entry in description.layers.items()}
            self._layers = {layer: layers[name] for layer, name in self._names.items()}
            self._copies = PrivateCopies(files, description.tensors, description.sparse_names())
        if not (isinstance(device_map, dict) and "disk" in device_map.values()):  # from there they are read much later
            checkpoint_files[:] = self._copies.paths
        return model

    def _replace_layers(self, model: nn.Module, files: TensorFiles) -> None:
        entries = self._description.layers
        parents = (_local_name(model, name) for name in composites_of(entries))
        split_composites_(model, {name for name in parents if name is not None})
        local = {name: target for name in entries if (target := _local_name(model, name)) is not None}
        if entries and not local:
            raise CheckpointError(
                f"{files.where}: expected layers of {type(model).__name__}, got {next(iter(entries))}"
            )
        refuse_aliases(local, files.where)
        check_composites(model, {target: entries[name] for name, target in local.items()}, files.where)
        _replace_conv1d(model, [*local.values()])
        replacements: dict[nn.Module, nn.Module] = {}
        for name, target in local.items():  # others belong to a head that this class does not have
            check_layer(name, entries[name], files)
            linear = linear_for(model, target, entries[name], files.where)
            layer = entries[name].empty_layer(linear.weight.dtype)
            layer.input_scale = entries[name].input_scale
            self._names[layer] = name
            replacements[linear] = layer
        refuse_aliases({name: id(model.get_submodule(target)) for name, target in local.items()}, files.where)
        replace_modules(model, replacements)
        _ignore_placeholders(model, {*entries, *(target for target in local.values() if target is not None)})
        for dense, sparse in replacements.items():
            _show_dense_weight(sparse, dense)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """transformers asks for each tensor that it will load; a renaming that comes twice would be loaded twice."""
        if not getattr(converter, "operations", None):
            if id(converter) in self._renamings:
                raise CheckpointError(
                    f"{self._where}: expected one tensor for each part of the model, "
                    f"got {converter.source_patterns[0]} and another for {converter.target_patterns[0]}"
                )
            self._renamings[id(converter)] = converter
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> nn.Module:
        model.is_quantized = False  # plain floats: .half(), .to() and training are fine
        vars(model).pop("_keys_to_ignore_on_load_unexpected", None)
        strip_config(model.config)
        if self._dense:
            _own(model)
            model.hf_quantizer = None
            return model
        for layer, tensors in self._layers.items():
            _show_own_weight(layer)
            _put_in(layer, tensors)
        if self._copies is not None:
            self._copies.release_(model)
            self._copies.close()
        self._layers, self._copies, self._names, self._renamings = {}, None, {}, {}
        fused = self._description.fused.items()
        fuse_again_(model, {_local_name(model, name) or name: options for name, options in fused})
        if self._description.fused_decoder:
            _fuse_decoder_again(model)
        watch_incoming_(model)
        attach(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What model.save_pretrained writes; the config, written after this, gets the matching description."""
        if has_adapters(model) and not getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"save_pretrained: expected a {type(model).__name__} without adapters, got one; save the PeftModel"
            )
        state, description = to_disk(model, keep_tied=True, state=self.state_to_save)
        self.quantization_config = SparseNlpConfig(**description)
        describe_in_config(model.config, self.quantization_config)
        model._weight_conversions = []  # transformers would write older names than those in the description
        return state, {}

    def update_attn_implementation(self, config: Any) -> Any:
        """The configuration before a model is built of it, without what stops who does not know of sparse layers."""
        allow_loading(config)
        return config

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        """Dense layers with zeros again, of the class that the model was built with."""
        sparse = [layer for layer in model.modules() if isinstance(layer, CompressedLinear)]
        transposed = _places_of_conv1d(model)
        replace_modules(
            model, {layer: _as_conv1d(layer) if layer in transposed else layer.to_dense() for layer in sparse}
        )
        join_composites_(model)
        if isinstance(dtype, str):  # what saving leaves in the configuration
            dtype = getattr(torch, dtype)
        return model if dtype is None else model.to(dtype)


def save(model: Any, directory: Path) -> None:
    """Weights and config of a transformers model, in one file each; an ordinary directory if no layer needs more."""
    if structure_of(model) or any(isinstance(module, CompressedLinear) for module in model.modules()):
        attach(model)
    model.save_pretrained(directory, max_shard_size="1000GB", save_original_format=False)


def load(checkpoint: OpenCheckpoint, model_class: Any = None, **kwargs: Any) -> nn.Module:
    """Build the class that config.json names (one of transformers' or ours) or `model_class`, and load it.

    Raises CheckpointError where transformers alone would only warn: missing or mismatched tensors, and for the
    class that config.json names (another one may well leave a head out) tensors that the model does not have; the
    masks that transformers' own save_pretrained leaves beside the weights are not needed. What transformers
    does not like about the files is a CheckpointError, too.
    """
    directory = checkpoint.path
    cls = _class_of(directory, checkpoint.config) if model_class is None else model_class
    _check_counts(checkpoint.config, directory / CONFIG_FILE)
    kwargs = {**kwargs, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    before = _opened.set(checkpoint)
    try:
        kwargs = _with_config(cls, checkpoint.config, kwargs)
        model, info = cls.from_pretrained(directory, **kwargs)
    except (CheckpointError, ImportError):
        raise
    except Exception as error:
        reason = (str(error).strip() or "no reason").splitlines()[0]
        raise CheckpointError(
            f"{directory}: expected a checkpoint that transformers loads as {cls.__name__}, "
            f"got {type(error).__name__}: {reason:.300}"
        ) from error
    finally:
        _opened.reset(before)
    info["unexpected_keys"] = {name for name in info["unexpected_keys"] if not BESIDE_WEIGHTS.search(name)}
    for kind in ("missing_keys", "mismatched_keys", *(["unexpected_keys"] if model_class is None else [])):
        if info[kind]:
            raise CheckpointError(f"{directory}: expected the tensors of {cls.__name__}, got {kind} {min(info[kind])}")
    if not isinstance(getattr(model, "hf_quantizer", None), SparseNlpQuantizer):
        _own(model)
    try:
        restore_(model)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: {error}") from None
    return model


def _with_config(cls: Any, config: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with a configuration of what was read before, instead of what is in the file by now."""
    from transformers import CONFIG_MAPPING

    if kwargs.get("config") is not None or "model_type" not in config:
        return dict(kwargs)
    config_class = getattr(cls, "config_class", None) or CONFIG_MAPPING[config["model_type"]]
    content = config_class._decode_special_floats(copy.deepcopy(dict(config)))
    if (key := getattr(config_class, "base_config_key", "")) and key in content:
        content = content[key]
    loading = {name: kwargs[name] for name in LOADING_ARGUMENTS if name in kwargs}
    others = {name: value for name, value in kwargs.items() if name not in loading and name != "config"}
    built, unused = config_class.from_dict(content, return_unused_kwargs=True, **others)
    return {**unused, **loading, "config": built}


def _check_counts(config: Any, where: Path) -> None:
    for name, value in config.items():
        if isinstance(value, dict) and name != "quantization_config":
            _check_counts(value, where)
        for part, most in LARGEST_COUNTS.items():
            if part in name and isinstance(value, int) and value > most:
                raise CheckpointError(f"{where}: expected {name} of at most {most}, got {value}")


def _check_memory(model: nn.Module, files: TensorFiles) -> None:
    """Raise CheckpointError if the model needs far more than its files hold: transformers would allocate it."""
    needed = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    held = sum(file.size for file in files.files)
    if needed > MEMORY_FOR_ALL + MEMORY_PER_BYTE * held:
        raise CheckpointError(
            f"{files.where}: expected about {needed} bytes for {type(model).__name__} of this configuration, got {held}"
        )


@contextmanager
def _open(paths: Sequence[str]) -> Iterator[TensorFiles]:
    """The files that `load` has open, or those at these paths now."""
    opened = _opened.get()
    if opened is not None and opened.has_weights() and [*map(Path, paths)] == [opened.path / WEIGHTS_FILE]:
        with opened.weights() as files:
            yield files
    else:
        with open_tensors(paths) as files:
            yield files


def _put_in(layer: Any, tensors: LayerTensors) -> None:
    """Give a layer the tensors that were checked, in the dtype and on the device that transformers chose."""
    device = layer.values.device
    for part in ("crow_indices", "col_indices", "indices", "scales"):
        if (checked := getattr(tensors.weight, part, None)) is not None:
            setattr(layer, part, checked.to(device))
    layer.values.data = tensors.weight.values.to(device, layer.values.dtype)
    if layer.bias is not None and tensors.bias is not None:
        layer.bias.data = tensors.bias.to(device, layer.bias.dtype)
    if isinstance(layer, NMLinear):
        layer.packed = pack(layer.indices, layer.pattern)


def _own(model: nn.Module) -> None:
    """Give tensors that may be maps of a file memory of their own, one by one."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu":
            own_(model, tensor)


def _class_of(directory: Path, config: Mapping[str, Any]) -> Any:
    import transformers

    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and len(names) == 1 else ""
    cls = own_class(name) or getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise CheckpointError(f"{directory / CONFIG_FILE}: expected a transformers model class, got {names!r}")
    return cls


def _replace_conv1d(model: nn.Module, names: Sequence[str]) -> None:
    """Put an nn.Linear in for each Conv1D among these modules of a model on the meta device."""
    from transformers.pytorch_utils import Conv1D

    linears: dict[nn.Module, nn.Module] = {}
    for name in names:
        module = model.get_submodule(name)
        if type(module) is Conv1D:
            columns, rows = module.weight.shape
            linears[module] = nn.Linear(columns, rows, device="meta", dtype=module.weight.dtype)
    replace_modules(model, linears)


def _holds_dense_weights(model: nn.Module, files: TensorFiles, entries: Mapping[str, LayerEntry]) -> bool:
    """Whether the files hold no sparse layer, but a dense weight for each of these that `model` has.

    Raises CheckpointError where they hold no sparse layer, and lack a dense weight too.
    """
    names = files.names()
    if not entries or any(f"{name}.{part}" in names for name, entry in entries.items() for part in entry.content):
        return False
    known = [name for name in entries if _local_name(model, name) is not None]
    for name in known:
        if not any(f"{candidate}.weight" in names for candidate in _candidates(model, name)):
            part = next(iter(entries[name].content))
            raise CheckpointError(f"{files.where}: expected a tensor {name}.{part}, got none")
    return bool(known)


def _ignore_placeholders(model: Any, names: set[str]) -> None:
    """Let loading pass over the empty `weight` that stands in a file for each of these layers."""
    empty = {rf"(^|\.){re.escape(name)}\.weight$" for name in names}
    vars(model)["_keys_to_ignore_on_load_unexpected"] = {*(model._keys_to_ignore_on_load_unexpected or ()), *empty}


def _show_dense_weight(layer: nn.Module, linear: Any) -> None:
    """Let `layer.weight` be the one of a Linear on the meta device until `_show_own_weight`.

    Modules of transformers fill the weights of their children, unless marked as loaded, in the same function that
    computes buffers outside of the state dict.
    """
    linear.weight._is_hf_initialized = True
    layer.__class__ = type(type(layer).__name__, (type(layer),), {"weight": linear.weight})


def _show_own_weight(layer: nn.Module) -> None:
    if "weight" in vars(type(layer)) and isinstance(vars(type(layer))["weight"], nn.Parameter):
        layer.__class__ = type(layer).__bases__[0]


def _places_of_conv1d(model: nn.Module) -> set[nn.Module]:
    """The modules that stand where transformers puts a Conv1D, whose weight is transposed in the state dict."""
    from transformers.pytorch_utils import Conv1D

    found: set[nn.Module] = set()
    for module in model.modules():
        own: Any = module
        if is_transformers_model(module) and hasattr(sys.modules[type(module).__module__], "Conv1D"):
            with torch.device("meta"):
                built = type(own)(copy.deepcopy(own.config))
            names = {name for name, part in built.named_modules() if type(part) is Conv1D}
            found |= {part for name, part in module.named_modules() if name in names}
    return found


def _as_conv1d(layer: CompressedLinear) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    dense = layer.to_dense()
    with torch.device("meta"):
        conv1d = Conv1D(layer.out_features, layer.in_features)
    conv1d.weight = nn.Parameter(dense.weight.detach().t().contiguous())
    conv1d.bias = nn.Parameter(dense.weight.new_zeros(layer.out_features)) if dense.bias is None else dense.bias
    return conv1d.train(layer.training)


def _fuse_decoder_again(model: nn.Module) -> None:
    """On the CPU alone. Warns where that is not possible any more, as in another dtype."""
    from .decoders import conv1d_to_linear_, fuse_decoder_

    if {parameter.device.type for parameter in model.parameters()} == {"cpu"}:
        try:
            fuse_decoder_(conv1d_to_linear_(model))
        except (TypeError, ValueError) as error:
            warnings.warn(f"{type(model).__name__} runs with separate layers: {error}", stacklevel=2)


def _local_name(model: nn.Module, name: str) -> str | None:
    """The name in this model of a module in a checkpoint."""
    modules = dict(model.named_modules())
    return next((candidate for candidate in _candidates(model, name) if candidate in modules), None)


def _candidates(model: nn.Module, name: str) -> tuple[str, ...]:
    """What the name may be elsewhere: checkpoints of a base model and of one with a head differ by a prefix."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return name, name.removeprefix(prefix), prefix + name
