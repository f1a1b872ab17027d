"""Everything a stopped run needs to go on, in one safetensors file written atomically.

What is read is never trusted: the file has a checksum over all its tensors, and each must have the name, shape and
dtype that this run would write.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
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
from ..files import open_regular

FORMAT_VERSION = 2
_ANEW = "remove the file to start anew"
OPTIMIZER = "optimizer."
MODEL = "model."


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
    header = {"version": FORMAT_VERSION, "identity": identity, "step": state.step, "crc32": checksum(state)}
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
    """Raise ValueError as `read_state` does; a file that is not there is well."""
    read_state(path, identity)


def read_state(path: Path, identity: str) -> SavedState | None:
    """The state in `path`, None if there is no such file.

    Raises ValueError for a file that is damaged or no training state, of another format version, or
    of a run with another config, data or model.
    """
    if not path.exists():
        return None
    with _opened(path, identity) as (header, file):
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    state = SavedState(header["step"], tensors)
    if header["crc32"] != checksum(state):
        raise ValueError(f"training state: expected the tensors that were written to {path}, got others; {_ANEW}")
    return state


def checksum(state: SavedState) -> int:
    """Over the step and the name, dtype, shape and bytes of each tensor."""
    crc = zlib.crc32(str(state.step).encode())
    for name, tensor in sorted(state.tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


@contextmanager
def _opened(path: Path, identity: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """(header, open safetensors file) after all that the header tells."""
    try:
        with open_regular(path, None, "rb"):
            opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"training state: expected a whole safetensors file, got {path}: {error}; {_ANEW}") from None
    with opened as file:
        header = _header((file.metadata() or {}).get("sparsenlp", "{}"))
        version = header.get("version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"training state: expected format {FORMAT_VERSION} in {path}, got {version!r:.40}; {_ANEW}"
            )
        if {name: type(value) for name, value in header.items()} != _HEADER or not 0 <= header["step"] < 2**31:
            raise ValueError(f"training state: expected a header with {', '.join(_HEADER)} in {path}; {_ANEW}")
        if header["identity"] != identity:
            raise ValueError(
                f"training state: expected a run with this config, data and model, got another in {path}; {_ANEW}"
            )
        yield header, file


_HEADER = {"version": int, "identity": str, "step": int, "crc32": int}


def _header(text: str) -> dict[str, Any]:
    """Of a file's metadata; empty if it is not one."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless `found` has these tensors and no others, of their shapes and dtypes."""
    for name in sorted(expected.keys() | found.keys()):
        wanted, got = (
            f"{tuple(each[name].shape)} of {each[name].dtype}" if name in each else "none" for each in (expected, found)
        )
        if wanted != got:
            raise ValueError(f"training state: expected {name} {wanted}, got {got}; {_ANEW}")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each shared one once."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {MODEL + name: tensor.detach().contiguous() for name, tensor in named.items()}


@torch.no_grad()
def restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `model_tensors`, perhaps among others, into a model of the same structure.

    Raises ValueError, with the model untouched, for those of another one.
    """
    check_tensors(model_tensors(model), {name: t for name, t in tensors.items() if name.startswith(MODEL)})
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        tensor.copy_(tensors[MODEL + name])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter index and key."""
    return {
        f"{OPTIMIZER}{index}.{key}": value.contiguous()
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, state: SavedState) -> None:
    """Raises ValueError, with the optimizer untouched, for a state that is not AdamW's for these parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = state.part(OPTIMIZER)
    indices = {name.partition(".")[0] for name in found}
    entries: dict[int, dict[str, Tensor]] = {}
    expected = {}
    for index, parameter in enumerate(parameters):
        if str(index) in indices:
            moments = {"exp_avg": parameter, "exp_avg_sq": parameter, "step": torch.tensor(0.0)}
            expected.update({f"{index}.{key}": tensor for key, tensor in moments.items()})
            entries[index] = {key: found[f"{index}.{key}"] for key in moments if f"{index}.{key}" in found}
    check_tensors(expected, found)
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
