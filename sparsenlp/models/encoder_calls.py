"""How encoders of different origin are called: transformers' modules, lists of layers, and torch's own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.encoder import SparseEncoder
from ..ops.encoder_layer import hides_the_same_keys, padding_keys

MEANINGLESS = frozenset({"position_ids", "return_dict", "labels"})
"""Arguments of an encoder that its layers make nothing of."""
UNREAD = "sparsenlp_mask_of_pairs"
"""An argument of an encoder: its mask came from outside, and may be any while a graph is traced."""


class ModuleEncoder(SparseEncoder):
    """A transformers encoder: (x, attention_mask, ...) -> ModelOutput or tuple."""

    layers_name = "layer"
    output_name = "BaseModelOutput"

    def layers_inside(self) -> list[nn.Module]:
        return list(self._modules[self.layers_name].children())  # type: ignore[union-attr]

    def hooks_matter(self, hooks: Iterable[Callable]) -> bool:
        return transformers_hooks_matter(hooks)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        unread = kwargs.pop(UNREAD, False)
        if unread or args or asks_for_more(kwargs) or not self.fuses(hidden_states):
            return self.original.forward(hidden_states, attention_mask, *args, **kwargs)
        readable, mask = read_mask(attention_mask, hidden_states)
        if not readable:
            return self.original.forward(hidden_states, attention_mask, *args, **kwargs)
        hidden_states = self.run(hidden_states, mask)
        if kwargs.get("return_dict") is False:
            return (hidden_states,)
        outputs = sys.modules["transformers.modeling_outputs"]
        return getattr(outputs, self.output_name)(last_hidden_state=hidden_states)


class BertLikeEncoder(ModuleEncoder):
    output_name = "BaseModelOutputWithPastAndCrossAttentions"


class LayerList(SparseEncoder):
    """A ModuleList that a model runs itself, `for layer in layers: x = layer(x, mask)`: it iterates over itself."""

    def layers_inside(self) -> list[nn.Module]:
        return list(self.children())

    def hooks_matter(self, hooks: Iterable[Callable]) -> bool:
        return transformers_hooks_matter(hooks)

    def __iter__(self) -> Iterator[nn.Module]:
        yield self

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> nn.Module:
        return self.layers_inside()[index]

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if not asks_for_more(kwargs) and self.fuses(hidden_states):
            readable, mask = read_mask(attention_mask, hidden_states)
            if readable:
                return self.run(hidden_states, mask)
        for layer in self.layers_inside():
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return hidden_states


class TorchEncoder(SparseEncoder):
    """nn.TransformerEncoder."""

    def layers_inside(self) -> list[nn.Module]:
        return list(self._modules["layers"].children())  # type: ignore[union-attr]

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        x = self.try_fused(src, mask, src_key_padding_mask, is_causal)
        if x is None:
            return self.original.forward(src, mask, src_key_padding_mask, is_causal)
        norm: Any = self.original.norm
        return x if norm is None else norm(x)

    def try_fused(
        self, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool | None
    ) -> Tensor | None:
        """The layers' result, or None for a call that cannot be fused. padding (B, S): True or -inf hides a token."""
        if mask is not None or is_causal or not self.fuses(src):
            return None
        first: Any = self.layers_inside()[0]
        batch_first = first.self_attn.batch_first
        x = src if batch_first else src.transpose(0, 1)
        real = None
        if padding is not None:
            if padding.shape != x.shape[:2]:
                raise ValueError(
                    f"encoder: expected src_key_padding_mask of shape {tuple(x.shape[:2])}, got {tuple(padding.shape)}"
                )
            if padding.is_floating_point():
                readable, real = read_mask(padding, x, additive=True)
                if not readable:
                    return None
            else:
                real = padding.logical_not()
        x = self.run(x, real)
        return x if batch_first else x.transpose(0, 1)


class TorchEncoderLayer(TorchEncoder):
    """nn.TransformerEncoderLayer."""

    def layers_inside(self) -> list[nn.Module]:
        return [self.original]

    def forward(  # type: ignore[override]
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        x = self.try_fused(src, src_mask, src_key_padding_mask, is_causal)
        return self.original.forward(src, src_mask, src_key_padding_mask, is_causal) if x is None else x


def asks_for_more(arguments: dict[str, Any], meaningless: frozenset[str] = MEANINGLESS) -> bool:
    """Whether a call asks for anything but the last hidden state of self-attention."""
    return any(value is not None and value is not False for name, value in arguments.items() if name not in meaningless)


def transformers_hooks_matter(hooks: Iterable[Callable]) -> bool:
    """Whether one is not transformers' own, or its own are collecting.

    They collect hidden states and attentions; transformers leaves them in place after the first call that asks.
    """
    module: Any = sys.modules.get("transformers.utils.output_capturing")
    if module is None or any(getattr(hook, "__module__", "") != module.__name__ for hook in hooks):
        return True
    return bool(module._active_collector.get())


def read_mask(mask: Any, x: Tensor, additive: bool = False) -> tuple[bool, Tensor | None]:
    """(whether an attention mask for x (B, S, H) only hides padding, (B, S) bool with True for real tokens or None).

    mask      None; (B, S) bool or numbers, 0 for padding; or (B or 1, heads or 1, S or 1, S): bool, or numbers to add
              to scores, 0 and the least of their dtype (or below). While tracing, what it holds is not known yet: then
              it is readable, and the graph raises RuntimeError where it does more than hide padding
    additive  numbers in (B, S) are to be added to scores too

    Raises ValueError for another rank or length.
    """
    if mask is None:
        return True, None
    if not isinstance(mask, Tensor):  # a BlockMask of flex attention
        return False, None
    if mask.dim() == 4 and mask.dtype != torch.bool and not mask.is_floating_point():
        return False, None
    batch, length = x.shape[:2]
    if mask.dim() not in (2, 4) or mask.shape[-1] != length or mask.shape[0] not in (1, batch):
        raise ValueError(
            f"encoder: expected an attention mask of shape ({batch}, {length}) or ({batch}, 1, {length}, {length}), "
            f"got {tuple(mask.shape)}"
        )
    if mask.dim() == 2 and not additive:
        keys = mask != 0
    elif torch.compiler.is_compiling() or hides_the_same_keys(mask):
        keys = padding_keys(mask)
    else:
        return False, None
    return True, keys.expand(batch, length)
