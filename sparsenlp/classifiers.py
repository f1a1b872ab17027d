"""Models of transformers: loading them, how long a text they take, and how good the predictions of classifiers are."""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import CONFIG_FILE, METHOD, CheckpointError, from_pretrained, save_pretrained
from .heads import named_class
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


def load_model(name: str, label_names: Sequence[str] | None = None, trained: bool = False) -> nn.Module:
    """A model in eval mode, float32: of a dense or sparsenlp directory, or a hub id.

    label_names  classes to give a sequence classifier; a head of another size, or one that is not there, starts from
                 random weights, the same ones every time. Without them the model is what its config.json names, with
                 all its weights
    trained      the head must be there, too

    Warns of weights that the class has no place for. Raises ModuleNotFoundError without transformers,
    FileNotFoundError for a directory that does not exist, CheckpointError for a damaged sparsenlp checkpoint, and
    ValueError for weights that are missing, and for anything else that transformers cannot load.
    """
    with _loading(name):
        if is_sparse_checkpoint(name):
            return from_pretrained(name)
        options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        if label_names is None:
            loader = named_class(load_config(name))
        else:
            from transformers import AutoModelForSequenceClassification as loader

            id2label = dict(enumerate(label_names))
            options |= {"id2label": id2label, "label2id": {n: i for i, n in id2label.items()}}
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model, info = loader.from_pretrained(name, **options)
        _check_weights(model, info, new_head=label_names is not None and not trained)
    if label_names is None and info["unexpected_keys"]:
        warnings.warn(
            f"{name}: {type(model).__name__} has no place for {_some(info['unexpected_keys'])}, left out", stacklevel=2
        )
    return model.eval()


def _check_weights(model: Any, info: Mapping[str, Any], new_head: bool) -> None:
    """Raise ValueError if weights are random because the files lack them; those of a new head and pooler may be."""
    absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    inside = f"{model.base_model_prefix}."
    lacking = {key for key in absent if not new_head or (key.startswith(inside) and "pooler" not in key.split("."))}
    if lacking:
        raise ValueError(
            f"expected all weights of {type(model).__name__}, got none of the right shape for {_some(lacking)}, which "
            "would be random"
        )


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


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


def max_tokens(config: Any, tokenizer: Any = None) -> int | None:
    """Longest sequence a model takes, as far as its config, its embeddings (see `max_positions`) and tokenizer tell."""
    limits = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    if isinstance(limits[0], int) and getattr(config, "pad_token_id", None) is not None:
        limits.append(max_positions(_skeleton(config)))
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**6]
    return min(known, default=None)


def max_positions(model: Any) -> int | None:
    """Longest sequence that a model has positions for, None if its config does not say.

    Families that follow RoBERTa count positions from the number of the padding token, and those up to it are lost.
    """
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    lost = [
        table.padding_idx + 1
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and table.num_embeddings == limit and "position" in name
        if table.padding_idx is not None
    ]
    return limit - max(lost, default=0)


def _skeleton(config: Any) -> Any:
    """A model of that config without weights; None where transformers cannot build one by the config alone."""
    from transformers import AutoModel

    try:
        with silent_transformers(), torch.device("meta"):
            return AutoModel.from_config(config)
    except (ImportError, RuntimeError, ValueError):
        return None


def match_padding_(model: Any, tokenizer: Any) -> None:
    """Give the config of a classifier the tokenizer's padding token where it decides which token is a text's last.

    Warns if that changes it. Decoders read the last token before the padding, and refuse batches without one.
    """
    config = model.config.get_text_config()
    known, pad = getattr(config, "pad_token_id", None), tokenizer.pad_token_id
    if pad is None or known == pad or (known is not None and not hasattr(model, "score")):
        return
    config.pad_token_id = pad
    warnings.warn(
        f"pad_token_id: the model's config has {known}, the tokenizer pads with {pad}, which is used",
        stacklevel=2,
    )


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
