"""The training loop that fine-tuning and recovery share: one optimizer, resumable, stoppable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..data import TokenizedDataset, shuffled_batches
from .config import TrainingConfig
from .distributed import Processes, current_processes
from .forward import device_of, frozen_embeddings, mode, plain_attention
from .interrupt import InterruptRequest
from .progress import progress_bar
from .state import (
    SavedState,
    model_tensors,
    optimizer_tensors,
    random_tensors,
    read_state,
    restore_model,
    restore_optimizer,
    restore_random,
    write_state,
)

_TASK = "task."


@dataclass(frozen=True)
class StepInfo:
    """What `on_step` is told after a step: its number from 1, of how many, the loss, and the task's note."""

    step: int
    total: int
    loss: float
    note: str


OnStep = Callable[[StepInfo], None]


@dataclass(frozen=True)
class TrainingLog:
    """losses   of every step, those before a resumption included
    seconds  wall time of this call
    steps    done in this call
    """

    losses: list[float]
    seconds: float
    steps: int

    @property
    def steps_per_second(self) -> float:
        return self.steps / self.seconds if self.steps else math.nan


class Task(Protocol):
    """What a kind of training adds to the loop."""

    name: str

    def before_step(self, step: int) -> None:
        """Called before the forward pass of `step`, counted from 0."""

    def loss(self, indices: Sequence[int]) -> Tensor:
        """The mean loss of these examples, 0-d; of several processes each is asked about a part of the batch."""

    def after_backward(self, step: int) -> None:
        """Called when the gradients of the whole batch are there, before they are clipped."""

    def note(self) -> str:
        """A few words for the progress bar."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class StateFile:
    """Where the state is resumed from, and written every `every` steps, at the end and on Ctrl-C."""

    path: Path
    identity: str
    every: int


def total_steps(data: TokenizedDataset, config: TrainingConfig) -> int:
    return config.epochs * math.ceil(len(data) / config.batch_size)


def run(
    model: nn.Module,
    data: TokenizedDataset,
    task: Task,
    config: TrainingConfig,
    state_file: StateFile | None = None,
    quiet: bool = False,
    on_step: OnStep | None = None,
) -> TrainingLog:
    """Train `model` in place, from the saved state if there is one.

    A resumed run continues exactly where it stopped: batches depend on (seed, epoch) alone, and
    parameters, masks, optimizer, statistics and random state come from the file. torch's global
    random state is left as it was.

    In a process group (torchrun) all processes call this alike. Each trains on a part of every batch,
    gradients are averaged, and all end with the same model, that of one process up to rounding and
    dropout. The first one writes the state, which all must be able to read.

    Raises FloatingPointError for a loss that is not finite, before that step changes anything, and
    KeyboardInterrupt on Ctrl-C, once the step under way is done and the state written.
    """
    processes = current_processes()
    total = total_steps(data, config)
    started = time.perf_counter()
    with _training(model, config), InterruptRequest() as interrupt:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, config.learning_rate, config.betas, weight_decay=0.0, fused=True)
        losses = _restore(state_file, model, optimizer, task)
        first = len(losses)
        if not processes.same(first):
            raise ValueError(
                f"training state: expected the same step in all processes, got {first} in {processes.rank}"
            )
        processes.copy_from_first(model)
        with progress_bar(task.name.capitalize(), total, first, quiet or processes.rank > 0) as advance:
            for step, indices in _batches(data, config, first):
                losses.append(_step(step, indices, task, optimizer, parameters, config, total, processes))
                advance(f"loss {losses[-1]:.3f}  {task.note()}")
                if on_step is not None:
                    on_step(StepInfo(step + 1, total, losses[-1], task.note()))
                stop = processes.any(interrupt.pending)
                due = stop or step + 1 == total or (state_file is not None and (step + 1) % state_file.every == 0)
                if state_file is not None and due and processes.rank == 0:
                    _save(state_file, model, optimizer, task, losses)
                if stop:
                    raise KeyboardInterrupt(_stopped(task, step + 1, total, state_file))
    return TrainingLog(losses, time.perf_counter() - started, len(losses) - first)


def learning_rate(step: int, total: int, config: TrainingConfig) -> float:
    """Linear warm-up to config.learning_rate, then linear decay towards 0 at `total`."""
    warmup = int(config.warmup_fraction * total) + 1
    return config.learning_rate * min((step + 1) / warmup, (total - step) / max(total - warmup, 1))


def _step(
    step: int,
    indices: Sequence[int],
    task: Task,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    config: TrainingConfig,
    total: int,
    processes: Processes,
) -> float:
    """One optimizer step; returns the loss."""
    processes.seed(config.seed, step)
    task.before_step(step)
    loss = task.loss(processes.shard(indices)) * processes.weight(indices)
    value = processes.total(loss.item())
    if not math.isfinite(value):
        raise FloatingPointError(f"{task.name}: expected a finite loss, got {value} at step {step + 1} of {total}")
    loss.backward()
    processes.sum_(p.grad for p in parameters if p.grad is not None)
    task.after_backward(step)
    nn.utils.clip_grad_norm_(parameters, config.max_gradient_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, total, config)
    optimizer.step()
    optimizer.zero_grad()
    return value


def _batches(data: TokenizedDataset, config: TrainingConfig, first: int) -> Iterator[tuple[int, list[int]]]:
    """(step, example indices) from step `first` to the end."""
    lengths = data.lengths
    per_epoch = math.ceil(len(data) / config.batch_size)
    for epoch in range(first // per_epoch, config.epochs):
        for i, indices in enumerate(shuffled_batches(lengths, config.batch_size, config.seed, epoch)):
            if epoch * per_epoch + i >= first:
                yield epoch * per_epoch + i, indices


@contextmanager
def _training(model: nn.Module, config: TrainingConfig) -> Iterator[None]:
    """Everything that holds while training and is undone afterwards, on errors too."""
    device = device_of(model)
    with ExitStack() as stack:
        stack.enter_context(mode(model, training=config.dropout))
        stack.enter_context(frozen_embeddings(model, config.freeze_embeddings))
        if config.bf16:
            stack.enter_context(plain_attention(model))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.callback(model.zero_grad)
        torch.manual_seed(config.seed)
        yield


def _save(
    file: StateFile, model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, losses: Sequence[float]
) -> None:
    tensors = {
        **model_tensors(model),
        **optimizer_tensors(optimizer),
        **{_TASK + name: tensor for name, tensor in task.state_dict().items()},
        **random_tensors(device_of(model)),
        "losses": torch.tensor(losses, dtype=torch.float64),
    }
    write_state(file.path, file.identity, SavedState(len(losses), tensors))


def _restore(file: StateFile | None, model: nn.Module, optimizer: torch.optim.Optimizer, task: Task) -> list[float]:
    """Bring everything to where the saved run stopped; returns its losses, one per step, none without a state."""
    saved = read_state(file.path, file.identity) if file is not None else None
    if saved is None:
        return []
    restore_model(model, saved)
    restore_optimizer(optimizer, saved)
    task.load_state_dict(saved.part(_TASK))
    restore_random(device_of(model), saved.tensors)
    return saved.tensors["losses"].tolist()


def _stopped(task: Task, step: int, total: int, file: StateFile | None) -> str:
    text = f"{task.name}: stopped after step {step} of {total}"
    return f"{text}; the same call resumes from {file.path}" if file is not None else text
