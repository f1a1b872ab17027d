"""Inputs for any model of transformers, and the attention masks that users give them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

ROWS, LENGTH, DECODED = 3, 12, 5


def masks() -> dict[str, Tensor | None]:
    """{kind: (ROWS, LENGTH) of 0 and 1, or None for no mask}."""
    positions = torch.arange(LENGTH)
    lengths = torch.tensor([LENGTH, 7, 4])[:, None]
    holes = torch.ones(ROWS, LENGTH, dtype=torch.long)
    holes[1, [0, 3]] = 0
    holes[2, [5, 6, LENGTH - 1]] = 0
    return {
        "none": None,
        "ones": torch.ones(ROWS, LENGTH, dtype=torch.long),
        "right padding": (positions < lengths).long(),
        "left padding": (positions >= LENGTH - lengths).long(),
        "holes": holes,
    }


def inputs(model: PreTrainedModel) -> Iterator[tuple[str, dict[str, Any], Tensor | None]]:
    """(kind of mask, keyword arguments, mask) of each call to try; one without a mask for what reads no text."""
    accepted = inspect.signature(model.forward).parameters
    main = model.main_input_name
    if main != "input_ids" and "input_ids" not in accepted:
        yield main, {main: _signal(model, main)}, None
        return
    given = _text(model, accepted)
    for name in ("pixel_values", "input_features", "input_values"):
        parameter = accepted.get(name)
        if parameter is not None and parameter.default is inspect.Parameter.empty:
            given[name] = _signal(model, name)
    for kind, mask in masks().items():
        if mask is None:
            yield kind, given, None
        elif "attention_mask" in accepted:
            yield kind, given | {"attention_mask": mask}, mask


def _text(model: PreTrainedModel, accepted: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {"input_ids": torch.randint(5, 90, (ROWS, LENGTH), generator=generator)}
    eos = getattr(model.config.get_text_config(), "eos_token_id", None)
    if isinstance(eos, int):
        given["input_ids"][:, -1] = eos  # BART's classifiers read the hidden state there
    classifies = type(model).__name__.endswith(("Classification", "QuestionAnswering"))
    if model.config.is_encoder_decoder and "decoder_input_ids" in accepted and not classifies:
        given["decoder_input_ids"] = torch.randint(5, 90, (ROWS, DECODED), generator=generator)
    if "use_cache" in accepted:
        given["use_cache"] = False
    return given


def _signal(model: PreTrainedModel, name: str) -> Tensor:
    """Noise in the shape of an image, a spectrogram or a sound."""
    config = model.config
    generator = torch.Generator().manual_seed(0)

    parts = [getattr(config, sub, None) for sub in ("vision_config", "audio_config", "backbone_config")]

    def field(*names: str, default: Any) -> Any:
        found = [getattr(holder, each, None) for holder in (config, *parts) for each in names]
        return next((value for value in found if value is not None), default)

    if "pixel" in name:
        size = field("image_size", "img_size", "input_size", default=64)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (2, field("num_channels", "in_channels", default=3), height, width)
        if name == "pixel_values_videos" or field("num_frames", "frames_per_clip", default=None) is not None:
            shape = (2, field("num_frames", "frames_per_clip", default=4), *shape[1:])
    elif name == "input_features":
        length = 2 * field("max_source_positions", default=32)
        shape = (2, field("num_mel_bins", "feature_size", "input_dim", default=80), length)
    else:
        shape = (2, 4000)
    return torch.randn(shape, generator=generator)
