"""Random changes to a checkpoint: of bytes, of JSON, of tensors; with checksums made to fit again, or not."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from common import CONFIG, WEIGHTS, seal_all
from safetensors.torch import load_file, save_file

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 16, 255, 2**31, 2**40, 2**63, 2**70, 0.5, -0.5, 1e308, 1e-320),
    *(
        "",
        "x",
        "relu",
        "gelu",
        "float16",
        "int8",
        "é\ud800",
        "../x",
        [],
        {},
        [0],
        [1, 1],
        [2**31, 2**31],
        [[[]]],
        {"a": {}},
    ),
)
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def mutate(checkpoint: Path, others: list[Path], random_: random.Random, any_field: bool) -> str:
    """Change the checkpoint in one to three ways; returns what was done, "sealed" first if its checksums fit again.

    any_field  all of config.json may change, not only what transformers leaves to this project
    """
    done = []
    sealed = random_.random() < 0.75
    for _ in range(random_.choice((1, 1, 2, 3))):
        kind = random_.choice(("json", "json", "tensor", "tensor", "tensor", "bytes"))
        try:
            if kind == "json":
                done.append(_change_json(checkpoint / CONFIG, random_, any_field))
            elif kind == "tensor":
                done.append(_change_tensors(checkpoint / WEIGHTS, random_))
            else:
                done.append(_change_bytes(checkpoint, others, random_, any_field))
        except Exception as error:  # an earlier change left nothing to change
            done.append(f"not {kind} ({type(error).__name__})")
    if sealed:
        try:
            seal_all(checkpoint)
        except Exception:
            sealed = False
    return f"{'sealed' if sealed else 'open'}: {', '.join(done)}"


def _change_json(path: Path, random_: random.Random, any_field: bool) -> str:
    config = json.loads(path.read_text())
    node: Any = config if any_field and random_.random() < 0.4 else config["quantization_config"]
    outside = node is config
    name: Any = None
    for _ in range(random_.randint(1, 4)):
        keys = [*node] if isinstance(node, dict) else [*range(len(node))]
        if outside:
            keys = [key for key in keys if key != "quantization_config"]
        name = random_.choice(keys)
        if not isinstance(node[name], dict | list) or not node[name] or random_.random() < 0.2:
            break
        node = node[name]
    else:
        name = random_.choice([*node] if isinstance(node, dict) else [*range(len(node))])
    how = random_.choice(("value", "value", "value", "near", "delete", "add", "rename", "swap"))
    if how == "value":
        node[name] = random_.choice(VALUES)
    elif how == "near":
        node[name] = node[name] + random_.choice((-1, 1, 8)) if type(node[name]) in (int, float) else [node[name]]
    elif how == "delete":
        del node[name]
    elif how == "add" and isinstance(node, dict):
        node[random_.choice(("x", "int8", "structure", "fused_encoders", f"{name}.x"))] = random_.choice(VALUES)
    elif how == "rename" and isinstance(node, dict):
        node[random_.choice((f"{name}x", f"bert.{name}", str(name)[1:]))] = node.pop(name)
    else:
        other = random_.choice([*node] if isinstance(node, dict) else [*range(len(node))])
        node[name], node[other] = node[other], node[name]
    if not any_field:
        config["quantization_config"]["quant_method"] = "sparsenlp"
    path.write_text(json.dumps(config))
    return f"{'config' if outside else 'description'} {how} {name}"


def _change_tensors(path: Path, random_: random.Random) -> str:
    tensors = load_file(path)
    name = random_.choice([*tensors])
    tensor = tensors[name].clone()
    how = random_.choice(("number", "number", "number", "dtype", "shape", "cut", "rename", "alias", "delete", "swap"))
    if how == "number" and tensor.numel():
        flat = tensor.view(-1)
        place = random_.randrange(flat.numel())
        numbers: tuple[float, ...] = (0, 1, -1, 127, -128, 2**15 - 1, 2**31 - 1, -(2**31))
        numbers = (*numbers, float("nan"), float("inf"), 1e30) if tensor.is_floating_point() else numbers
        flat[place] = torch.tensor(random_.choice(numbers), dtype=torch.float64).to(tensor.dtype)
        tensors[name] = tensor
    elif how == "dtype":
        tensors[name] = tensor.to(random_.choice(DTYPES))
    elif how == "shape":
        tensors[name] = tensor.reshape(
            random_.choice(((-1,), (*tensor.shape, 1), (1, *tensor.shape), tensor.shape[::-1]))
        )
    elif how == "cut" and tensor.dim():
        tensors[name] = tensor[random_.choice((1, 0)) :][: random_.choice((None, -1, 0))].clone()
    elif how in ("rename", "alias"):
        head, _, rest = name.partition(".")
        new = random_.choice((rest, f"{head}.{name}", f"bert.{name}", f"model.{name}", f"{name}x", "x", name.upper()))
        tensors[new] = tensor if how == "alias" else tensors.pop(name)
        if how == "alias" and tensor.numel():
            tensors[new] = tensor.roll(1)
    elif how == "delete":
        del tensors[name]
    else:
        other = random_.choice([*tensors])
        tensors[name], tensors[other] = tensors[other].clone(), tensor
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata={"format": "pt"})
    return f"tensor {how} {name}"


def _change_bytes(checkpoint: Path, others: list[Path], random_: random.Random, any_field: bool) -> str:
    path = checkpoint / (CONFIG if any_field and random_.random() < 0.2 else WEIGHTS)
    raw = bytearray(path.read_bytes())
    how = random_.choice(("flip", "flip", "header", "cut", "longer", "zeros", "other"))
    place = random_.randrange(len(raw))
    if how == "flip":
        raw[place] ^= 1 << random_.randrange(8)
    elif how == "header":
        place = random_.randrange(min(len(raw), 600))
        raw[place] = random_.randrange(256)
    elif how == "cut":
        del raw[place:]
    elif how == "longer":
        raw += bytes(random_.randrange(1, 100))
    elif how == "zeros":
        raw[place : place + 64] = bytes(len(raw[place : place + 64]))
    else:
        shutil.copy(random_.choice(others) / path.name, path)
        return f"{path.name} of another checkpoint"
    path.write_bytes(raw)
    return f"{path.name} {how} at {place}"
