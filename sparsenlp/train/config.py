"""What a training run is made of; a run can be repeated from its config, data and model alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..prune import CRITERIA, Block, LayerTarget, Pattern
from ..prune.masks import SCOPES, check_sparsity
from .relations import RELATIONS


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What fine-tuning and recovery share. AdamW without weight decay, linear warm-up, linear decay to 0.

    epochs             passes over the data
    batch_size         examples per step
    learning_rate      its peak, reached after the warm-up
    warmup_fraction    share of all steps
    betas              AdamW's
    max_gradient_norm  gradients are clipped to this global L2 norm
    freeze_embeddings  do not train parameters of embedding modules
    dropout            train with the model's dropout; without it the model runs in eval mode
    bf16               autocast to bfloat16; parameters stay in their own dtype
    sparse_kernels     compute with sparse kernels in layers whose masks make that faster (see `sparse_steps`)
    seed               of the batches and of dropout
    evaluate_every     steps between evaluations where there are validation texts
    patience           evaluations without a better one after which training stops; None: never
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 5e-5
    warmup_fraction: float = 0.04
    betas: tuple[float, float] = (0.9, 0.98)
    max_gradient_norm: float = 1.0
    freeze_embeddings: bool = False
    dropout: bool = True
    bf16: bool = True
    sparse_kernels: bool = True
    seed: int = 0
    evaluate_every: int = 50
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "evaluate_every"):
            _require(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        for name in ("learning_rate", "max_gradient_norm"):
            _require(name, getattr(self, name) > 0, "a positive number", getattr(self, name))
        _require("patience", self.patience is None or self.patience >= 1, "at least 1", self.patience)
        _require("warmup_fraction", 0 <= self.warmup_fraction < 1, "a fraction in [0, 1)", self.warmup_fraction)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Training on the labels alone (see TrainingConfig)."""


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """How sparsity rises while a model trains.

    pattern, sparsity, criterion, scope   as in `prune_`; the criterion by its name, and what it needs is collected
                        while training, from gradients before they are clipped or from the inputs of layers
    ramp_fraction       share of all steps in which sparsity rises (cubic); then the masks are frozen
    update_every        steps between two updates of the masks
    statistics_decay    of the running means that "taylor", "fisher" and "wanda" use; sums do not decay
    layer_targets       a pattern and final sparsity for each layer, such as `allocate` chooses, instead of one
                        pattern, sparsity and scope for all; layers that it does not name stay dense
    """

    pattern: Pattern = field(default=Block(8, 1))
    sparsity: float = 0.9
    criterion: str = "taylor"
    scope: str = "global"
    ramp_fraction: float = 0.5
    update_every: int = 10
    statistics_decay: float = 0.95
    layer_targets: Mapping[str, LayerTarget] | None = None

    def __post_init__(self) -> None:
        check_sparsity(self.pattern, self.sparsity)
        _require("criterion", self.criterion in CRITERIA, f"one of {', '.join(CRITERIA)}", self.criterion)
        _require("scope", self.scope in SCOPES, f"one of {', '.join(SCOPES)}", self.scope)
        _require("ramp_fraction", 0 <= self.ramp_fraction <= 1, "a fraction in [0, 1]", self.ramp_fraction)
        _require("update_every", self.update_every >= 1, "at least 1", self.update_every)
        _require("statistics_decay", 0 <= self.statistics_decay < 1, "a number in [0, 1)", self.statistics_decay)
        _require("layer_targets", self.layer_targets is None or self.layer_targets, "some or None", self.layer_targets)


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig(PruningConfig, TrainingConfig):
    """Gradual pruning with distillation from the dense model (see PruningConfig and TrainingConfig for the rest).

    spliced             texts without labels that `splice` makes for each training text, to imitate the teacher
                        on; an epoch passes over them, too
    rewind              run the learning-rate schedule once over the ramp and again after it (Renda et al.
                        2020, arXiv:2003.02389), not once over all steps
    int8_fraction       share of all steps, the last ones, that train with the pruned layers' weights rounded
                        as `quantize` does; after `finalize_` int8 layers then compute with these very weights
    label_weight        of the cross-entropy with the labels; a text without one adds nothing to the mean
    distill_weight      of KL(teacher || student) of the logits
    temperature         that the logits are divided by in that KL
    hidden_weight       of the mean squared error of hidden states, relative to the teacher's mean
                        square, averaged over layers; 0 for models whose layers do not correspond
    relation_weight     of the KL of how tokens relate in the last self-attention (see `relation_loss`)
    relations           which: "attention", "queries", "keys", "values"
    relation_heads      relations per token and kind; None for the student's attention heads
    cache_gib           the teacher's outputs are computed once if they fit in this much memory, else
                        in every step

    The defaults recovered MiniLM-L6 best among those tried; 3 epochs of 7,000 sentences.
    """

    spliced: float = 1.0
    rewind: bool = False
    int8_fraction: float = 0.0
    label_weight: float = 0.3
    distill_weight: float = 4.0
    temperature: float = 2.0
    hidden_weight: float = 1.0
    relation_weight: float = 0.0
    relations: tuple[str, ...] = ("attention", "values")
    relation_heads: int | None = None
    cache_gib: float = 2.0
    learning_rate: float = 3e-4
    freeze_embeddings: bool = True
    dropout: bool = False

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        PruningConfig.__post_init__(self)
        rest = 1 - self.ramp_fraction
        _require("int8_fraction", 0 <= self.int8_fraction <= rest, "at most 1 - ramp_fraction", self.int8_fraction)
        _require("spliced", self.spliced >= 0, "a number of at least 0", self.spliced)
        _require("temperature", self.temperature > 0, "a positive number", self.temperature)
        known = len(self.relations) > 0 and set(self.relations) <= set(RELATIONS)
        _require("relations", known, f"some of {', '.join(RELATIONS)}", ", ".join(self.relations) or "none")
        heads = self.relation_heads
        _require("relation_heads", heads is None or heads >= 1, "at least 1", heads)
        weights = (self.label_weight, self.distill_weight, self.hidden_weight, self.relation_weight)
        _require("loss weights", min(weights) >= 0 and max(weights) > 0, "none negative and one positive", weights)


def _require(name: str, valid: object, expected: str, got: object) -> None:
    if not valid:
        raise ValueError(f"{name}: expected {expected}, got {got}")
