"""Run a classifier over a data set, and compare its logits with labels or with another model's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import TokenizedDataset, sorted_batches
from .forward import evaluating, forward


@torch.no_grad()
def predict(
    model: nn.Module, data: TokenizedDataset, batch_size: int = 64, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits (examples, classes) float32 on the CPU, in the order of `data`; dropout off.

    dtype bfloat16 runs under autocast. Raises ValueError for a dtype other than these two.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"predict: expected dtype float32 or bfloat16, got {dtype}")
    order, logits = [], []
    with evaluating(model):
        for indices in sorted_batches(data.lengths, batch_size):
            output = forward(model, data.batch(indices), bf16=dtype == torch.bfloat16)
            order += indices
            logits.append(output.logits.float().cpu())
    joined = torch.cat(logits)
    return torch.empty_like(joined).index_copy_(0, torch.tensor(order), joined)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction of examples whose highest logit is their label."""
    return (logits.argmax(dim=-1) == labels).float().mean().item()


def agreement(logits: Tensor, reference: Tensor) -> float:
    """Fraction of examples on which both models choose the same class."""
    return accuracy(logits, reference.argmax(dim=-1))


def kl_divergence(logits: Tensor, reference: Tensor) -> float:
    """Mean KL(reference || model) of the predicted distributions, in nats."""
    student, teacher = logits.log_softmax(dim=-1), reference.log_softmax(dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean").item()


def cosine_similarity(logits: Tensor, reference: Tensor) -> float:
    """Cosine between all logits of two models, each taken as one vector."""
    return F.cosine_similarity(logits.flatten(), reference.flatten(), dim=0).item()
