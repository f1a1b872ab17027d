"""Everything a stopped run needs to go on, in one safetensors file written atomically."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..data import TokenizedDataset

FORMAT_VERSION = 1
_OPTIMIZER = "optimizer."
_MODEL = "model."


@dataclass(frozen=True)
class SavedState:
    """step      steps that are done
    tensors   parameters, buffers, optimizer, statistics, random state and losses by prefixed name
    """

    step: int
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it."""
        return {name[len(prefix) :]: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


def identity_of(config: object, data: TokenizedDataset, model: nn.Module) -> str:
    """A digest of the config, the data and the model's parameter names and shapes."""
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    return hashlib.sha256(f"{config!r}\n{data.fingerprint()}\n{shapes}".encode()).hexdigest()


def write_state(path: Path, identity: str, state: SavedState) -> None:
    """Replace `path` in one rename, after all is on disk; if that fails the earlier file stays. Raises OSError."""
    header = {"version": FORMAT_VERSION, "identity": identity, "step": state.step}
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state.tensors, partial, metadata={"sparsenlp": json.dumps(header)})
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"training state: cannot write {path}: {error}") from None


def check_state(path: Path, identity: str) -> None:
    """Raise ValueError as `read_state` does, from the header alone; a file that is not there is well."""
    if path.exists():
        with _opened(path, identity):
            pass


def read_state(path: Path, identity: str) -> SavedState | None:
    """The state in `path`, None if there is no such file.

    Raises ValueError for a file that is damaged or no training state, of another format version, or
    of a run with another config, data or model.
    """
    if not path.exists():
        return None
    with _opened(path, identity) as (step, file):
        return SavedState(step, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)


@contextmanager
def _opened(path: Path, identity: str) -> Iterator[tuple[int, Any]]:
    """(step, open safetensors file) after all that `read_state` checks."""
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"training state: expected a whole safetensors file, got {path}: {error}") from None
    with opened as file:
        header = json.loads((file.metadata() or {}).get("sparsenlp", "{}"))
        if header.get("version") != FORMAT_VERSION:
            raise ValueError(f"training state: expected format {FORMAT_VERSION} in {path}, got {header.get('version')}")
        if header["identity"] != identity:
            raise ValueError(
                f"training state: expected a run with this config, data and model, got another in {path}; "
                "remove the file to start anew"
            )
        yield int(header["step"]), file


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each shared one once."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {_MODEL + name: tensor.detach().contiguous() for name, tensor in named.items()}


@torch.no_grad()
def restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `model_tensors`, perhaps among others, into a model of the same structure."""
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        tensor.copy_(tensors[_MODEL + name])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter index and key."""
    return {
        f"{_OPTIMIZER}{index}.{key}": value.contiguous()
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, state: SavedState) -> None:
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.part(_OPTIMIZER).items():
        index, key = name.split(".")
        entries.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """The random generators that dropout draws from."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random(device: torch.device, tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
