"""How long the models of bench/accuracy.py take, all of one task and seed in turn in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsenlp import SparsifyConfig, sparsify_
from sparsenlp.benchmark import BASELINES, EXACT_TOLERANCE, Setting, compiling, random_inputs
from sparsenlp.measure import interleave, machine, ratio, use_threads
from sparsenlp.prune import sparsity_of

Row = dict[str, Any]

DENSE_WAYS = ("eager fp32", "compiled fp32")
"""Ways to run what has no zeros; the fastest at a setting counts."""


def measure(
    models: Mapping[str, nn.Module],
    dense: str,
    settings: Sequence[Setting],
    threads: int,
    seconds: float,
    quick: bool = False,
) -> dict[str, Row]:
    """name -> {setting: {"way", "seconds", "over_dense"}} for float32 models in eval mode.

    models   with zeros, which are converted first, or without; `dense` is the name of the one to compare with
    seconds  of timing for each setting
    quick    no torch.compile, and conversion without measuring

    A sample follows an untimed call of the same model, so that caches are warm as in a server that has one model.
    "over_dense" is time over the dense model's in its fastest way, median of the ratios by round. Raises
    RuntimeError if a converted model computes something else.
    """
    tokens = tuple(sorted({setting.batch * setting.tokens for setting in settings}))
    config = SparsifyConfig(token_counts=tokens, measure="off" if quick else "model", min_sparsity=0.1)
    found: dict[str, Row] = {name: {} for name in models}
    with use_threads(threads):
        converted = {name: convert(model, config) for name, model in models.items()}
        with torch.inference_mode(), compiling(len(models)):
            for setting in settings:
                torch._dynamo.reset()
                inputs = random_inputs(models[dense], setting)
                runs: dict[tuple[str, str], Callable[[], object]] = {}
                for name, model in models.items():
                    for way, build in ways(model, converted[name], quick).items():
                        built = build()
                        check(f"{name}, {way}", model, built, inputs)
                        runs[name, way] = partial(built, **inputs)
                timings = interleave({f"{name}\n{way}": run for (name, way), run in runs.items()}, seconds, warm=True)
                medians = {key: timings["\n".join(key)].median for key in runs}
                best = {name: min((k for k in runs if k[0] == name), key=medians.__getitem__) for name in models}
                for name, key in best.items():
                    over = ratio(timings["\n".join(key)], timings["\n".join(best[dense])])
                    found[name][str(setting)] = {
                        "way": key[1],
                        "seconds": timings["\n".join(key)].as_dict(),
                        "over_dense": over.as_dict(),
                    }
        here = machine()
    return {name: {"settings": row, "machine": here} for name, row in found.items()}


def convert(model: nn.Module, config: SparsifyConfig) -> nn.Module | None:
    """A converted copy, None for a model without zeros worth it."""
    if sparsity_of(model) < config.min_sparsity:
        return None
    sparse = copy.deepcopy(model)
    sparsify_(sparse, config)
    return sparse


def ways(model: nn.Module, sparse: nn.Module | None, quick: bool) -> dict[str, Callable[[], Callable[..., Any]]]:
    """What to time, each built when called."""
    if sparse is not None:
        return {"sparsenlp fp32": lambda: sparse}
    names = DENSE_WAYS[:1] if quick else DENSE_WAYS
    return {name: partial(BASELINES[name].build, model) for name in names}


def check(what: str, model: nn.Module, built: Callable[..., Any], inputs: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError unless both give the same logits but for rounding."""
    expected, got = model(**inputs).logits, built(**inputs).logits
    difference, bound = float((got - expected).abs().max()), EXACT_TOLERANCE * float(expected.abs().max())
    if not difference <= bound:
        raise RuntimeError(f"{what}: expected logits within {bound:.1e} of the model's, got {difference:.1e}")
