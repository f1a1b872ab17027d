"""Where a forward pass spends its time: every microsecond belongs to one part, so that they sum to the whole.

Parts are (place, kind): the place is the embeddings, the encoder, the head or between them, the kind an operator
or "outside of operators", which is Python, the dispatcher, and the profiler's own work of about a microsecond for
each operator (for one with forty tensors, tens of microseconds). `dispatch` measures that overhead without a profiler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from sparsenlp.benchmark import Inputs
from sparsenlp.layers import SparseEncoder
from sparsenlp.measure import interleave, use_threads

Parts = Counter[tuple[str, str]]
"""Seconds by (place, kind)."""

PLACES = {"embeddings": "embeddings", "encoder": "encoder", "transformer": "encoder", "pooler": "head"}
"""Name of a child of the model -> its place."""

OUTSIDE = "outside of operators"
BETWEEN = "between"

KINDS = {
    "bsr_linear": "sparse linear",
    "encoder_layer": "fused layer",
    "encoder_pack": "pack and unpack",
    "encoder_unpack": "pack and unpack",
    "linear": "dense linear",
    "addmm": "dense linear",
    "scaled_dot_product_attention": "attention",
    "layer_norm": "layer norm",
    "gelu": "activation",
    "embedding": "embedding",
}
"""Part of an operator's name -> its kind; others are "other operators"."""

_PREFIX = "place: "


def breakdown(model: nn.Module, inputs: Inputs, repeats: int = 20) -> dict[str, Any]:
    """Profile a model, and return JSON data on one forward pass: the mean of the faster half of `repeats`.

    parts    [place, kind, seconds] in descending order; they sum to the whole
    whole    seconds of the profiled pass
    outside  share of `whole` that is outside of operators
    """
    with torch.inference_mode(), _marked(model):
        for _ in range(3):
            model(**inputs)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(repeats):
                with record_function("forward"):
                    model(**inputs)
    roots = [event for event in profiler.events() if event.name == "forward" and event.cpu_parent is None]
    roots = sorted(roots, key=_seconds)[: -(-len(roots) // 2)]
    parts: Parts = Counter()
    for root in roots:
        parts.update(_parts(root, BETWEEN))
    whole = sum(_seconds(root) for root in roots) / len(roots)
    outside = sum(seconds for (_, kind), seconds in parts.items() if kind == OUTSIDE) / len(roots)
    rows = [[*part, seconds / len(roots)] for part, seconds in parts.most_common()]
    return {"parts": rows, "whole": whole, "outside": outside / whole}


def dispatch(model: nn.Module, inputs: Inputs, hollow: nn.Module, seconds: float = 2.0) -> dict[str, float]:
    """Seconds of a forward pass, and of one that has all its calls and next to no arithmetic.

    hollow  a model of the same class, layers and conversion, but a few features wide; it is given one tile of tokens,
            on one thread: waking others for nothing is no part of dispatch
    """
    few = {name: tensor[:1, :16] for name, tensor in inputs.items()}
    with torch.inference_mode():
        forward = interleave({"forward": lambda: model(**inputs)}, seconds)["forward"]
        with use_threads(1):
            calls = interleave({"dispatch": lambda: hollow(**few)}, seconds)["dispatch"]
    return {"forward": forward.median, "dispatch": calls.median}


def _seconds(event: Any) -> float:
    return event.time_range.elapsed_us() * 1e-6


def _parts(event: Any, place: str) -> Parts:
    """Divide a range, which is the forward pass or a place, among its operators; what they leave is outside."""
    parts: Parts = Counter({(place, OUTSIDE): _seconds(event)})
    for child in event.cpu_children:
        parts[place, OUTSIDE] -= _seconds(child)
        if child.name.startswith(_PREFIX):
            parts.update(_parts(child, child.name.removeprefix(_PREFIX)))
        else:
            parts[place, kind_of(child.name)] += _seconds(child)
    return parts


def kind_of(operator: str) -> str:
    """The kind of an operator by its name, as "aten::layer_norm"."""
    name = operator.partition("::")[2]
    return next((kind for part, kind in KINDS.items() if part in name), "other operators")


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Let the children of a model show as ranges in a profile."""
    with ExitStack() as stack:
        for name, child in model.named_children():
            if isinstance(child, SparseEncoder) and name in PLACES:  # a hook would make it take the long way
                child.__dict__["run"] = _ranged(child.run, _PREFIX + PLACES[name])
                stack.callback(child.__dict__.pop, "run")
            elif child is not None and name in PLACES:
                ranges: list[Any] = []
                stack.callback(child.register_forward_pre_hook(_opener(ranges, _PREFIX + PLACES[name])).remove)
                stack.callback(child.register_forward_hook(_closer(ranges)).remove)
        yield


def _ranged(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with record_function(name):
            return function(*args)

    return run


def _opener(ranges: list[Any], name: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        ranges.append(record_function(name))
        ranges[-1].__enter__()

    return hook


def _closer(ranges: list[Any]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    return hook
