"""Models of transformers: loading them, and of classifiers naming their classes and judging their predictions."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import CONFIG_FILE, METHOD, CheckpointError, from_pretrained, save_pretrained
from .models.own import OWN
from .train import accuracy, agreement, cosine_similarity, kl_divergence


@dataclass(frozen=True)
class Quality:
    """How well logits predict labels, and how close they are to another model's.

    majority    accuracy of always choosing the most frequent class
    agreement   fraction of examples on which both models choose the same class
    kl          mean KL(reference || model), nats
    cosine      of all logits taken as one vector
    The last three are None without a reference.
    """

    examples: int
    accuracy: float
    majority: float
    agreement: float | None = None
    kl: float | None = None
    cosine: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(logits: Tensor, labels: Tensor, reference: Tensor | None = None) -> Quality:
    """Compare logits (examples, classes) with labels (examples,) and with the logits of another model.

    Raises ValueError if the two models have different numbers of classes.
    """
    basics = (labels.numel(), accuracy(logits, labels), labels.bincount().max().item() / labels.numel())
    if reference is None:
        return Quality(*basics)
    if reference.shape != logits.shape:
        raise ValueError(f"judge: expected reference logits of shape {[*logits.shape]}, got {[*reference.shape]}")
    return Quality(
        *basics,
        agreement(logits, reference),
        kl_divergence(logits, reference),
        cosine_similarity(logits, reference),
    )


@dataclass(frozen=True)
class Head:
    """The classes a model is to predict.

    names    in the order of the outputs
    trained  False where the model has to be fine-tuned before it can predict them
    why      one sentence for the user where something was decided for them, else ""
    """

    names: list[str]
    trained: bool
    why: str = ""


def load_config(name: str) -> Any:
    """The transformers config of a model directory or hub id. Raises as `load_model`."""
    from transformers import AutoConfig

    with _loading(name):
        return AutoConfig.from_pretrained(name)


def load_tokenizer(name: str) -> Any:
    """The tokenizer that goes with a model. Raises as `load_model`."""
    from transformers import AutoTokenizer

    with _loading(name):
        return AutoTokenizer.from_pretrained(name)


def load_model(name: str, label_names: Sequence[str] | None = None) -> nn.Module:
    """A sequence classifier, or any of our own models, in eval mode: a dense or sparsenlp directory, or a hub id.

    label_names  classes to give a classifier; a head of another size starts from random weights, the same
                 ones every time

    Raises ModuleNotFoundError without transformers, FileNotFoundError for a directory that does not
    exist, CheckpointError for a damaged sparsenlp checkpoint, and ValueError for anything else that
    transformers cannot load.
    """
    with _loading(name):
        if is_sparse_checkpoint(name):
            return from_pretrained(name)
        import transformers

        own = OWN.get(transformers.AutoConfig.from_pretrained(name).model_type)
        Auto = getattr(transformers, own.auto if own is not None else "AutoModelForSequenceClassification")
        labels: dict[str, Any] = {}
        if label_names is not None:
            id2label = dict(enumerate(label_names))
            labels = {"id2label": id2label, "label2id": {n: i for i, n in id2label.items()}}
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = Auto.from_pretrained(
                name, dtype=torch.float32, ignore_mismatched_sizes=label_names is not None, **labels
            )
    return model.eval()


def load_language_model(name: str) -> nn.Module:
    """A dense causal language model in eval mode, float32, with nn.Linear layers. Raises as `load_model`."""
    with _loading(name):
        from transformers import AutoModelForCausalLM as Auto

        model = Auto.from_pretrained(name, dtype=torch.float32)
    from .models.decoders import conv1d_to_linear_

    return conv1d_to_linear_(model).eval()


def save_model(model: nn.Module, directory: str | os.PathLike, tokenizer: Any = None) -> None:
    """`save_pretrained` without transformers' own progress bar."""
    with silent_transformers():
        save_pretrained(model, directory, tokenizer)


def is_sparse_checkpoint(name: str) -> bool:
    """Whether a directory says of itself that it holds sparse layers of ours."""
    path = Path(name, CONFIG_FILE)
    if not path.is_file():
        return False
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    block = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(block, Mapping) and block.get("quant_method") == METHOD and block.get("modules") != {}


def label_names_of(config: Any) -> list[str]:
    """Class names of a transformers config, in the order of the outputs."""
    return [str(config.id2label[i]) for i in range(len(config.id2label))]


def has_generic_names(config: Any) -> bool:
    """Whether the classes are called LABEL_0, LABEL_1, ..., as transformers does when nobody named them."""
    return label_names_of(config) == [f"LABEL_{i}" for i in range(len(config.id2label))]


def choose_head(config: Any, labels: Sequence[str], retrain: bool = False) -> Head:
    """Match a model's classes with the labels of a data file (each once, in the order new classes get).

    retrain  the model will be fine-tuned anyway, so that its classes may be renamed

    Raises ValueError if a trained model has as many classes as the file, but under other names.
    """
    names = label_names_of(config)
    if not any("ForSequenceClassification" in cls for cls in config.architectures or ()):
        return Head([*labels], False, "the model has no trained classification head")
    if set(labels) <= set(names):
        return Head(names, not retrain)
    if len(labels) != len(names):
        return Head([*labels], False, f"the model has {len(names)} classes and the data {len(labels)}")
    if retrain:
        return Head([*labels], False)
    if has_generic_names(config):
        return Head([*labels], True, f"the model's classes have no names; taken to be {', '.join(labels)}, in order")
    raise ValueError(
        f"labels: expected the model's classes {', '.join(names)}, got {', '.join(labels)}; "
        "rename them in the data, or train the model on them with --finetune-epochs"
    )


def max_tokens(config: Any, tokenizer: Any = None) -> int | None:
    """Longest sequence a model takes, as far as its config and tokenizer tell."""
    limits = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**6]
    return min(known, default=None)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Refuse in one line what cannot be loaded."""
    if importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError("expected the package transformers, got none; pip install 'sparsenlp[hf]'")
    if _looks_like_path(name) and not Path(name).is_dir():
        raise FileNotFoundError(f"model: expected a directory, got {name}")
    from huggingface_hub.errors import HFValidationError
    from safetensors import SafetensorError

    try:
        with silent_transformers():
            yield
    except CheckpointError:
        raise
    except (OSError, ValueError, HFValidationError, SafetensorError) as error:
        raise ValueError(f"model: cannot load {name}: {_first_line(error)}") from error


@contextmanager
def silent_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers within the `with` block."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _looks_like_path(name: str) -> bool:
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or os.sep in name[-1:]


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
