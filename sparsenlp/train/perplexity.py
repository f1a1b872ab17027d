"""How well a language model predicts windows of tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modes import evaluating
from .forward import forward


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, batch_size: int = 4, bf16: bool = False) -> float:
    """exp of the mean cross-entropy (nats) of each token given those before it in its window.

    model      a causal language model of transformers; dropout is off meanwhile
    windows    (W, L) int64 token ids; W * (L - 1) tokens are predicted
    bf16       run under bfloat16 autocast; the loss is float32

    Memory grows with batch_size * L * vocabulary. Raises ValueError for windows of another shape or shorter than two
    tokens, and for logits that are not finite.
    """
    _check("perplexity", windows)
    total = 0.0
    with evaluating(model):
        for batch in windows.split(batch_size):
            logits = forward(model, {"input_ids": batch}, bf16=bf16).logits[:, :-1]
            total += _cross_entropy("perplexity", logits.flatten(0, 1), batch[:, 1:].flatten())
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


@torch.no_grad()
def masked_perplexity(
    model: nn.Module,
    windows: Tensor,
    mask_token_id: int,
    fraction: float = 0.15,
    seed: int = 0,
    batch_size: int = 4,
    bf16: bool = False,
) -> float:
    """exp of the mean cross-entropy (nats) of tokens hidden by the mask token, for a masked language model.

    fraction   of each window's tokens, rounded, at least one; which ones depends only on seed

    Otherwise as `perplexity`. It compares only with itself: the same windows, fraction and seed.
    """
    _check("masked_perplexity", windows)
    if not 0 < fraction <= 1:
        raise ValueError(f"masked_perplexity: expected a fraction in (0, 1], got {fraction}")
    count = max(1, round(fraction * windows.shape[1]))
    noise = torch.rand(windows.shape, generator=torch.Generator().manual_seed(seed))
    hidden = torch.zeros_like(windows, dtype=torch.bool).scatter_(1, noise.topk(count, dim=1).indices, True)
    total = 0.0
    with evaluating(model):
        for batch, chosen in zip(windows.split(batch_size), hidden.split(batch_size), strict=True):
            logits = forward(model, {"input_ids": batch.masked_fill(chosen, mask_token_id)}, bf16=bf16).logits
            total += _cross_entropy("masked_perplexity", logits[chosen.to(logits.device)], batch[chosen])
    return math.exp(total / (windows.shape[0] * count))


def _cross_entropy(caller: str, logits: Tensor, targets: Tensor) -> float:
    """Summed over tokens; logits (T, V), targets (T,)."""
    loss = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum").item()
    if not math.isfinite(loss):
        raise ValueError(f"{caller}: expected finite logits, got a loss of {loss}")
    return loss


def _check(caller: str, windows: Tensor) -> None:
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"{caller}: expected windows (W, L) of at least 2 tokens, got shape {tuple(windows.shape)}")
