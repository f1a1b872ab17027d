"""Gradual pruning with distillation from the dense model, so that accuracy comes back while zeros are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import TokenizedDataset
from ..prune.layers import FilterFn, prunable
from .config import RecoveryConfig
from .distill import CachedTeacher, LiveTeacher, Teacher, hidden_state_loss, make_teacher, soft_target_loss
from .distributed import current_processes
from .finetune import open_state
from .forward import check_classes, device_of, forward
from .gradual import GradualPruner
from .loop import OnStep, TrainingLog, run, total_steps


def recover(
    model: nn.Module,
    teacher: nn.Module | Teacher,
    data: TokenizedDataset,
    config: RecoveryConfig | None = None,
    filter_fn: FilterFn | None = None,
    state_path: str | Path | None = None,
    save_every: int = 200,
    quiet: bool = False,
    on_step: OnStep | None = None,
) -> TrainingLog:
    """Prune a fine-tuned transformers sequence classifier to config.sparsity while training it, in place.

    model       starts dense, usually as a copy of the teacher; ends masked: `finalize_` makes the
                zeros permanent
    teacher     the dense model, or a Teacher such as CachedTeacher(dense, data) that several runs
                on the same data share
    filter_fn   which layers are pruned, as in `prune_`
    state_path, save_every, on_step   as in `finetune`

    Raises ValueError, with the model untouched, for what `prune_` and `finetune` refuse and for a
    teacher whose logits or hidden states have other shapes; FloatingPointError and
    KeyboardInterrupt as `loop.run` says; OSError if the state cannot be written.
    """
    config = config or RecoveryConfig()
    layers = prunable(model, filter_fn)
    check_classes(model, data)
    _check_teacher(model, teacher, data, config)
    state_file = open_state(state_path, save_every, (config, tuple(layers)), data, model)
    if isinstance(teacher, nn.Module):
        teacher = make_teacher(teacher, data, config.hidden_weight > 0, config.cache_gib, config.bf16, quiet)
    pruner = GradualPruner(model, config, total_steps(data, config), filter_fn)
    task = _RecoveryTask(model, teacher, data, config, pruner)
    return run(model, data, task, config, state_file, quiet, on_step)


@torch.no_grad()
def _check_teacher(
    model: nn.Module, teacher: nn.Module | Teacher, data: TokenizedDataset, config: RecoveryConfig
) -> None:
    """Raise ValueError unless both models' outputs for one example have the same shapes."""
    if isinstance(teacher, CachedTeacher) and teacher.fingerprint != data.fingerprint():
        raise ValueError("teacher: expected outputs cached over the same data, got those of another data set")
    hidden = config.hidden_weight > 0
    source = LiveTeacher(teacher, data, hidden, config.bf16) if isinstance(teacher, nn.Module) else teacher
    student = LiveTeacher(model, data, hidden, config.bf16)
    shapes = []
    for outputs in (student.outputs([0]), source.outputs([0])):
        logits, states = outputs
        shapes.append([tuple(logits.shape)] + [tuple(state.shape) for state in states if hidden])
    if shapes[0] != shapes[1]:
        raise ValueError(f"teacher: expected logits and hidden states of shapes {shapes[0]}, got {shapes[1]}")


class _RecoveryTask:
    """The distillation loss, and the masks as they tighten over the first part of training."""

    name = "recover"

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher,
        data: TokenizedDataset,
        config: RecoveryConfig,
        pruner: GradualPruner,
    ) -> None:
        self.model, self.teacher, self.data, self.config, self.pruner = model, teacher, data, config, pruner
        self.processes = current_processes()

    def before_step(self, step: int) -> None:
        self.pruner.before_step(step)

    def loss(self, indices: Sequence[int]) -> Tensor:
        config = self.config
        inputs = self.data.batch(indices)
        with self.statistics.observing(inputs["attention_mask"]) if self.statistics is not None else nullcontext():
            output = forward(self.model, inputs, config.hidden_weight > 0, config.bf16)
        logits, device = output.logits.float(), device_of(self.model)
        teacher_logits, teacher_states = self.teacher.outputs(indices)
        loss = config.label_weight * F.cross_entropy(logits, self.data.labels[list(indices)].to(device))
        loss = loss + config.distill_weight * soft_target_loss(logits, teacher_logits.to(device), config.temperature)
        if config.hidden_weight > 0:
            targets = [state.to(device) for state in teacher_states]
            mask = inputs["attention_mask"].to(device)
            loss = loss + config.hidden_weight * hidden_state_loss(
                output.hidden_states[1:], targets, mask, self.processes
            )
        return loss

    def after_backward(self, step: int) -> None:
        self.pruner.after_backward(step)

    def note(self) -> str:
        return f"sparsity {self.pruner.sparsity:.1%}"

    def state_dict(self) -> dict[str, Tensor]:
        return self.pruner.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.pruner.load_state_dict(state)
