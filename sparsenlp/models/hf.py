"""transformers: our checkpoints as a quantization method, so that plain from_pretrained and save_pretrained work.

Importing this file registers it. It is imported while transformers itself is still being imported, so
at module level it may only use what transformers.quantizers.auto uses.
"""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import (
    CONFIG_FILE,
    FORMAT_VERSION,
    METHOD,
    CheckpointError,
    check_composites,
    composites_of,
    linear_for,
    open_tensors,
    parse_description,
    parse_fused,
    parse_structure,
    read_layers,
    to_disk,
)
from ..formats.block import INDEX_DTYPE
from ..layer_entries import LayerEntry
from ..layers import NMLinear, SparseLinear
from ..layers.adapters import has_adapters
from ..layers.composite import join_composites_, replace_modules, split_composites_
from ..layers.compressed_linear import CompressedLinear
from ..layers.incoming import watch_incoming_
from ..ops.nm_linear import pack
from ..prune.masked import BESIDE_WEIGHTS
from . import is_transformers_model
from .block_sparse_attention import restore_
from .encoders import fuse_again_
from .hf_saving import allow_loading, attach, describe_in_config, strip_config
from .own import own_class
from .structure import restructure_, structure_of


@register_quantization_config(METHOD)
class SparseNlpConfig(QuantizationConfigMixin):
    """The `quantization_config` block of config.json. Raises CheckpointError for one that does not make sense."""

    def __init__(
        self,
        format_version: Any = FORMAT_VERSION,
        modules: Any = None,
        quant_method: str = METHOD,
        fused_encoders: Any = None,
        fused_decoder: Any = None,
        structure: Any = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise CheckpointError(f"{CONFIG_FILE}: expected no other fields in quantization_config, got {[*unknown]}")
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers compares it with plain strings
        self.format_version = format_version
        self.modules = {} if modules is None else modules
        if fused_encoders is not None:
            self.fused_encoders = fused_encoders
        if fused_decoder is not None:
            self.fused_decoder = fused_decoder
        if structure is not None:
            self.structure = structure
        for parse in (parse_description, parse_fused, parse_structure):
            parse(self.to_dict())


@register_quantizer(METHOD)
class SparseNlpQuantizer(HfQuantizer):
    """Gives layers their shapes before transformers loads the tensors, and mends dtypes afterwards."""

    quantization_config: SparseNlpConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state_to_save: dict[str, Tensor] | None = None
        self._scales: dict[nn.Module, Tensor] = {}
        self._dense = False

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> nn.Module:
        """Check the files in full, then replace layers; the model is on the meta device."""
        entries = parse_description(self.quantization_config.to_dict())
        if not checkpoint_files:
            raise CheckpointError(f"{METHOD}: expected checkpoint files to check, got a state dict")
        where = ", ".join(checkpoint_files)
        self._dense = _holds_dense_weights(model, checkpoint_files, entries)
        if self._dense:
            warnings.warn(
                f"{where}: {CONFIG_FILE} describes sparse layers, but all weights are dense, as of a model built "
                "from a sparse one's configuration. They are loaded as they are; save the model again to end this",
                stacklevel=2,
            )
            return model
        try:
            restructure_(model, parse_structure(self.quantization_config.to_dict()))
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from None
        weights = read_layers(checkpoint_files, entries)
        parents = (_local_name(model, name) for name in composites_of(entries))
        split_composites_(model, {name for name in parents if name is not None})
        local = {name: _local_name(model, name) for name in entries}
        if entries and not any(local.values()):
            raise CheckpointError(f"{where}: expected layers of {type(model).__name__}, got {next(iter(entries))}")
        check_composites(model, {target: entries[n] for n, target in local.items() if target is not None}, where)
        _replace_conv1d(model, [target for target in local.values() if target is not None])
        replacements: dict[nn.Module, nn.Module] = {}
        for name, entry in entries.items():
            if (target := local[name]) is None:  # belongs to a head that this class does not have
                continue
            linear = linear_for(model, target, entry, where)
            layer = entry.empty_layer(linear.weight.dtype)
            layer.input_scale = entry.input_scale
            if (scales := weights[name].scales) is not None:
                self._scales[layer] = scales
            replacements[linear] = layer
        replace_modules(model, replacements)
        _ignore_placeholders(model, {*entries, *(target for target in local.values() if target is not None)})
        for dense, sparse in replacements.items():
            _show_dense_weight(sparse, dense)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> nn.Module:
        model.is_quantized = False  # plain floats: .half(), .to() and training are fine
        vars(model).pop("_keys_to_ignore_on_load_unexpected", None)
        strip_config(model.config)
        if self._dense:
            model.hf_quantizer = None
            return model
        for layer in model.modules():
            if isinstance(layer, CompressedLinear):
                _show_own_weight(layer)
            if isinstance(layer, SparseLinear):
                layer.col_indices = layer.col_indices.to(INDEX_DTYPE)
            if isinstance(layer, NMLinear):
                layer.packed = pack(layer.indices, layer.pattern)
            # transformers casts scales to the model's dtype
            if isinstance(layer, CompressedLinear) and layer in self._scales:
                layer.scales = self._scales.pop(layer).to(layer.values.device)
        fused = parse_fused(self.quantization_config.to_dict()).items()
        fuse_again_(model, {_local_name(model, name) or name: options for name, options in fused})
        if getattr(self.quantization_config, "fused_decoder", False):
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


def load(directory: Path, config: Mapping[str, Any], model_class: Any = None, **kwargs: Any) -> nn.Module:
    """Build the class that config.json names (one of transformers' or ours) or `model_class`, and load it.

    Raises CheckpointError where transformers alone would only warn: missing or mismatched tensors, and for the
    class that config.json names (another one may well leave a head out) tensors that the model does not have; the
    masks that transformers' own save_pretrained leaves beside the weights are not needed.
    """
    cls = _class_of(directory, config) if model_class is None else model_class
    kwargs = {**kwargs, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = cls.from_pretrained(directory, **kwargs)
    except SafetensorError as error:
        raise CheckpointError(f"{directory}: expected a safetensors file, got {error}") from None
    info["unexpected_keys"] = {name for name in info["unexpected_keys"] if not BESIDE_WEIGHTS.search(name)}
    for kind in ("missing_keys", "mismatched_keys", *(["unexpected_keys"] if model_class is None else [])):
        if info[kind]:
            raise CheckpointError(f"{directory}: expected the tensors of {cls.__name__}, got {kind} {min(info[kind])}")
    try:
        restore_(model)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: {error}") from None
    return model


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


def _holds_dense_weights(model: nn.Module, files: Sequence[str], entries: Mapping[str, LayerEntry]) -> bool:
    """Whether the files hold no sparse layer, but a dense weight for each of these that `model` has.

    Raises CheckpointError where they hold no sparse layer, and lack a dense weight too.
    """
    with open_tensors(files) as tensors:
        names = tensors.names()
    if not entries or any(f"{name}.{part}" in names for name, entry in entries.items() for part in entry.content):
        return False
    known = [name for name in entries if _local_name(model, name) is not None]
    for name in known:
        if not any(f"{candidate}.weight" in names for candidate in _candidates(model, name)):
            where = ", ".join(files)
            raise CheckpointError(f"{where}: expected a tensor {name}.{next(iter(entries[name].content))}, got none")
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
