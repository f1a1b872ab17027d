"""What save_pretrained of a transformers model writes once the model holds sparse or fused layers."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from torch import nn

from ..layer_entries import PLACEHOLDER
from ..layers.compressed_linear import CompressedLinear
from . import has_fused_decoder, is_transformers_model
from .encoders import fused_options
from .structure import structure_of

REQUIREMENT = "sparsenlp: this model has sparse layers; `import sparsenlp` before from_pretrained"
"""What transformers without us says of a checkpoint: it raises ValueError for a fusion that it does not know."""


def attach(model: nn.Module) -> None:
    """Let each transformers model in `model` that holds a sparse or fused layer save itself in our format.

    It gets a quantizer of its own, and a `save_pretrained` of its own. Models with another quantizer stay as they are.
    """
    from .hf import SparseNlpConfig, SparseNlpQuantizer

    for module in _models_of_transformers(model):
        if not _needs_description(module):
            continue
        if getattr(module, "hf_quantizer", None) is None:
            module.hf_quantizer = SparseNlpQuantizer(SparseNlpConfig())
        if isinstance(module.hf_quantizer, SparseNlpQuantizer):
            vars(module)["save_pretrained"] = SavePretrained(module)


def mark_loose_layers(model: nn.Module) -> None:
    """Keep what a model around `model` saves from being loaded at random, where `model` is a part of one.

    A part, such as a BertEncoder, cannot give the model that holds it a save_pretrained. In state dicts its sparse
    layers have an empty `weight` from now on, whose size no loader takes for that of a dense layer.
    """
    described = {part for module in _models_of_transformers(model) for part in module.modules()}
    parts = [m for m in model.modules() if type(m).__module__.startswith("transformers.models.") and m not in described]
    layers = {layer for part in parts for layer in part.modules() if isinstance(layer, CompressedLinear)}
    for layer in layers:
        if _add_placeholder not in layer._state_dict_hooks.values():
            layer.register_state_dict_post_hook(_add_placeholder)
    if layers:
        warnings.warn(
            f"{type(parts[0]).__name__} is a part of a transformers model, whose own save_pretrained will not describe "
            "these sparse layers, so that loading raises an error; convert the whole model, or save it with "
            "sparsenlp.save_pretrained",
            stacklevel=4,
        )


def _add_placeholder(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    values = layer._parameters["values"]
    if values is not None and not values.is_meta:
        dtype = values.dtype if values.is_floating_point() else torch.float32
        state[f"{prefix}{PLACEHOLDER}"] = torch.empty(1, dtype=dtype)[:0]  # with an address of its own


def detach(model: nn.Module) -> None:
    """Undo `attach` for each transformers model in `model` where no layer needs it any more."""
    from .hf import SparseNlpQuantizer

    for module in _models_of_transformers(model):
        if isinstance(getattr(module, "hf_quantizer", None), SparseNlpQuantizer) and not _needs_description(module):
            module.hf_quantizer = None
            vars(module).pop("save_pretrained", None)
            strip_config(module.config)


def give_own_config(model: Any) -> None:
    """Replace the model's config by a copy, which no other model shares."""
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def describe_in_config(config: Any, description: Any) -> None:
    """Put the description into a configuration that is about to be written."""
    config.quantization_config = description
    if description.modules or hasattr(description, "structure"):
        config.fusion_config = {REQUIREMENT: True, **(getattr(config, "fusion_config", None) or {})}


def strip_config(config: Any) -> None:
    """Undo `describe_in_config`: another model of this configuration is dense."""
    vars(config).pop("quantization_config", None)
    allow_loading(config)


def allow_loading(config: Any) -> None:
    """Take out what keeps transformers without us from loading."""
    fusions = dict(getattr(config, "fusion_config", None) or {})
    if REQUIREMENT in fusions:
        del fusions[REQUIREMENT]
        config.fusion_config = fusions
        if not fusions:
            vars(config).pop("fusion_config")


class SavePretrained:
    """Stands in for save_pretrained of one model: in our format while a layer needs it, else as transformers does.

    A `state_dict` argument is what is written, under the same checks; the description is of that state. Names are
    those of the model: `save_original_format` is False.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).save_pretrained.__get__(self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from transformers import PreTrainedModel

        model = self.model
        save = type(model).save_pretrained.__get__(model)
        detach(model)
        if not _needs_description(model):
            return save(*args, **kwargs)
        attach(model)
        usual = inspect.signature(PreTrainedModel.save_pretrained.__get__(model)).bind(*args, **kwargs).arguments
        given = {**usual, **usual.pop("kwargs", {})}
        if given.get("save_original_format"):
            warnings.warn(
                "save_pretrained: a model with sparse layers is saved under the names of its modules, "
                "save_original_format is ignored",
                stacklevel=2,
            )
        model.hf_quantizer.state_to_save = given.get("state_dict")
        try:
            return save(**{**given, "save_original_format": False})
        finally:
            model.hf_quantizer.state_to_save = None
            strip_config(model.config)


def _models_of_transformers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_transformers_model(module)]


def _needs_description(model: nn.Module) -> bool:
    """Whether an ordinary directory would not give this model back."""
    return (
        any(isinstance(module, CompressedLinear) for module in model.modules())
        or bool(fused_options(model))
        or has_fused_decoder(model)
        or bool(structure_of(model))
    )
