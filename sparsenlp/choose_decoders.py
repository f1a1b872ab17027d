"""Choosing, by timing, whether the layers of a decoder language model run as one op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import native
from .measure import Timing, interleave, ratio
from .models import is_transformers_model
from .plan import SEPARATE, EncoderPlanRow, geometric_mean

if TYPE_CHECKING:
    from .convert import SparsifyConfig

CONTEXT = 64
"""Tokens before the one that is timed on its own, as in decoding."""
LEAST_COSINE = 0.999
"""Of the fused layers to the separate ones."""


@torch.no_grad()
def choose_decoder_(model: nn.Module, config: SparsifyConfig) -> tuple[EncoderPlanRow, ...]:
    """Fuse the layers of a decoder of a known family where that is faster; one row, or none for other models.

    Timed are a single token after CONTEXT others, and a sequence of each of config.token_counts that the fused layers
    take; it must be faster for all of them.

    Raises RuntimeError if the fused layers give another result.
    """
    if not is_transformers_model(model):
        return ()
    from .models.decoders import FAMILIES, MOST_TOKENS, DecoderForward, fuse_decoder_, has_fused_decoder

    base: Any = model.base_model
    if getattr(base.config, "model_type", None) not in FAMILIES or has_fused_decoder(model):
        return ()
    name = next(name for name, module in model.named_modules() if module is base)
    row = EncoderPlanRow(name or type(base).__name__, type(base).__name__, base.config.num_hidden_layers, SEPARATE, "")
    fused = DecoderForward(base)
    try:
        fused.build()
    except ValueError as error:
        return (replace(row, reason=str(error).removeprefix("fuse_decoder_: ")),)
    if not native.available or any(tensor.device.type != "cpu" for tensor in base.parameters()):
        return (replace(row, reason=native.why_unavailable or "no fused kernel on its device"),)
    if config.measure == "off":
        fuse_decoder_(model)
        return (replace(row, chosen="fused", reason="not measured"),)
    training = {module: module.training for module in base.modules()}
    base.eval()
    try:
        counts = [count for count in config.token_counts if count <= MOST_TOKENS]
        times, cosine = _time(base, fused, sorted({1, *counts}), config.seconds)
    finally:
        for module, mode in training.items():
            module.training = mode
    if cosine < LEAST_COSINE:
        raise RuntimeError(f"sparsify_: expected {row.name} fused to match its layers, got a cosine of {cosine:.5f}")
    speedup = geometric_mean(times[SEPARATE]) / geometric_mean(times["fused"])
    faster = all(ratio(slow, times["fused"][count]).p20 > 1 for count, slow in times[SEPARATE].items())
    if not faster:
        return (replace(row, reason="fused layers are not faster", times=times, cosines={"fused": cosine}),)
    fuse_decoder_(model)
    reason = f"{speedup:.2f}x faster"
    return (replace(row, chosen="fused", reason=reason, speedup=speedup, times=times, cosines={"fused": cosine}),)


def _time(
    base: Any, fused: Callable[..., Any], token_counts: list[int], seconds: float
) -> tuple[dict[str, dict[int, Timing]], float]:
    """({option: times}, least cosine similarity of their results)."""
    times: dict[str, dict[int, Timing]] = {SEPARATE: {}, "fused": {}}
    cosine = 1.0
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.get_input_embeddings().num_embeddings
    context = min(CONTEXT, base.config.max_position_embeddings - 1)
    for count in token_counts:
        ids = torch.randint(vocabulary, (1, count), generator=generator)
        before = torch.randint(vocabulary, (1, context), generator=generator) if count == 1 else None
        runs = {name: _runner(forward, ids, before) for name, forward in ((SEPARATE, base), ("fused", fused))}
        expected, got = (run().last_hidden_state.double() for run in runs.values())
        cosine = min(cosine, float(torch.cosine_similarity(got, expected, dim=-1).min()))
        for name, timing in interleave(runs, seconds).items():
            times[name][count] = timing
    return times, cosine


def _runner(forward: Callable[..., Any], ids: Tensor, before: Tensor | None) -> Callable[[], Any]:
    """A call of `forward` on ids (1, S); after the tokens `before` (1, P), each time anew, if there are any."""
    if before is None:
        return lambda: forward(input_ids=ids, use_cache=False)
    from .models.kv_cache import forget

    cache = forward(input_ids=before, use_cache=True).past_key_values

    def step() -> Any:
        output = forward(input_ids=ids, past_key_values=cache, use_cache=True)
        forget(cache, before.shape[1])
        return output

    return step
