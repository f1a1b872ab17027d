"""Calling a transformers classifier the same way in training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data import UNLABELLED, TokenizedDataset
from ..modes import evaluating


def forward(model: nn.Module, inputs: dict[str, Tensor], hidden_states: bool = False, bf16: bool = False) -> Any:
    """model(**inputs) on the model's device, under bfloat16 autocast if wanted; returns its output object."""
    device = device_of(model)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        return model(**inputs, output_hidden_states=hidden_states)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def check_classes(model: nn.Module, data: TokenizedDataset, unlabelled: bool = False) -> None:
    """Raise ValueError unless the model has an output for every label; runs it on one example.

    Texts without a label are refused too, unless `unlabelled` allows them.
    """
    missing = int((data.labels == UNLABELLED).sum())
    if missing and not unlabelled:
        raise ValueError(f"labels: expected one for each of {len(data)} texts, got {missing} without")
    with evaluating(model), torch.no_grad():
        classes = forward(model, data.batch([0])).logits.shape[-1]
    highest = int(data.labels.max())
    if highest >= classes:
        raise ValueError(f"labels: expected indices below the model's {classes} classes, got {highest}")


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Attention as matmul, softmax, matmul while training on a CPU, where fused attention is slow backward.

    Forward and backward of MiniLM in bfloat16 take 0.37 s a batch so, 0.55 s with
    scaled_dot_product_attention. Only for transformers models that run the latter.
    """
    fused = getattr(getattr(model, "config", None), "_attn_implementation", None) == "sdpa"
    if not fused or device_of(model).type != "cpu":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


@contextmanager
def frozen_embeddings(model: nn.Module, enabled: bool) -> Iterator[None]:
    """requires_grad off for nn.Embedding weights and everything in a module called "embeddings"."""
    frozen = [p for p in _embedding_parameters(model) if p.requires_grad] if enabled else []
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _embedding_parameters(model: nn.Module) -> Sequence[nn.Parameter]:
    return [
        parameter
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or "embeddings" in name.split(".")
        for parameter in module.parameters(recurse=False)
    ]
