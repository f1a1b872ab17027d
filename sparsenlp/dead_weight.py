"""Weights that cannot change a layer's output, removed: what pruning leaves behind, by index operations alone.

The result computes the same function, exactly but for the rounding of sums in another order. A feed-forward
neuron, a value channel or a pair of query and key dimensions joins two projections, as a row of one and a column
(or row) of the other. Those that are left move together, whole blocks at a time, until the fewest block rows hold
them; projections never store more than before.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import torch
from torch import Tensor

from .formats import BlockSparse, EncoderWeights, SparseProjection
from .formats.rearrange import VACANT, nonzero_columns, nonzero_rows, rearrange, take
from .reference.bsr_linear import ACTIVATIONS

PROJECTIONS = ("query", "key", "value", "output", "fc1", "fc2")


@dataclass(frozen=True)
class DeadWeight:
    """What `remove_dead_weight` took out of a layer, each as (removed, of how many).

    query_dims   pairs of query and key dimensions, of all heads
    blocks       stored by all six projections
    kept_heads   the heads that are left, by their old numbers: for what else is stored by head (position_bias)
    """

    heads: tuple[int, int]
    query_dims: tuple[int, int]
    value_channels: tuple[int, int]
    neurons: tuple[int, int]
    blocks: tuple[int, int]
    kept_heads: tuple[int, ...]

    @property
    def attention_is_constant(self) -> bool:
        """Nothing is left of attention but the bias of its output."""
        return not self.kept_heads

    @property
    def ffn_is_constant(self) -> bool:
        """Nothing is left of the feed-forward network but the bias of fc2."""
        return self.neurons[0] == self.neurons[1]

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        counts = {name: getattr(self, name) for name in ("heads", "query_dims", "value_channels", "neurons", "blocks")}
        return {
            **{name: {"removed": removed, "of": total} for name, (removed, total) in counts.items()},
            "kept_heads": list(self.kept_heads),
            "attention_is_constant": self.attention_is_constant,
            "ffn_is_constant": self.ffn_is_constant,
        }

    def __str__(self) -> str:
        counts = {
            "heads": self.heads,
            "query/key dimensions": self.query_dims,
            "value channels": self.value_channels,
            "neurons": self.neurons,
            "stored blocks": self.blocks,
        }
        text = "removed " + ", ".join(f"{removed} of {total} {name}" for name, (removed, total) in counts.items())
        constant = ["attention"] * self.attention_is_constant + ["the FFN"] * self.ffn_is_constant
        if constant:
            text += f"; only a bias is left of {' and '.join(constant)}"
        return text


@torch.no_grad()
def remove_dead_weight(weights: EncoderWeights) -> tuple[EncoderWeights, DeadWeight]:
    """An equivalent layer without its dead weight, and the record of what went. `weights` is not modified.

    Neurons and value channels: see `remove_dead_neurons`. For the channels it holds with the activation "none":
    attention averages them over the keys with weights that sum to 1, so a constant channel stays that constant.
    Heads without a value channel add nothing to the output: they go, with their queries and keys.
    Query and key dimensions of a head, d: the score of query i and key j is a sum of q[i, d] k[j, d] over d.
    - The key row stores nothing: k[j, d] = b_k[d] for all j, so the term is the same for all keys of a query, which
      softmax ignores (whatever position bias or mask is added).
    - The query row stores nothing and b_q[d] = 0: the term is 0. (With another bias it depends on the key: it stays.)
    A head may keep values but no query dimensions: its scores are all 0, its attention uniform.
    Stored blocks that hold only zeros go from every projection.

    A tensor in which nothing changes is shared with `weights`. Within a head (and among neurons) the order changes
    where that saves block rows.

    Raises ValueError if the projections' shapes or the heads' offsets do not fit together.
    """
    _check(weights)
    value, output, value_rows = _remove_channels(weights.value, weights.output, "none", weights.value_rows)
    fc1, fc2 = remove_dead_neurons(weights.fc1, weights.fc2, weights.activation)

    kept_heads = tuple(h for h in range(weights.heads) if value_rows[h] < value_rows[h + 1])
    query, key, query_rows = _remove_query_dims(weights, kept_heads)
    smaller = replace(
        weights,
        query=query,
        key=key,
        value=value,
        output=output,
        fc1=fc1,
        fc2=fc2,
        query_rows=query_rows,
        value_rows=_offsets_of(kept_heads, value_rows),
    )
    return smaller, _record(weights, smaller, kept_heads)


@torch.no_grad()
def remove_dead_neurons(
    fc1: SparseProjection, fc2: SparseProjection, activation: str = "none"
) -> tuple[SparseProjection, SparseProjection]:
    """The same function fc2(act(fc1(x))) with fewer neurons between the two. The arguments are not modified.

    fc1   (F, K); fc2 (N, F), any block shapes; act is elementwise, as in `bsr_linear`

    - A row of fc1 without a nonzero gives act(b1) for every x: fc2's column times that goes into fc2's bias (in
      float64, from dequantized weights if they are int8), and nobody reads the neuron anymore.
    - A column of fc2 without a nonzero reads nothing: its row of fc1 goes.
    Where blocks do not let a dead neuron go, its weights and bias are zeros.

    Raises ValueError for an unknown activation, or if F disagrees.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"remove_dead_neurons: expected an activation among {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    neurons = fc1.weight.shape[0]
    if fc2.weight.shape[1] != neurons:
        raise ValueError(f"remove_dead_neurons: expected fc2 with {neurons} columns, got {fc2.weight.shape[1]}")
    fc1, fc2, _ = _remove_channels(fc1, fc2, activation, (0, neurons))
    return fc1, fc2


def _remove_channels(
    producer: SparseProjection, consumer: SparseProjection, activation: str, offsets: tuple[int, ...]
) -> tuple[SparseProjection, SparseProjection, tuple[int, ...]]:
    """`remove_dead_neurons`, keeping the channels of each range offsets[i] .. offsets[i + 1] together."""
    varies = nonzero_rows(producer.weight)
    constant = ACTIVATIONS[activation](producer.bias.double()).masked_fill(varies, 0)
    bias = consumer.bias.double() + _times(consumer.weight, constant)
    live = nonzero_columns(consumer.weight) & varies
    places, offsets = _pack(live, (producer.weight.block[0], consumer.weight.block[1]), offsets)
    consumer = _projection(consumer, rearrange(consumer.weight, columns=places), bias.to(consumer.bias.dtype))
    return _take_rows(producer, places), consumer, offsets


def _remove_query_dims(
    weights: EncoderWeights, kept_heads: tuple[int, ...]
) -> tuple[SparseProjection, SparseProjection, tuple[int, ...]]:
    """Query and key without dead dimensions, as all are of heads not kept, and the offsets of those kept."""
    query, key, offsets = weights.query, weights.key, weights.query_rows
    read = torch.zeros(query.weight.shape[0], dtype=torch.bool, device=query.bias.device)
    for head in kept_heads:
        read[offsets[head] : offsets[head + 1]] = True
    live = read & nonzero_rows(key.weight) & (nonzero_rows(query.weight) | (query.bias != 0))
    sides = query.weight.block[0], key.weight.block[0]
    places, offsets = _pack(live, sides, _offsets_of(kept_heads, offsets))
    return _take_rows(query, places), _take_rows(key, places), offsets


def _offsets_of(heads: tuple[int, ...], offsets: tuple[int, ...]) -> tuple[int, ...]:
    """The offsets of these heads alone; rows of others, which are dead, join a neighbour."""
    starts = [offsets[head] for head in heads]
    return (*([0] * bool(heads)), *starts[1:], offsets[-1])


def _pack(live: Tensor, sides: tuple[int, int], offsets: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """A layout of the live channels (D,) for two projections whose blocks span sides[0] and sides[1] channels.

    returns   (D',) int64, the old channel in each new place or VACANT, and the offsets of the same ranges of channels

    Channels stand in groups of lcm(sides). A group without a live channel goes; groups of one range whose live
    channels fit into one become one. Where a projection's blocks are as wide as a group, what it stores for two merged
    groups is the union of their blocks, never more than both. Smaller blocks move whole, as units of the groups.
    """
    group = lcm(*sides)
    unit = lcm(*(side for side in sides if side != group))
    capacity = group // unit
    is_live = live.view(-1, unit).any(dim=1).tolist()
    live_units = [
        [u for u in range(first, first + capacity) if is_live[u]] for first in range(0, len(is_live), capacity)
    ]
    homes = _merge([len(units) for units in live_units], capacity, _ranges(offsets, group, len(live_units)))
    layout: list[int] = []
    for home, members in homes.items():
        if len(members) == 1:  # as it was
            units = [u if is_live[u] else VACANT for u in range(home * capacity, (home + 1) * capacity)]
        else:
            units = [u for member in members for u in live_units[member]]
        layout += units + [VACANT] * (capacity - len(units))

    first = torch.tensor(layout, dtype=torch.int64, device=live.device)[:, None]
    places = torch.where(first == VACANT, VACANT, first * unit + torch.arange(unit, device=live.device)).flatten()
    places = places.masked_fill(~take(live, places, False), VACANT)
    kept = torch.zeros(len(live_units), dtype=torch.int64)
    kept[list(homes)] = 1
    before = [0, *kept.repeat_interleave(group).cumsum(0).tolist()]
    return places, tuple(before[offset] for offset in offsets)


def _merge(counts: list[int], capacity: int, ranges: list[int]) -> dict[int, list[int]]:
    """{group that stays: the groups whose channels it holds}, in order: best fit of the largest first, within ranges.

    counts   live units of each group, at most `capacity`; ranges: the range that each group lies in
    """
    members = {group: [group] for group, count in enumerate(counts) if count}
    rooms: dict[int, list[list[int]]] = {r: [[] for _ in range(capacity)] for r in ranges}  # [range][free units]
    for group in sorted((g for g in members if counts[g] < capacity), key=lambda g: -counts[g]):
        room = rooms[ranges[group]]
        free = next((free for free in range(counts[group], capacity) if room[free]), None)
        if free is None:
            room[capacity - counts[group]].append(group)
        else:
            home = room[free].pop()
            members[home] += members.pop(group)
            room[free - counts[group]].append(home)
    return members


def _ranges(offsets: tuple[int, ...], group: int, groups: int) -> list[int]:
    """Which of the ranges offsets[i] .. offsets[i + 1] each group lies in; one of its own (below 0) if it spans two."""
    ends = [
        (bisect_right(offsets, first) - 1, bisect_right(offsets, first + group - 1) - 1)
        for first in range(0, groups * group, group)
    ]
    return [low if low == high else -1 - index for index, (low, high) in enumerate(ends)]


def _times(weight: BlockSparse, x: Tensor) -> Tensor:
    """W x for a vector of mostly zeros, (K,) float64 -> (N,) float64."""
    n, k = weight.block
    x = x.view(-1, k)
    hit = (x != 0).any(dim=1)[weight.col_indices.long()].nonzero().squeeze(1)
    products = torch.einsum("bnk,bk->bn", weight.values[hit].double(), x[weight.col_indices[hit].long()])
    y = x.new_zeros(weight.shape[0] // n, n).index_add_(0, weight.row_indices()[hit], products).flatten()
    return y if weight.scales is None else y * weight.scales.double()


def _take_rows(projection: SparseProjection, places: Tensor) -> SparseProjection:
    return _projection(projection, rearrange(projection.weight, rows=places), take(projection.bias, places, 0.0))


def _projection(old: SparseProjection, weight: BlockSparse, bias: Tensor) -> SparseProjection:
    """`old` with a new weight and bias; what is the same is shared."""
    if torch.equal(bias, old.bias):
        bias = old.bias
    return old if weight is old.weight and bias is old.bias else SparseProjection(weight, bias)


def _record(before: EncoderWeights, after: EncoderWeights, kept_heads: tuple[int, ...]) -> DeadWeight:
    def removed(old: int, new: int) -> tuple[int, int]:
        return old - new, old

    def blocks(weights: EncoderWeights) -> int:
        return sum(getattr(weights, name).weight.nnz_blocks for name in PROJECTIONS)

    return DeadWeight(
        heads=removed(before.heads, after.heads),
        query_dims=removed(before.query.weight.shape[0], after.query.weight.shape[0]),
        value_channels=removed(before.value.weight.shape[0], after.value.weight.shape[0]),
        neurons=removed(before.fc1.weight.shape[0], after.fc1.weight.shape[0]),
        blocks=removed(blocks(before), blocks(after)),
        kept_heads=kept_heads,
    )


def _check(weights: EncoderWeights) -> None:
    hidden, rows = weights.hidden_size, {name: getattr(weights, name).weight.shape[0] for name in PROJECTIONS}
    columns = {**dict.fromkeys(PROJECTIONS, hidden), "output": rows["value"], "fc2": rows["fc1"]}
    for name, expected in columns.items():
        if (got := getattr(weights, name).weight.shape[1]) != expected:
            raise ValueError(f"remove_dead_weight: expected {name} with {expected} columns, got {got}")
    if rows["key"] != rows["query"]:
        raise ValueError(f"remove_dead_weight: expected key with {rows['query']} rows, got {rows['key']}")
    for name, offsets in (("query", weights.query_rows), ("value", weights.value_rows)):
        if (offsets[0], offsets[-1]) != (0, rows[name]) or list(offsets) != sorted(offsets):
            raise ValueError(f"remove_dead_weight: expected {name}_rows to rise from 0 to {rows[name]}, got {offsets}")
    if len(weights.value_rows) != len(weights.query_rows):
        raise ValueError(
            f"remove_dead_weight: expected value_rows for {weights.heads} heads, got {len(weights.value_rows) - 1}"
        )
