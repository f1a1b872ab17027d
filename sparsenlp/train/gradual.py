"""Masks that tighten while a model trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..prune import (
    CRITERIA,
    LayerTarget,
    collector,
    cubic_sparsity,
    masked_layers,
    prune_,
    prune_layers_,
    sparsity_of,
)
from ..prune.layers import FilterFn, mask_of, prunable
from .config import PruningConfig
from .distributed import current_processes

_START = "start"  # in a state: the sparsities that masks had when the run began
_ALL = ""  # stands for all layers together among their names


class GradualPruner:
    """Raises the sparsity of a model to config.sparsity within the first steps of a training run.

    model      gets masks without zeros here, where it has none; the sparsity rises from what masks have already
    steps      optimizer steps of the whole run
    filter_fn  which layers are pruned, as in `prune_`; config.layer_targets go before it

    Call `before_step` before the forward passes of a step, which `observing` surrounds, and
    `after_backward` once the gradients of all examples of the step are there. Raises as `prune_`, and
    ValueError for fewer than two steps.
    """

    def __init__(self, model: nn.Module, config: PruningConfig, steps: int, filter_fn: FilterFn | None = None) -> None:
        self.model, self.config, self.filter_fn = model, config, filter_fn
        if steps < 2:
            raise ValueError(f"gradual pruning: expected at least 2 training steps, got {steps}")
        self.ramp_end = max(min(int(config.ramp_fraction * steps), steps - 1), 1)
        if config.layer_targets is not None:
            self.filter_fn = filter_fn = _named(config.layer_targets)
        add_masks_(model, config, filter_fn)
        self.sparsity = sparsity_of(model, filter_fn)
        masks = _masks(model)
        kept = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
        self.start = {name: 1 - int(mask.sum()) / mask.numel() for name, mask in masks.items()} | {_ALL: 1 - kept}
        layers = prunable(model, filter_fn)
        self.statistics = collector(layers, CRITERIA[config.criterion].needs, config.statistics_decay)
        self._before: dict[str, Tensor] = {}

    def before_step(self, step: int) -> None:
        """Tighten the masks every `update_every` steps of the ramp, and at its end; `step` counts from 0."""
        config = self.config
        self._before = {}
        due = 0 < step <= self.ramp_end and (step % config.update_every == 0 or step == self.ramp_end)
        if not due:
            return
        self._before = {name: mask.clone() for name, mask in _masks(self.model).items()}
        if self.statistics is not None:  # what each process saw of them alone would give it masks of its own
            current_processes().average_([t for t in self.statistics.state_dict().values() if t.is_floating_point()])
        self._prune(step)
        self.sparsity = sparsity_of(self.model, self.filter_fn)

    def _prune(self, step: int) -> None:
        config = self.config
        if config.layer_targets is None:
            target = self._sparsity_at(step, config.sparsity, self.start[_ALL])
            prune_(self.model, config.pattern, target, config.criterion, config.scope, self.filter_fn, self.statistics)
        else:
            targets = {
                name: LayerTarget(target.pattern, self._sparsity_at(step, target.sparsity, self.start[name]))
                for name, target in config.layer_targets.items()
            }
            prune_layers_(self.model, targets, config.criterion, self.statistics)

    def _sparsity_at(self, step: int, final: float, start: float) -> float:
        return cubic_sparsity(step, 0, self.ramp_end, final, min(start, final))

    def undo_step(self) -> None:
        """Put back the masks that the last `before_step` tightened."""
        for name, mask in _masks(self.model).items():
            if name in self._before:
                mask.copy_(self._before[name])
        self.sparsity = sparsity_of(self.model, self.filter_fn)

    def observing(self, attention_mask: Tensor | None) -> AbstractContextManager[None]:
        """Surround each forward pass with this, for criteria that look at inputs of layers; None: at all of them."""
        return self.statistics.observing(attention_mask) if self.statistics is not None else nullcontext()

    def after_backward(self, step: int) -> None:
        if self.statistics is not None and step < self.ramp_end:
            self.statistics.update()

    def state_dict(self) -> dict[str, Tensor]:
        """The statistics, and where the sparsity began; the masks are part of the model."""
        start = {_START: torch.tensor(list(self.start.values()), dtype=torch.float64)}
        return start | (self.statistics.state_dict() if self.statistics is not None else {})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError for a state of other layers or statistics."""
        start = state.get(_START)
        if start is None or len(start) != len(self.start):
            raise ValueError("gradual pruning: expected where the sparsity of these layers began, got another state")
        if self.statistics is not None:
            self.statistics.load_state_dict({name: tensor for name, tensor in state.items() if name != _START})
        self.start = dict(zip(self.start, start.tolist(), strict=True))
        self.sparsity = sparsity_of(self.model, self.filter_fn)


def add_masks_(model: nn.Module, config: PruningConfig, filter_fn: FilterFn | None = None) -> None:
    """Masks without zeros on the layers that `config` prunes, where they have none. Raises as `prune_`."""
    if config.layer_targets is None:
        prune_(model, config.pattern, 0.0, filter_fn=filter_fn)
    else:
        prune_layers_(model, {name: LayerTarget(t.pattern, 0.0) for name, t in config.layer_targets.items()})


def _named(names: Iterable[str]) -> FilterFn:
    chosen = frozenset(names)
    return lambda module, name: name in chosen


def _masks(model: nn.Module) -> dict[str, Tensor]:
    masks = {name: mask_of(layer) for name, layer in masked_layers(model).items()}
    return {name: mask.mask for name, mask in masks.items() if mask is not None}
