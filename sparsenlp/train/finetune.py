"""Fine-tuning on labels; masks, where the model has them, are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ..data import TokenizedDataset
from .config import FinetuneConfig, TrainingConfig
from .forward import check_classes, device_of, forward
from .loop import SAVE_SECONDS, OnStep, StateFile, TrainingLog, run
from .state import check_state, identity_of


def finetune(
    model: nn.Module,
    data: TokenizedDataset,
    config: FinetuneConfig | None = None,
    state_path: str | Path | None = None,
    save_every: int | None = None,
    quiet: bool = False,
    on_step: OnStep | None = None,
    validation: TokenizedDataset | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> TrainingLog:
    """Train a transformers sequence classifier on labels, in place.

    state_path  file to resume from if it exists; written every `save_seconds`, every `save_every` steps where
                that is said, at the end, and on Ctrl-C or SIGTERM. The caller deletes it when the result is safe.
    on_step     called after each step
    validation  other texts: the model is evaluated on them every config.evaluate_every steps, ends as the
                best that it was, and stops early if config.patience says so

    In a process group (torchrun and init_process_group("gloo")) the processes share the work, as `loop.run` says.

    Raises ValueError, with the model untouched, for labels beyond the model's classes or a state
    file of another run; FloatingPointError and KeyboardInterrupt as `loop.run` says; OSError if the
    state cannot be written.
    """
    config = config or FinetuneConfig()
    check_classes(model, data)
    check_validation(model, validation)
    state_file = open_state(state_path, (save_every, save_seconds), config, data, model, validation)
    return run(model, data, LabelTask(model, data, config), config, state_file, quiet, on_step, validation)


def check_validation(model: nn.Module, validation: TokenizedDataset | None) -> None:
    """Raise ValueError for validation labels beyond the model's classes."""
    if validation is not None:
        check_classes(model, validation)


def open_state(
    path: str | Path | None,
    due: tuple[int | None, float],
    config: object,
    data: TokenizedDataset,
    model: nn.Module,
    validation: TokenizedDataset | None,
) -> StateFile | None:
    """The state file of a run, checked if it exists; None without a path. Raises ValueError as `read_state`.

    due  the number of steps (or None) and of seconds after which it is written again
    """
    if path is None:
        return None
    every, seconds = due
    if every is not None and every < 1:
        raise ValueError(f"save_every: expected at least 1, got {every}")
    if not seconds >= 0:
        raise ValueError(f"save_seconds: expected at least 0, got {seconds}")
    identity = identity_of((config, validation and validation.fingerprint()), data, model)
    check_state(Path(path), identity)
    return StateFile(Path(path), identity, every, seconds)


class LabelTask:
    """Cross-entropy with the labels; no state of its own."""

    name = "finetune"
    restart = settled = 0

    def __init__(self, model: nn.Module, data: TokenizedDataset, config: TrainingConfig) -> None:
        self.model, self.data, self.config = model, data, config

    def before_step(self, step: int) -> None:
        pass

    def undo_step(self) -> None:
        pass

    def loss(self, indices: Sequence[int]) -> Tensor:
        logits = forward(self.model, self.data.batch(indices), bf16=self.config.bf16).logits.float()
        return F.cross_entropy(logits, self.data.labels[list(indices)].to(device_of(self.model)))

    def after_backward(self, step: int) -> None:
        pass

    def note(self) -> str:
        return ""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass
