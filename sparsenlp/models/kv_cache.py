"""Keys and values of all layers in one tensor with room to grow, inside a DynamicCache of transformers."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..layers.decoder import DecoderStack

LEAST_CAPACITY = 64
GROWTH = 1.5


class KVStore:
    """data: (2, layers, B, key heads, capacity, head dimension); window: the least of the layers', in tokens."""

    def __init__(self, data: Tensor, window: float = math.inf) -> None:
        self.data = data
        self.window = window


class _Stored(DynamicLayer):
    """A layer's first `length` keys and values of a KVStore; as soon as anybody assigns others, a layer of its base.

    All that transformers does with a cache between two forwards (crop, reorder for beams, select or repeat
    sequences, append to it) assigns `keys` and `values`; the next fused forward takes them into a store again.
    """

    def __init__(self, store: KVStore, index: int, length: int, *args: Any) -> None:
        self._assigned: dict[str, Tensor | None] = {}
        self.store: KVStore | None = None
        super().__init__(*args)
        self.store, self.index = store, index
        self.set_length(length)
        self.dtype, self.device, self.is_initialized = store.data.dtype, store.data.device, True

    def set_length(self, length: int) -> None:
        """Record that the store holds so many tokens."""
        self.length = length

    def first_kept(self) -> int:
        """The first token that a layer of the base would still hold."""
        return 0

    def _view(self, which: int) -> Tensor | None:
        name = "values" if which else "keys"
        if self.store is None:
            return self._assigned.get(name)
        return self.store.data[which, self.index, :, :, self.first_kept() : self.length]

    def _assign(self, name: str, value: Tensor | None) -> None:
        if self.store is not None:
            self._assigned = {"keys": self._view(0), "values": self._view(1)}
            self.store = None
        self._assigned[name] = value

    keys = property(lambda self: self._view(0), lambda self, value: self._assign("keys", value))
    values = property(lambda self: self._view(1), lambda self, value: self._assign("values", value))

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.store is None else self.length


class StoredLayer(_Stored):
    """In the place of a DynamicLayer."""


class StoredSlidingLayer(_Stored, DynamicSlidingWindowLayer):
    """In the place of a DynamicSlidingWindowLayer, as long as all tokens are within its window."""

    def set_length(self, length: int) -> None:
        self.length = self.cumulative_length = length

    def first_kept(self) -> int:
        return 0 if self.record_past else max(self.length - self.sliding_window + 1, 0)


STORED = (StoredLayer, StoredSlidingLayer)


def reserve(
    cache: Any, stack: DecoderStack, batch: int, new: int, window: int | None = None
) -> tuple[Tensor, int] | None:
    """(data, past) of the cache's KVStore, with room for `new` more tokens.

    A plain DynamicCache is made to use a store from now on, with what it holds copied.

    window   of attention, in tokens; None: all
    returns  None if the cache is of another kind, or there are more tokens than in the window of a layer
    """
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return None
    layers: list[Any] = cache.layers
    _, count, kv_heads, head_dim = stack.cache_shape
    most = math.inf if window is None else window
    first: Any = layers[0] if layers else None
    if type(first) in STORED and (store := first.store) is not None and len(layers) == count:
        data, past = store.data, first.length
        fits = data.shape[2] == batch and data.dtype == stack.dtype and data.shape[1] == count
        if fits and all(type(c) in STORED and c.store is store and c.length == past for c in layers):
            if past + new > min(most, store.window):
                return None
            if past + new > data.shape[4]:
                store.data = stack.new_cache(batch, _capacity(past + new))
                store.data[..., :past, :] = data[..., :past, :]
            return store.data, past
    if len(layers) not in (0, count) or any(type(c) not in (*STORED, *_REPLACED) for c in layers):
        return None
    past = cache.get_seq_length()
    least = min((c.sliding_window for c in layers if isinstance(c, DynamicSlidingWindowLayer)), default=math.inf)
    if past + new > min(most, least):
        return None
    shape = (batch, kv_heads, past, head_dim)
    for layer in layers if past else ():
        keys, values = layer.keys, layer.values
        if keys is None or keys.shape != shape or values.shape != shape or keys.dtype != stack.dtype or not keys.is_cpu:
            return None
    data = stack.new_cache(batch, _capacity(past + new))
    if past:
        for index, layer in enumerate(layers):
            data[0, index, :, :, :past] = layer.keys
            data[1, index, :, :, :past] = layer.values
    store = KVStore(data, least)
    before = layers or [None] * count
    layers[:] = [_stored(layer, store, index, past) for index, layer in enumerate(before)]
    return data, past


_REPLACED = (DynamicLayer, DynamicSlidingWindowLayer)


def _stored(layer: Any, store: KVStore, index: int, length: int) -> _Stored:
    """What takes the place of a layer, None for one that was not there."""
    if not isinstance(layer, DynamicSlidingWindowLayer):
        return StoredLayer(store, index, length)
    stored = StoredSlidingLayer(store, index, length, layer.sliding_window)
    stored.record_past = layer.record_past
    return stored


def advance(cache: Cache, length: int) -> None:
    """Record that the store of `cache` now holds `length` tokens."""
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.set_length(length)


def forget(cache: Any, length: int) -> None:
    """Keep the first `length` tokens, of a store in place."""
    if all(type(layer) in STORED and layer.store is not None for layer in cache.layers):
        advance(cache, length)
    else:
        cache.crop(length - cache.get_seq_length())


def _capacity(tokens: int) -> int:
    return max(LEAST_CAPACITY, int(tokens * GROWTH))
