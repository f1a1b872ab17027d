"""Gradual pruning with distillation from the dense model, so that accuracy comes back while zeros are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import TokenizedDataset
from ..prune import CRITERIA, collector, cubic_sparsity, prune_, sparsity_of
from ..prune.layers import FilterFn, prunable
from .config import RecoveryConfig
from .distill import CachedTeacher, LiveTeacher, Teacher, hidden_state_loss, make_teacher, soft_target_loss
from .finetune import open_state
from .forward import check_classes, device_of, forward
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
    prune_(model, config.pattern, 0.0, filter_fn=filter_fn)
    task = _RecoveryTask(model, teacher, data, config, layers, filter_fn)
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
        layers: dict[str, nn.Linear],
        filter_fn: FilterFn | None,
    ) -> None:
        self.model, self.teacher, self.data, self.config = model, teacher, data, config
        self.filter_fn = filter_fn
        self.ramp_end = max(int(config.ramp_fraction * total_steps(data, config)), 1)
        self.sparsity = 0.0
        self.statistics = collector(layers, CRITERIA[config.criterion].needs, config.statistics_decay)

    def before_step(self, step: int) -> None:
        """Tighten the masks every `update_every` steps of the ramp, and at its end."""
        config = self.config
        due = 0 < step <= self.ramp_end and (step % config.update_every == 0 or step == self.ramp_end)
        if not due:
            return
        target = cubic_sparsity(step, 0, self.ramp_end, config.sparsity)
        prune_(self.model, config.pattern, target, config.criterion, config.scope, self.filter_fn, self.statistics)
        self.sparsity = sparsity_of(self.model, self.filter_fn)

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
            loss = loss + config.hidden_weight * hidden_state_loss(output.hidden_states[1:], targets, mask)
        return loss

    def after_backward(self, step: int) -> None:
        if self.statistics is not None and step < self.ramp_end:
            self.statistics.update()

    def note(self) -> str:
        return f"sparsity {self.sparsity:.1%}"

    def state_dict(self) -> dict[str, Tensor]:
        return self.statistics.state_dict() if self.statistics is not None else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.statistics is not None:
            self.statistics.load_state_dict(state)
        self.sparsity = sparsity_of(self.model, self.filter_fn)
