"""The best state of a training run, judged on texts that it does not train on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import TokenizedDataset
from .config import TrainingConfig
from .evaluate import accuracy, predict
from .state import check_tensors, model_tensors, restore_model

_BEST = "best."


@dataclass(frozen=True)
class Evaluation:
    """After how many steps, the fraction of validation examples that were right, and their mean cross-entropy."""

    step: int
    accuracy: float
    loss: float


class Validation:
    """Evaluates a model while it trains and keeps a copy of its best state.

    settled  evaluations begin after this many steps, when the model has its final form
    total    steps of the run; the last one is evaluated too

    Best is the highest accuracy, among equals the lowest loss, among equals the earliest.
    """

    def __init__(
        self, model: nn.Module, data: TokenizedDataset, config: TrainingConfig, settled: int, total: int
    ) -> None:
        self.model, self.data, self.config, self.settled, self.total = model, data, config, settled, total
        self.evaluations: list[Evaluation] = []
        self.kept: dict[str, Tensor] = {}

    def after_step(self, steps: int) -> None:
        """Evaluate if it is time; `steps` are done."""
        due = steps % self.config.evaluate_every == 0 or steps == self.total
        if steps < self.settled or not due:
            return
        logits = predict(self.model, self.data, dtype=torch.bfloat16 if self.config.bf16 else torch.float32)
        loss = F.cross_entropy(logits, self.data.labels).item()
        self.evaluations.append(Evaluation(steps, accuracy(logits, self.data.labels), loss))
        if self.best is self.evaluations[-1]:
            self.kept = {name: tensor.clone() for name, tensor in model_tensors(self.model).items()}

    @property
    def best(self) -> Evaluation | None:
        return max(self.evaluations, key=lambda e: (e.accuracy, -e.loss, -e.step), default=None)

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` evaluations brought nothing better."""
        patience = self.config.patience
        if patience is None or self.best is None:
            return False
        return len(self.evaluations) - 1 - self.evaluations.index(self.best) >= patience

    def restore_best(self) -> None:
        """Bring the model back to its best state, if one was kept."""
        if self.kept:
            restore_model(self.model, self.kept)

    def state_dict(self) -> dict[str, Tensor]:
        rows = [(e.step, e.accuracy, e.loss) for e in self.evaluations]
        evaluations = torch.tensor(rows, dtype=torch.float64).view(-1, 3)
        return {"evaluations": evaluations} | {_BEST + name: tensor for name, tensor in self.kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError for the state of another model."""
        evaluations = state.get("evaluations")
        if evaluations is None or evaluations.shape[1:] != (3,) or not bool(evaluations.isfinite().all()):
            raise ValueError("training state: expected evaluations of a step, an accuracy and a loss, got others")
        rows = evaluations.tolist()
        self.evaluations = [Evaluation(int(step), accuracy, loss) for step, accuracy, loss in rows]
        kept = {name.removeprefix(_BEST): tensor for name, tensor in state.items() if name.startswith(_BEST)}
        if kept:
            check_tensors(model_tensors(self.model), kept)
        self.kept = {name: kept[name].to(tensor.device) for name, tensor in model_tensors(self.model).items() if kept}
