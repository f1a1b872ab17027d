"""Gradual pruning inside the Trainer of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..prune import CRITERIA, finalize_
from ..prune.layers import FilterFn
from .config import PruningConfig
from .gradual import GradualPruner, add_masks_
from .state import SavedState, checksum

try:
    from transformers import TrainerCallback
except ImportError:
    raise ModuleNotFoundError(
        "PruningCallback: expected the package transformers, got none; pip install 'sparsenlp[hf]'"
    ) from None

STATISTICS_FILE = "sparsenlp_pruning.safetensors"
"""In each checkpoint of the Trainer, beside the model's weights and masks."""


class PruningCallback(TrainerCallback):
    """Prunes a model while the user's own Trainer trains it: loss, optimizer and schedule are the Trainer's.

    model      the model that the Trainer gets; masks without zeros are put on it here, so that the
               Trainer can load a checkpoint of an interrupted run into it
    config     sparsity, criterion and schedule; fractions are of the Trainer's optimizer steps
    filter_fn  which layers are pruned, as in `prune_`
    finalize   make the zeros permanent when training ends; else the caller calls `finalize_`

        Trainer(model, args, train_dataset=data, callbacks=[PruningCallback(model, PruningConfig(sparsity=0.8))])

    Gradients are read as the optimizer gets them: summed over accumulation steps, averaged over
    processes, clipped. `trainer.train(resume_from_checkpoint=...)` goes on as if there had been no
    interruption; it expects the checkpoint in args.output_dir. A model that was best before the masks
    were final is not counted as best.

    Checkpoints, and what trainer.save_model or model.save_pretrained write while masks are on, hold the ordinary
    weights with their zeros, which AutoModel loads, and beside them, for resuming, the masks and the values beneath;
    after `finalize_` they are as small as those of a dense model. sparsenlp.save_pretrained refuses masks.

    Raises as `prune_`, with the model untouched, and when training begins ValueError for a
    checkpoint without statistics, with damaged ones, or of a run with another config.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruningConfig | None = None,
        filter_fn: FilterFn | None = None,
        finalize: bool = False,
    ) -> None:
        self.model, self.config, self.filter_fn, self.finalize = model, config or PruningConfig(), filter_fn, finalize
        if "input_square" in CRITERIA[self.config.criterion].needs:
            raise ValueError(
                f"PruningCallback: expected a criterion of weights or gradients, got {self.config.criterion}"
            )
        add_masks_(model, self.config, filter_fn)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pruner = GradualPruner(self.model, self.config, state.max_steps, self.filter_fn)
        if state.global_step:
            self._load(_statistics_path(args, state))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pruner.before_step(state.global_step)
        if state.global_step == self.pruner.ramp_end:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pruner.after_backward(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            tensors = self.pruner.state_dict()
            metadata = {"config": repr(self.config), "crc32": str(checksum(SavedState(0, tensors)))}
            save_file(tensors, _statistics_path(args, state), metadata=metadata)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.finalize:
            finalize_(self.model)

    def _load(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"PruningCallback: expected statistics of the checkpoint in {path}, got {error}") from None
        with file:
            metadata = file.metadata() or {}
            if metadata.get("config") != repr(self.config):
                raise ValueError(
                    f"PruningCallback: expected a checkpoint of a run with this config, got another in {path}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("crc32") != str(checksum(SavedState(0, tensors))):
            raise ValueError(f"PruningCallback: expected statistics as they were saved, got damaged ones in {path}")
        self.pruner.load_state_dict(tensors)


def _statistics_path(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}", STATISTICS_FILE)
