"""Training and recovery of models that predict a token at each step: language models and encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import UNLABELLED, TokenizedDataset
from ..modes import evaluating
from ..prune.layers import FilterFn, prunable
from .config import FinetuneConfig, PruningConfig, TrainingConfig
from .distill import soft_target_loss
from .finetune import LabelTask, open_state
from .forward import device_of, forward
from .gradual import GradualPruner
from .loop import SAVE_SECONDS, OnStep, TrainingLog, run, total_steps


@dataclass(frozen=True, kw_only=True)
class SequenceRecoveryConfig(PruningConfig, TrainingConfig):
    """Gradual pruning with distillation from the dense model, token by token (see PruningConfig and TrainingConfig).

    label_weight    of the cross-entropy with the labels
    distill_weight  of KL(teacher || student) of the logits
    temperature     that the logits are divided by in that KL
    """

    label_weight: float = 0.5
    distill_weight: float = 1.0
    temperature: float = 1.0
    learning_rate: float = 1e-3
    dropout: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        PruningConfig.__post_init__(self)
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")
        weights = (self.label_weight, self.distill_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(f"loss weights: expected none negative and one positive, got {weights}")


def train_sequences(
    model: nn.Module,
    data: TokenizedDataset,
    config: FinetuneConfig | None = None,
    state_path: str | Path | None = None,
    save_every: int | None = None,
    quiet: bool = False,
    on_step: OnStep | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> TrainingLog:
    """Train a causal language model or an encoder-decoder of transformers on tokens, in place.

    data  with a column "labels" beside "input_ids": the target with its end token, or for a language model the same
          tokens; UNLABELLED where none is to be predicted. The loss is the mean over the tokens of a batch
    The rest as in `finetune`. Raises ValueError for data without that column, and what `finetune` raises.
    """
    config = config or FinetuneConfig()
    _check(data)
    state_file = open_state(state_path, (save_every, save_seconds), config, data, model, None)
    return run(model, data, _TokenTask(model, data, config), config, state_file, quiet, on_step)


def recover_sequences(
    model: nn.Module,
    teacher: nn.Module,
    data: TokenizedDataset,
    config: SequenceRecoveryConfig | None = None,
    filter_fn: FilterFn | None = None,
    state_path: str | Path | None = None,
    save_every: int | None = None,
    quiet: bool = False,
    on_step: OnStep | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> TrainingLog:
    """Prune such a model to config.sparsity while it learns from the dense one, in place; it ends masked.

    teacher  the dense model; the labels may be its own outputs for texts that have none (Kim & Rush 2016,
             arXiv:1606.07947)
    The rest as in `train_sequences` and `recover`, whose errors it raises, too.
    """
    config = config or SequenceRecoveryConfig()
    _check(data)
    _check_logits(model, teacher, data)
    layers = tuple(prunable(model, filter_fn))
    state_file = open_state(state_path, (save_every, save_seconds), (config, layers), data, model, None)
    pruner = GradualPruner(model, config, total_steps(data, config), filter_fn)
    return run(
        model, data, _TokenRecoveryTask(model, teacher, data, config, pruner), config, state_file, quiet, on_step
    )


def token_logits(model: nn.Module, inputs: dict[str, Tensor], bf16: bool = False) -> tuple[Tensor, Tensor]:
    """(logits (N, V) float32, labels (N,)) of the N tokens of inputs["labels"] that are to be predicted."""
    network: Any = model
    labels = inputs["labels"]
    inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    if network.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = network.prepare_decoder_input_ids_from_labels(labels)
    logits = forward(model, inputs, bf16=bf16).logits
    if not network.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    labels = labels.to(logits.device)
    chosen = labels != UNLABELLED
    return logits[chosen].float(), labels[chosen]


def _check(data: TokenizedDataset) -> None:
    if "labels" not in data.columns:
        raise ValueError(f"data: expected a column labels, got {', '.join(data.columns)}")


@torch.no_grad()
def _check_logits(model: nn.Module, teacher: nn.Module, data: TokenizedDataset) -> None:
    shapes = []
    for one in (model, teacher):
        with evaluating(one):
            shapes.append(tuple(token_logits(one, data.batch([0]))[0].shape))
    if shapes[0] != shapes[1]:
        raise ValueError(f"teacher: expected logits of shape {shapes[0]}, got {shapes[1]}")


class _TokenTask(LabelTask):
    """Cross-entropy with labels that are tokens."""

    name = "train"

    def loss(self, indices: Sequence[int]) -> Tensor:
        return F.cross_entropy(*token_logits(self.model, self.data.batch(indices), self.config.bf16))


class _TokenRecoveryTask(_TokenTask):
    """Adds the teacher, and masks that tighten."""

    name = "recover"

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        data: TokenizedDataset,
        config: SequenceRecoveryConfig,
        pruner: GradualPruner,
    ) -> None:
        super().__init__(model, data, config)
        self.teacher, self.pruner, self.recovery = teacher, pruner, config

    def before_step(self, step: int) -> None:
        self.pruner.before_step(step)

    def undo_step(self) -> None:
        self.pruner.undo_step()

    def loss(self, indices: Sequence[int]) -> Tensor:
        config, inputs = self.recovery, self.data.batch(indices)
        network: Any = self.model
        mask = None if network.config.is_encoder_decoder else inputs["attention_mask"]  # it has none for targets
        with self.pruner.observing(mask):
            logits, labels = token_logits(self.model, inputs, config.bf16)
        with evaluating(self.teacher), torch.no_grad():
            target, _ = token_logits(self.teacher, inputs, config.bf16)
        divergence = soft_target_loss(logits, target.to(device_of(self.model)), config.temperature)
        return config.label_weight * F.cross_entropy(logits, labels) + config.distill_weight * divergence

    def after_backward(self, step: int) -> None:
        self.pruner.after_backward(step)

    def note(self) -> str:
        return f"sparsity {self.pruner.sparsity:.1%}"

    def state_dict(self) -> dict[str, Tensor]:
        return self.pruner.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.pruner.load_state_dict(state)
