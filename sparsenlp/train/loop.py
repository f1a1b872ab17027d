"""The training loop that fine-tuning and recovery share: one optimizer, resumable, stoppable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..data import TokenizedDataset, shuffled_batches
from ..interrupt import InterruptRequest
from ..modes import mode
from .config import TrainingConfig
from .distributed import Processes, current_processes
from .forward import device_of, frozen_embeddings, plain_attention
from .progress import progress_bar
from .sparse_steps import sparse_steps
from .state import (
    MODEL,
    OPTIMIZER,
    SavedState,
    check_tensors,
    model_tensors,
    optimizer_tensors,
    random_tensors,
    read_state,
    restore_model,
    restore_optimizer,
    restore_random,
    write_state,
)
from .validation import Evaluation, Validation

SAVE_SECONDS = 60.0
"""How long a run that is killed may have to repeat."""
PAUSES = 20
"""So much longer than it takes to write the state is the time between two such writes."""

_TASK = "task."
_VALIDATION = "validation."
_PREFIXES = (_TASK, _VALIDATION, MODEL, OPTIMIZER)


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
    evaluations   on the validation texts, those before a resumption included
    best          of the evaluations; the model is in the state it had then
    """

    losses: list[float]
    seconds: float
    steps: int
    evaluations: list[Evaluation] = field(default_factory=list)
    best: Evaluation | None = None

    @property
    def steps_per_second(self) -> float:
        return self.steps / self.seconds if self.steps else math.nan


class Task(Protocol):
    """What a kind of training adds to the loop.

    restart  step at which the learning-rate schedule begins anew; 0 for one schedule
    settled  steps after which the model has its final form, so that its state may be kept as the best
    """

    name: str
    restart: int
    settled: int

    def before_step(self, step: int) -> None:
        """Called before the forward pass of `step`, counted from 0."""

    def undo_step(self) -> None:
        """Take back what the last `before_step` did to the model."""

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
    """Where the state is resumed from, and written in between, at the end, on Ctrl-C and on SIGTERM.

    every    steps; None: no number of them makes it due
    seconds  since it was last written, but at least PAUSES times what writing it takes
    """

    path: Path
    identity: str
    every: int | None = None
    seconds: float = SAVE_SECONDS


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
    validation: TokenizedDataset | None = None,
) -> TrainingLog:
    """Train `model` in place, from the saved state if there is one; with validation texts it ends as the best it was.

    A resumed run continues exactly where it stopped: batches depend on (seed, epoch) alone, and
    parameters, masks, optimizer, statistics and random state come from the file. torch's global
    random state is left as it was.

    In a process group (torchrun) all processes call this alike. Each trains on a part of every batch,
    gradients are averaged, and all end with the same model, that of one process up to rounding and
    dropout. The first one writes the state, which all must be able to read.

    Raises FloatingPointError for a loss or a gradient that is not finite. The model and the state file
    are then as before that step, or the model as the best it was. Raises KeyboardInterrupt on Ctrl-C, and its
    subclass Terminated on SIGTERM, once the step under way is done and the state written.
    """
    processes = current_processes()
    total = total_steps(data, config)
    started = time.perf_counter()
    with _training(model, config), InterruptRequest() as interrupt:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, config.learning_rate, config.betas, weight_decay=0.0, fused=True)
        best = Validation(model, validation, config, task.settled, total) if validation is not None else None
        state = _Run(model, task, optimizer, state_file, best, processes)
        state.restore()
        first = len(state.losses)
        if not processes.same(first):
            raise ValueError(
                f"training state: expected the same step in all processes, got {first} in {processes.rank}"
            )
        processes.copy_from_first(model)
        batches = _batches(data, config, first) if not state.stopped_early else iter(())
        with progress_bar(task.name.capitalize(), total, first, quiet or processes.rank > 0) as advance:
            for step, indices in batches:
                random = random_tensors(device_of(model))
                try:
                    loss = _step(step, indices, task, optimizer, parameters, config, total, processes)
                except FloatingPointError as error:
                    raise FloatingPointError(f"{error}; {state.keep_last_good(parameters, random)}") from None
                state.losses.append(loss)
                if best is not None:
                    best.after_step(step + 1)
                advance(f"loss {loss:.3f}  {task.note()}")
                if on_step is not None:
                    on_step(StepInfo(step + 1, total, loss, task.note()))
                stop = processes.any(interrupt.pending is not None)
                last = step + 1 == total or state.stopped_early
                if stop or last or state.is_due:
                    state.save()
                if stop:
                    raise (interrupt.pending or KeyboardInterrupt)(_stopped(task, step + 1, total, state_file))
                if last:
                    break
        if best is not None:
            best.restore_best()
    evaluations = (best.evaluations, best.best) if best is not None else ([], None)
    return TrainingLog(state.losses, time.perf_counter() - started, len(state.losses) - first, *evaluations)


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
    gradients = [p.grad for p in parameters if p.grad is not None]
    processes.sum_(gradients)
    norm = nn.utils.get_total_norm(gradients)
    if not math.isfinite(norm):
        raise FloatingPointError(f"{task.name}: expected a finite gradient, got {norm} at step {step + 1} of {total}")
    task.after_backward(step)
    nn.utils.clip_grads_with_norm_(parameters, config.max_gradient_norm, norm)
    begin, end = (task.restart, total) if step >= task.restart else (0, task.restart)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step - begin, end - begin, config)
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
        stack.enter_context(sparse_steps(model, config.sparse_kernels))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.callback(model.zero_grad)
        torch.manual_seed(config.seed)
        yield


class _Run:
    """All that a run's state consists of."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        optimizer: torch.optim.Optimizer,
        file: StateFile | None,
        best: Validation | None,
        processes: Processes,
    ) -> None:
        self.model, self.task, self.optimizer, self.file = model, task, optimizer, file
        self.best, self.processes = best, processes
        self.losses: list[float] = []
        self.written, self.writing = time.monotonic(), 0.0

    @property
    def is_due(self) -> bool:
        """Whether it is time to write the state."""
        if self.file is None:
            return False
        by_steps = self.file.every is not None and len(self.losses) % self.file.every == 0
        return by_steps or time.monotonic() - self.written >= max(self.file.seconds, PAUSES * self.writing)

    @property
    def stopped_early(self) -> bool:
        return self.best is not None and self.best.exhausted

    def save(self) -> None:
        """Write the state, where there is a file and this is the first process."""
        if self.file is None or self.processes.rank > 0:
            return
        began = time.monotonic()
        parts = {_TASK: self.task.state_dict(), _VALIDATION: self.best.state_dict() if self.best is not None else {}}
        tensors = {
            **model_tensors(self.model),
            **optimizer_tensors(self.optimizer),
            **{prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()},
            **random_tensors(device_of(self.model)),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }
        write_state(self.file.path, self.file.identity, SavedState(len(self.losses), tensors))
        self.written = time.monotonic()
        self.writing = self.written - began

    def restore(self) -> bool:
        """Bring everything to where the saved run stopped; False if there is no saved state."""
        saved = read_state(self.file.path, self.file.identity) if self.file is not None else None
        if saved is None:
            return False
        random = random_tensors(device_of(self.model)) | {
            "losses": torch.empty(saved.step, dtype=torch.float64, device="meta")
        }
        check_tensors(random, {name: t for name, t in saved.tensors.items() if not name.startswith(_PREFIXES)})
        check_tensors(self.task.state_dict(), saved.part(_TASK))
        if self.best is not None:
            self.best.load_state_dict(saved.part(_VALIDATION))
        restore_optimizer(self.optimizer, saved)
        restore_model(self.model, saved.tensors)
        self.task.load_state_dict(saved.part(_TASK))
        restore_random(device_of(self.model), saved.tensors)
        self.losses = saved.tensors["losses"].tolist()
        return True

    def keep_last_good(self, parameters: Sequence[nn.Parameter], random: Mapping[str, Tensor]) -> str:
        """Undo a step that failed and save the state before it; says in which state the model is."""
        self.task.undo_step()
        restore_random(device_of(self.model), random)
        if all(bool(parameter.isfinite().all()) for parameter in parameters):
            self.save()
        elif not self.restore() and (self.best is None or not self.best.kept):
            return "the model's weights are not finite and no earlier state was kept"
        saved = f", saved in {self.file.path}" if self.file is not None else ""
        if self.best is not None and self.best.best is not None:
            self.best.restore_best()
            return f"the model is the best one, of step {self.best.best.step}{saved}"
        return f"the model is as after step {len(self.losses)}{saved}"


def _stopped(task: Task, step: int, total: int, file: StateFile | None) -> str:
    text = f"{task.name}: stopped after step {step} of {total}"
    return f"{text}; the same call resumes from {file.path}" if file is not None else text
