"""What the attacks share: scratch folders, small checkpoints to spoil, and the words for what became of an attempt."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparsenlp import SparsifyConfig, save_pretrained, sparsify_
from sparsenlp.checkpoint import seal
from sparsenlp.prune import Block, finalize_, prune_
from sparsenlp.tensor_files import checksum, crc32_of, memory_of

torch.set_num_threads(1)  # a pool of threads would not survive a fork

MEASURE_OFF = SparsifyConfig(measure="off", min_sparsity=0.1)
WEIGHTS, CONFIG = "model.safetensors", "config.json"
SPARSE_PARTS = ("values", "crow_indices", "col_indices", "indices", "scales", "bias")


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder that goes away; outcomes name it "..."."""
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        yield Path(folder)


def quiet() -> None:
    """No progress bars and no warnings of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def mlp() -> nn.Module:
    """A dense skeleton of two linear layers, 16 -> 32 -> 8."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def bert() -> Any:
    """A dense BERT classifier of two layers."""
    from transformers import BertConfig, BertForSequenceClassification

    quiet()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=60, max_position_embeddings=32, **sizes)).eval()


def sparse(model: Any, block: tuple[int, int] = (8, 1)) -> Any:
    """The model with 70 % of its linear weights pruned in blocks, converted without measuring."""
    prune_(model, Block(*block), sparsity=0.7)
    finalize_(model)
    sparsify_(model, MEASURE_OFF)
    return model


def saved(model: Any, folder: Path) -> Path:
    """A checkpoint of a sparse model in `folder`/checkpoint."""
    return save_pretrained(model, folder / "checkpoint")


def edit_tensors(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the weights as `change` leaves them."""
    tensors = load_file(checkpoint / WEIGHTS)
    change(tensors)
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})


def edit_config(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite config.json as `change` leaves it."""
    config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    change(config)
    (checkpoint / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def seal_all(checkpoint: Path) -> None:
    """Make all checksums fit what is there, and name what is there."""
    config = json.loads((checkpoint / CONFIG).read_text())
    description = config["quantization_config"]
    tensors = load_file(checkpoint / WEIGHTS)
    sparse = {name for layer in description["modules"] for name in tensors if name.rpartition(".")[0] == layer}
    for layer, entry in description["modules"].items():
        entry["crc32"] = crc32_of(_parts(layer, tensors))
    description["tensors"] = {
        name: checksum(tensor.dtype, tensor.shape, memory_of(tensor))
        for name, tensor in tensors.items()
        if name not in sparse
    }
    description["crc32"] = seal(description)
    (checkpoint / CONFIG).write_text(json.dumps(config))


def _parts(layer: str, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensors[name] for part in SPARSE_PARTS if (name := f"{layer}.{part}") in tensors]


def doors(checkpoint: Path, folder: Path, only: str = "") -> dict[str, str]:
    """What became of a BERT checkpoint by every way to load it, or that one; what loads is run."""
    import transformers

    from sparsenlp import from_pretrained

    ways = {
        "from_pretrained": from_pretrained,
        "Auto with head": transformers.AutoModelForSequenceClassification.from_pretrained,
        "AutoModel": transformers.AutoModel.from_pretrained,
    }

    def load_and_run(way: str) -> str:
        model: Any = ways[way](checkpoint)
        model.eval()(torch.arange(3, 11)[None])
        return "loads and runs"

    return {way: attempt(lambda way=way: load_and_run(way), folder) for way in ways if only in ("", way)}  # type: ignore[misc]


def attempt(action: Callable[[], Any], folder: Path | None = None, limit: int = 170) -> str:
    """What an action says of itself in a few words, or how it was refused."""
    try:
        done = action()
    except Exception as error:
        message = " ".join(str(error).split())
        if folder is not None:
            message = message.replace(str(folder), "...")
        message = re.sub(r"/\S*/attack-\w+", "...", message)
        message = re.sub(r"\d{6,}", "#", message)  # checksums are of random weights
        return f"refused, {type(error).__name__}: {message[:limit]}{'...' if len(message) > limit else ''}"
    return "done" if done is None else str(done)


def outcome(attempts: Mapping[str, str]) -> None:
    """Print the one line of an attack; doors with the same answer share it."""
    doors: dict[str, list[str]] = {}
    for door, answer in attempts.items():
        doors.setdefault(answer, []).append(door)
    if len(doors) == 1 and len(attempts) > 1:
        print(f"by every door ({', '.join(attempts)}): {next(iter(doors))}")
    else:
        print(
            "; ".join(
                f"{' and '.join(names)}: {answer}" if len(attempts) > 1 else answer for answer, names in doors.items()
            )
        )


def copy_of(checkpoint: Path, name: str) -> Path:
    """The same files in a folder of that name beside it."""
    return Path(shutil.copytree(checkpoint, checkpoint.with_name(name)))
