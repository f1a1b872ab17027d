"""Which linear layers of a model are not its body: task heads, tied weights, routers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..layers.composite import is_composite
from ..models import is_transformers_model

TASK_PARTS = frozenset(
    {"classifier", "pre_classifier", "score", "qa_outputs", "logits_proj", "summary", "sequence_summary"}
    | {"classification_head", "head", "heads", "cls", "lm_head", "predictions", "generator_predictions"}
    | {"discriminator_predictions", "pooler", "embeddings", "embeddings_project", "embedding_hidden_mapping_in"}
)
"""Module names under which transformers keep task heads, poolers, language-model heads and embeddings."""
ROUTERS = frozenset({"gate", "router", "wg", "shared_expert_gate"})
"""What mixtures of experts call the layers that choose among them."""


def is_task_part(name: str) -> bool:
    """Whether a dotted name has a part that only task heads, poolers and embeddings have."""
    return not TASK_PARTS.isdisjoint(name.split("."))


def is_router(module: nn.Linear, name: str) -> bool:
    """Whether this chooses among experts: by its name, and by having far fewer outputs than inputs."""
    parts = name.split(".")
    return "router" in parts or (parts[-1] in ROUTERS and 4 * module.out_features <= module.in_features)


def body(model: nn.Module, layers: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """The layers that are neither in the head of a transformers model nor share a weight with another kind of module.

    The head is what a model has beside its base model, and its output embeddings.
    """
    heads = {module for each in model.modules() if is_transformers_model(each) for module in _head(each)}
    kept = {name: layer for name, layer in layers.items() if layer not in heads}
    while True:
        taken = {id(p) for p in _parameters_beside(model, {*kept.values()})}
        tied = {name for name, layer in kept.items() if any(id(p) in taken for p in layer.parameters())}
        if not tied:
            return kept
        kept = {name: layer for name, layer in kept.items() if name not in tied}


def _head(model: Any) -> Iterator[nn.Module]:
    """Modules outside the base model, but for whole models among them, such as a second encoder."""
    try:
        output = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        output = None
    if output is not None:
        yield output
    if model.base_model is model:
        return
    base = {*model.base_model.modules()}
    others = [m for m in model.modules() if m is not model and m not in base and is_transformers_model(m)]
    whole = {module for other in others for module in other.modules()}
    yield from (module for module in model.modules() if module not in base and module not in whole)


def _parameters_beside(model: nn.Module, layers: set[nn.Linear]) -> Iterator[Tensor]:
    """Parameters that modules other than these layers hold; not what is inside of these, nor what they are views of."""
    inside = {module for layer in layers for module in layer.modules()}
    for module in model.modules():
        if module not in inside and not is_composite(module):
            yield from (p for p in module._parameters.values() if p is not None)
