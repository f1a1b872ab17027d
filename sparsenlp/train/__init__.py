"""Training: fine-tuning, recovery with gradual pruning and distillation, evaluation."""

from .config import FinetuneConfig, PruningConfig, RecoveryConfig
from .distill import CachedTeacher
from .evaluate import accuracy, agreement, cosine_similarity, kl_divergence, predict
from .finetune import finetune
from .incremental import IncrementalConfig, IncrementalLog, Round, prune_incrementally
from .loop import StepInfo, TrainingLog
from .perplexity import masked_perplexity, perplexity
from .recover import recover, training_texts
from .sequences import SequenceRecoveryConfig, recover_sequences, train_sequences
from .validation import Evaluation

__all__ = [
    "CachedTeacher",
    "Evaluation",
    "FinetuneConfig",
    "IncrementalConfig",
    "IncrementalLog",
    "PruningConfig",
    "RecoveryConfig",
    "Round",
    "SequenceRecoveryConfig",
    "StepInfo",
    "TrainingLog",
    "accuracy",
    "agreement",
    "cosine_similarity",
    "finetune",
    "kl_divergence",
    "masked_perplexity",
    "perplexity",
    "predict",
    "prune_incrementally",
    "recover",
    "recover_sequences",
    "train_sequences",
    "training_texts",
]
