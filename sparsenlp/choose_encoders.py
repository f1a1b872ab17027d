"""Choosing, by timing, how the encoders of a model run: layer by layer as they are or fused, and how precisely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .layers.encoder import SparseEncoder
from .measure import interleave, ratio
from .plan import SEPARATE, EncoderPlanRow, Times, geometric_mean

if TYPE_CHECKING:
    from .convert import SparsifyConfig
    from .models.encoders import FusionCandidate

SEQUENCE = 128
"""Token counts are timed as sequences of at most so many tokens."""
LEAST_COSINE = 0.999
"""Of a fused encoder to its separate layers, in the precision of the weights."""


@torch.no_grad()
def choose_encoders_(model: nn.Module, config: SparsifyConfig) -> tuple[EncoderPlanRow, ...]:
    """Fuse the encoders of known families in `model` where that is faster; one row for each that was found.

    Candidates are timed against the same encoder as it is, on random inputs of config.token_counts. A lower precision
    must be `min_speedup` faster than the best higher one.

    Raises RuntimeError if a fused encoder in the precision of its weights gives another result.
    """
    from .models.encoders import fusion_candidates, put_in_

    if any(isinstance(module, SparseEncoder) for module in model.modules()):
        return ()
    try:
        candidates = fusion_candidates(model, (None, *config.precisions))
    except (TypeError, ValueError) as error:
        return (EncoderPlanRow("", type(model).__name__, 0, SEPARATE, str(error)),)
    rows, chosen = [], []
    for candidate in candidates:
        row, encoder = _choose(candidate, config)
        rows.append(row)
        if encoder is not None:
            chosen.append((candidate, encoder))
    put_in_(model, chosen)
    return tuple(rows)


def _choose(candidate: FusionCandidate, config: SparsifyConfig) -> tuple[EncoderPlanRow, SparseEncoder | None]:
    found = candidate.row
    row = EncoderPlanRow(found.name, found.kind, found.layers, SEPARATE, found.reason)
    if found.reason:
        return row, None
    options = {option_name(precision): encoder for precision, encoder in candidate.encoders.items()}
    if config.measure == "off":
        return replace(row, chosen="fused", reason="not measured"), options["fused"]
    modes = {
        module: module.training for encoder in options.values() for module in (encoder, *encoder.original.modules())
    }
    for encoder in options.values():
        encoder.eval()
    try:
        times, cosines = _time(options, config.token_counts, config.seconds)
    finally:
        for module, training in modes.items():
            module.training = training
    if (cosine := cosines["fused"]) < LEAST_COSINE:
        raise RuntimeError(f"sparsify_: expected {found.name} fused to match its layers, got a cosine of {cosine:.5f}")
    best, speedup = SEPARATE, 1.0
    for name in options:
        against = geometric_mean(times[best]) / geometric_mean(times[name])
        certain = min(ratio(times[best][tokens], times[name][tokens]).p20 for tokens in config.token_counts)
        if against >= (1.0 if best == SEPARATE else config.min_speedup) and certain > 1:
            best, speedup = name, speedup * against
    dead = [record.as_dict() for record in options["fused"].dead_weight]
    reason = f"{speedup:.2f}x faster" if best != SEPARATE else "fused layers are not faster"
    row = EncoderPlanRow(found.name, found.kind, found.layers, best, reason, speedup, times, cosines, tuple(dead))
    return row, options.get(best)


def option_name(precision: str | None) -> str:
    return "fused" if precision is None else f"fused in {precision}"


def _time(
    options: dict[str, SparseEncoder], token_counts: Sequence[int], seconds: float
) -> tuple[dict[str, Times], dict[str, float]]:
    """({option: times}, {fused option: least cosine similarity to the separate layers})."""
    times: dict[str, Times] = {name: {} for name in (SEPARATE, *options)}
    cosines = dict.fromkeys(options, 1.0)
    first = next(iter(options.values()))
    weights = first.gather()[0]
    generator = torch.Generator().manual_seed(0)
    dtype = next(parameter.dtype for parameter in first.parameters() if parameter.is_floating_point())
    for tokens in token_counts:
        length = min(tokens, SEQUENCE)
        x = torch.randn(tokens // length, length, weights.hidden_size, generator=generator).to(dtype)
        runs: dict[str, Callable[[], object]] = {SEPARATE: partial(_separate, first, x)}
        runs |= {name: partial(encoder, x) for name, encoder in options.items()}
        expected = first_tensor(_separate(first, x)).double()
        for name, encoder in options.items():
            got = first_tensor(encoder(x)).double()
            cosines[name] = min(cosines[name], float(torch.cosine_similarity(got, expected, dim=-1).min()))
        for name, timing in interleave(runs, seconds).items():
            times[name][tokens] = timing
    return times, cosines


def _separate(encoder: SparseEncoder, x: Tensor) -> Any:
    """What the original gives."""
    encoder.enabled = False
    try:
        return encoder(x)
    finally:
        encoder.enabled = True


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a model's output."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output
