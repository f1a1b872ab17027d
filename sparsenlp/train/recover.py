"""Gradual pruning with distillation from the dense model, so that accuracy comes back while zeros are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import UNLABELLED, TokenizedDataset, join, splice
from ..layers.composite import on_split
from ..prune.layers import FilterFn, prunable
from .config import RecoveryConfig
from .distill import CachedTeacher, LiveTeacher, Teacher, hidden_state_loss, make_teacher, soft_target_loss
from .distributed import ALONE, current_processes
from .finetune import check_validation, open_state
from .forward import check_classes, device_of, forward
from .gradual import GradualPruner
from .int8 import is_rounded, start_rounding, stop_rounding
from .loop import SAVE_SECONDS, OnStep, TrainingLog, run, total_steps
from .relations import last_projections, recorded, relation_loss

_ROUNDED = "rounded"


@on_split
def recover(
    model: nn.Module,
    teacher: nn.Module | Teacher,
    data: TokenizedDataset,
    config: RecoveryConfig | None = None,
    filter_fn: FilterFn | None = None,
    state_path: str | Path | None = None,
    save_every: int | None = None,
    quiet: bool = False,
    on_step: OnStep | None = None,
    validation: TokenizedDataset | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> TrainingLog:
    """Prune a fine-tuned transformers sequence classifier to config.sparsity while training it, in place.

    model       starts dense, usually as a copy of the teacher; ends masked: `finalize_` makes the
                zeros permanent
    teacher     the dense model, or a Teacher of `training_texts(data, config)`, such as a CachedTeacher that
                several runs share
    data        some texts may be UNLABELLED: on these, and those that config.spliced adds, the model only
                imitates the teacher
    filter_fn   which layers are pruned, as in `prune_`
    state_path, save_every, save_seconds, on_step, validation   as in `finetune`; only states that have all their
                zeros count as best

    In a process group (torchrun and init_process_group("gloo")) the processes share the work, as `loop.run` says.

    Raises ValueError, with the model untouched, for what `prune_` and `finetune` refuse and for a
    teacher whose outputs cannot be compared with the model's; FloatingPointError and
    KeyboardInterrupt as `loop.run` says; OSError if the state cannot be written.
    """
    config = config or RecoveryConfig()
    layers = prunable(model, filter_fn)
    check_classes(model, data, unlabelled=True)
    data = training_texts(data, config)
    check_validation(model, validation)
    _check_teacher(model, teacher, data, config)
    state_file = open_state(state_path, (save_every, save_seconds), (config, tuple(layers)), data, model, validation)
    if isinstance(teacher, nn.Module):
        hidden, relations = config.hidden_weight > 0, config.relation_weight > 0
        teacher = make_teacher(teacher, data, hidden, config.cache_gib, config.bf16, quiet, relations)
    pruner = GradualPruner(model, config, total_steps(data, config), filter_fn)
    task = _RecoveryTask(model, teacher, data, config, pruner, layers)
    return run(model, data, task, config, state_file, quiet, on_step, validation)


def training_texts(data: TokenizedDataset, config: RecoveryConfig) -> TokenizedDataset:
    """What `recover` trains on: the texts of `data`, then config.spliced as many without labels, by config.seed."""
    return join([data, splice(data, round(config.spliced * len(data)), config.seed)])


@torch.no_grad()
def _check_teacher(
    model: nn.Module, teacher: nn.Module | Teacher, data: TokenizedDataset, config: RecoveryConfig
) -> None:
    """Raise ValueError unless both models' outputs for one example can be compared."""
    hidden, relations = config.hidden_weight > 0, config.relation_weight > 0
    if isinstance(teacher, CachedTeacher):
        if teacher.fingerprint != data.fingerprint():
            raise ValueError(
                "teacher: expected outputs cached over training_texts(data, config), got those of other texts"
            )
        if relations and not teacher.relations:
            raise ValueError(
                "teacher: expected outputs cached with relations=True, got none of queries, keys and values"
            )
    if isinstance(teacher, nn.Module):
        teacher = LiveTeacher(teacher, data, hidden, config.bf16, relations)
    student = LiveTeacher(model, data, hidden, config.bf16, relations)
    shapes, projections = [], []
    for source in (student, teacher):
        logits, states = source.outputs([0])
        compared, projected = _divide(states, _gives_relations(source, config))
        shapes.append([tuple(logits.shape)] + [tuple(state.shape) for state in compared if hidden])
        projections.append(projected)
    if shapes[0] != shapes[1]:
        raise ValueError(f"teacher: expected logits and hidden states of shapes {shapes[0]}, got {shapes[1]}")
    if relations:
        mask = torch.ones(projections[0][0].shape[:2], device=device_of(model))
        relation_loss(projections[0], projections[1], mask, config.relations, _relation_heads(model, config), ALONE)


def _divide(states: Sequence[Tensor], relations: bool) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """A teacher's states as (hidden states, projections)."""
    return (states[:-3], states[-3:]) if relations else (states, [])


def _gives_relations(teacher: Teacher, config: RecoveryConfig) -> bool:
    """Whether a teacher's last three states are projections; a cache may have them where this run wants none."""
    return teacher.relations if isinstance(teacher, CachedTeacher) else config.relation_weight > 0


def _relation_heads(model: nn.Module, config: RecoveryConfig) -> int:
    return config.relation_heads or model.config.num_attention_heads  # type: ignore[union-attr, return-value]


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
        layers: Mapping[str, nn.Linear],
    ) -> None:
        self.model, self.teacher, self.data, self.config, self.pruner = model, teacher, data, config, pruner
        self.restart = pruner.ramp_end if config.rewind else 0
        total = total_steps(data, config)
        self.layers = list(layers.values())
        self.int8_begin = total - math.ceil(config.int8_fraction * total)
        self.begins_int8 = False
        self.settled = max(pruner.ramp_end, self.int8_begin if config.int8_fraction else 0) + 1
        self.processes = current_processes()
        self.projections = last_projections(model) if config.relation_weight > 0 else []
        self.divides = _gives_relations(teacher, config)

    def before_step(self, step: int) -> None:
        self.pruner.before_step(step)
        self.begins_int8 = step >= self.int8_begin and not is_rounded(self.layers[0])
        if self.begins_int8:
            start_rounding(self.layers)

    def undo_step(self) -> None:
        self.pruner.undo_step()
        if self.begins_int8:
            stop_rounding(self.layers)

    def loss(self, indices: Sequence[int]) -> Tensor:
        config = self.config
        inputs = self.data.batch(indices)
        with self.pruner.observing(inputs["attention_mask"]), recorded(self.projections) as projected:
            output = forward(self.model, inputs, config.hidden_weight > 0, config.bf16)
        logits, device = output.logits.float(), device_of(self.model)
        teacher_logits, states = self.teacher.outputs(indices)
        mask = inputs["attention_mask"].to(device)
        hidden, projections = _divide([state.to(device) for state in states], self.divides)
        labels = self.data.labels[list(indices)].to(device)
        wrong = F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum") / len(labels)
        loss = config.label_weight * wrong
        loss = loss + config.distill_weight * soft_target_loss(logits, teacher_logits.to(device), config.temperature)
        if config.hidden_weight > 0:
            error = hidden_state_loss(output.hidden_states[1:], hidden, mask, self.processes)
            loss = loss + config.hidden_weight * error
        if config.relation_weight > 0:
            heads = _relation_heads(self.model, config)
            divergence = relation_loss(projected, projections, mask, config.relations, heads, self.processes)
            loss = loss + config.relation_weight * divergence
        return loss

    def after_backward(self, step: int) -> None:
        self.pruner.after_backward(step)

    def note(self) -> str:
        return f"sparsity {self.pruner.sparsity:.1%}"

    def state_dict(self) -> dict[str, Tensor]:
        return self.pruner.state_dict() | {_ROUNDED: torch.tensor(is_rounded(self.layers[0]))}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state[_ROUNDED]:
            start_rounding(self.layers)
        self.pruner.load_state_dict({name: tensor for name, tensor in state.items() if name != _ROUNDED})
