"""Prune a transformer block by block: the inputs of each block are what the pruned blocks before it make of the data.

Peak memory is the model, the hidden states of the whole calibration set at one depth, the activations of one block
for one batch, and the statistics of one block's layers; with `rollback` also a copy of the weights that are pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.composite import on_split
from ..modes import evaluating
from .layers import FilterFn, apply_solution_, mask_of, solvable, trainable_weight
from .masked import take_mask_
from .masks import check_sparsity
from .obs import exact_obs
from .patterns import Block, Pattern
from .reconstruct import Solution, sparsegpt, wanda

Batch = Mapping[str, Tensor] | Tensor
Progress = Callable[[int, int], None]

Solver = Callable[..., Solution]
"""(weight, statistic, previous=mask or None) -> (mask, new weight)."""


@on_split
def sparsegpt_(
    model: nn.Module,
    batches: Iterable[Batch],
    pattern: Pattern,
    sparsity: float,
    dampening: float = 0.01,
    block_size: int = 128,
    refine_steps: int = 0,
    filter_fn: FilterFn | None = None,
    blocks: str | None = None,
    rollback: bool = True,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Prune the linear layers of a model's blocks with SparseGPT, in place; see `sparsegpt` for its parameters.

    batches    calibration inputs of the model, without labels: keyword arguments, or a tensor for its only
               argument; where there is an "attention_mask" (B, S), padding does not count. At least as many
               tokens as the widest layer has input features
    filter_fn  (module, name) -> bool selects layers; by default all but heads, poolers and embeddings
    blocks     dotted name of the nn.ModuleList of blocks; by default that with the most weights to prune.
               Layers outside of it stay as they are
    rollback   undo all if anything fails, at the price of a copy of the pruned weights; without it the blocks
               that were done stay pruned, and the error says how many
    progress   called with (blocks done, blocks)
    returns    layer name -> sparsity, of the layers inside the blocks

    The masks are those of `prune_`: parametrizations that hold through training, made permanent by `finalize_`.
    Layers that carry masks of the same pattern are pruned further.

    Raises ValueError, with the model untouched, for a sparsity out of range, no selected layer in the blocks, a
    shape that the pattern does not divide, masks of another pattern, weights that are tied or computed, too few
    tokens, activations that are not finite, and blocks that do not run once each, one on the output of the other.
    """
    solve = partial(
        sparsegpt,
        pattern=pattern,
        sparsity=sparsity,
        dampening=dampening,
        block_size=block_size,
        refine_steps=refine_steps,
    )
    selected = _Selection.of("sparsegpt_", model, pattern, sparsity, filter_fn, blocks)
    selected.tokens_needed = max(layer.in_features for layer in selected.layers.values())
    return _prune_blocks(selected, batches, solve, _gram, rollback, progress)


@on_split
def exact_obs_(
    model: nn.Module,
    batches: Iterable[Batch],
    pattern: Block,
    sparsity: float,
    dampening: float = 0.01,
    at_once: int = 16,
    filter_fn: FilterFn | None = None,
    blocks: str | None = None,
    rollback: bool = True,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Prune the linear layers of a model's blocks to block sparsity with `exact_obs`; otherwise as `sparsegpt_`."""
    if not isinstance(pattern, Block):
        raise ValueError(f"exact_obs_: expected a pattern of blocks such as 8x1, got {pattern}")
    solve = partial(exact_obs, pattern=pattern, sparsity=sparsity, dampening=dampening, at_once=at_once)
    selected = _Selection.of("exact_obs_", model, pattern, sparsity, filter_fn, blocks)
    selected.tokens_needed = max(layer.in_features for layer in selected.layers.values())
    return _prune_blocks(selected, batches, solve, _gram, rollback, progress)


@on_split
def wanda_(
    model: nn.Module,
    batches: Iterable[Batch],
    pattern: Pattern,
    sparsity: float,
    filter_fn: FilterFn | None = None,
    blocks: str | None = None,
    rollback: bool = True,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Prune the linear layers of a model's blocks with Wanda (see `wanda`); otherwise as `sparsegpt_`.

    One token is enough in principle.
    """
    solve = partial(wanda, pattern=pattern, sparsity=sparsity)
    selected = _Selection.of("wanda_", model, pattern, sparsity, filter_fn, blocks)
    return _prune_blocks(selected, batches, solve, _squares, rollback, progress)


def find_blocks(model: nn.Module, layers: Mapping[str, nn.Linear]) -> str:
    """Dotted name of the nn.ModuleList whose modules hold the most weights of `layers`, the outermost among equals.

    Raises ValueError if no ModuleList holds any.
    """
    chosen = set(layers.values())
    sizes = {
        name: sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear) and m in chosen)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not any(sizes.values()):
        raise ValueError(
            f"find_blocks: expected an nn.ModuleList of blocks with layers to prune, got none in {type(model).__name__}"
        )
    return max(sizes, key=lambda name: sizes[name])


@dataclass
class _Selection:
    """What is pruned: `layers` by their name in `model`, all inside `blocks`."""

    caller: str
    model: nn.Module
    pattern: Pattern
    layers: dict[str, nn.Linear]
    blocks: list[nn.Module]
    tokens_needed: int = 1

    @classmethod
    def of(
        cls,
        caller: str,
        model: nn.Module,
        pattern: Pattern,
        sparsity: float,
        filter_fn: FilterFn | None,
        blocks: str | None,
    ) -> _Selection:
        check_sparsity(pattern, sparsity)
        layers = solvable(caller, model, pattern, filter_fn)
        name = find_blocks(model, layers) if blocks is None else blocks
        found = dict(model.named_modules()).get(name)
        if not isinstance(found, nn.ModuleList):
            raise ValueError(f"{caller}: expected the name of an nn.ModuleList, got {name}")
        inside = {module for module in found.modules() if isinstance(module, nn.Linear)}
        layers = {key: layer for key, layer in layers.items() if layer in inside}
        if not layers:
            raise ValueError(f"{caller}: expected layers to prune in {name}, got none")
        return cls(caller, model, pattern, layers, list(found))

    def within(self, block: nn.Module) -> dict[str, nn.Linear]:
        inside = set(block.modules())
        return {name: layer for name, layer in self.layers.items() if layer in inside}


@torch.no_grad()
def _prune_blocks(
    selected: _Selection,
    batches: Iterable[Batch],
    solve: Solver,
    statistic: Callable[[Tensor], Tensor],
    rollback: bool,
    progress: Progress | None,
) -> dict[str, float]:
    blocks, done, sparsities = selected.blocks, 0, {}
    with evaluating(selected.model), ExitStack() as undo:
        runs = _capture(selected, batches)
        try:
            for index, block in enumerate(blocks):
                layers = selected.within(block)
                statistics = _statistics(selected.caller, block, layers, runs, index, statistic) if layers else {}
                solutions = {}
                for name, layer in layers.items():
                    present = mask_of(layer)
                    try:
                        solutions[name] = solve(
                            layer.weight, statistics.pop(name), previous=None if present is None else present.mask
                        )
                    except ValueError as error:
                        raise ValueError(f"{selected.caller}: {name}: {error}") from None
                for name, (mask, weight) in solutions.items():
                    if rollback:
                        undo.callback(_restorer(layers[name]))
                    apply_solution_(layers[name], mask, weight, selected.pattern)
                    sparsities[name] = 1 - mask.sum().item() / mask.numel()
                done = index + 1
                if done < len(blocks):
                    for run in runs:
                        run.advance(block, index)
                if progress is not None:
                    progress(done, len(blocks))
        except Exception as error:
            if done and not rollback:
                raise RuntimeError(
                    f"{selected.caller}: expected to prune {len(blocks)} blocks, got to {done}; these stay pruned, "
                    f"the others are untouched: {error}"
                ) from error
            raise
        undo.pop_all()  # nothing is left to undo
    return sparsities


class _Call(NamedTuple):
    """How the model called a block: what came after the hidden states, and their name if they had one."""

    others: tuple[Any, ...]
    named: dict[str, Any]
    hidden_name: str | None


@dataclass
class _Run:
    """One batch on its way: the input of the next block, and how the dense model called each block.

    keep   (B, S) bool, False for padding, or None
    """

    hidden: Tensor
    calls: list[_Call | None]
    keep: Tensor | None

    def output(self, block: nn.Module, index: int) -> Tensor:
        call = self.calls[index]
        assert call is not None
        hidden = self.hidden.clone()  # a block may add to its input in place
        if call.hidden_name is None:
            return _first(block(hidden, *call.others, **call.named))
        return _first(block(**{call.hidden_name: hidden}, **call.named))

    def advance(self, block: nn.Module, index: int) -> None:
        """Replace the hidden states by the block's output, and let go of its arguments."""
        self.hidden = self.output(block, index)
        self.calls[index] = None

    def rows(self, x: Tensor) -> Tensor:
        """x (..., K) as (tokens, K) without padding."""
        keep = self.keep
        return x[keep] if keep is not None and x.shape[:-1] == keep.shape else x.flatten(0, -2)


def _capture(selected: _Selection, batches: Iterable[Batch]) -> list[_Run]:
    """Run the dense model on every batch; checks that the blocks are a chain and the activations finite."""
    base = getattr(selected.model, "base_model", selected.model)  # without the head of a transformers model
    base = base if set(selected.blocks) <= set(base.modules()) else selected.model
    device = trainable_weight(next(iter(selected.layers.values()))).device
    runs: list[_Run] = []
    with _no_cache(base):
        for number, batch in enumerate(batches):
            keep = None
            with _Recorder(selected.caller, selected.blocks, number) as recorder:
                if isinstance(batch, Tensor):
                    base(batch.to(device))
                else:
                    inputs = {name: value.to(device) for name, value in batch.items()}
                    base(**inputs)
                    padding = inputs.get("attention_mask")
                    keep = padding.bool() if padding is not None and padding.dim() == 2 else None
            runs.append(recorder.run(keep))
    tokens = sum(int(run.keep.sum()) if run.keep is not None else run.hidden[..., 0].numel() for run in runs)
    if tokens < selected.tokens_needed:
        raise ValueError(
            f"{selected.caller}: expected at least {selected.tokens_needed} tokens of calibration data, as many as the "
            f"widest layer has inputs, got {tokens}"
        )
    return runs


class _Recorder(ExitStack):
    """While open, hooks on the blocks record how a forward pass calls them, and check that they are a chain."""

    def __init__(self, caller: str, blocks: Sequence[nn.Module], batch: int) -> None:
        super().__init__()
        self.caller, self.blocks, self.batch = caller, blocks, batch
        self.calls: list[_Call | None] = []
        self.first = self.last = torch.empty(0)  # input of the first block, output of the latest
        for block in blocks:
            self.callback(block.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            self.callback(block.register_forward_hook(self._after).remove)

    def run(self, keep: Tensor | None) -> _Run:
        if len(self.calls) != len(self.blocks):
            raise ValueError(f"{self.caller}: expected {len(self.blocks)} blocks to run, got {len(self.calls)}")
        return _Run(self.first, self.calls, keep)

    def _before(self, block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        index = len(self.calls)
        if index >= len(self.blocks) or block is not self.blocks[index]:
            raise ValueError(f"{self.caller}: expected each block to run once and in order, got another order")
        hidden, call = _split(self.caller, args, named)
        if not hidden.isfinite().all():
            raise ValueError(
                f"{self.caller}: expected finite activations, got NaN or infinite ones before block {index} "
                f"in batch {self.batch}"
            )
        if index == 0:
            self.first = hidden.clone()
        elif hidden is not self.last and not torch.equal(hidden, self.last):
            raise ValueError(f"{self.caller}: expected block {index} to take the output of the one before, got another")
        self.calls.append(call)

    def _after(self, _: nn.Module, __: Any, output: Any) -> None:
        self.last = _first(output)


def _split(caller: str, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, _Call]:
    """The hidden states of a block's arguments, and the others."""
    if args and isinstance(args[0], Tensor):
        return args[0], _Call(args[1:], named, None)
    for name, value in named.items():
        if not args and isinstance(value, Tensor):
            return value, _Call((), {key: other for key, other in named.items() if key != name}, name)
    raise ValueError(f"{caller}: expected hidden states as a block's first argument, got none")


def _first(output: Any) -> Tensor:
    """The hidden states of what a block returns."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """A transformers model keeps no keys and values meanwhile."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        config.use_cache = before  # type: ignore[union-attr]


def _statistics(
    caller: str,
    block: nn.Module,
    layers: Mapping[str, nn.Linear],
    runs: Sequence[_Run],
    index: int,
    statistic: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The sum of `statistic(rows)` over the inputs of each layer; computed once for layers that share an input."""
    sums: dict[str, Tensor] = {}
    shared: list[tuple[Tensor, Tensor]] = []  # the latest input, and its statistic

    def add(name: str, run: _Run, x: Tensor) -> None:
        if not shared or shared[0][0] is not x:
            shared[:] = [(x, statistic(run.rows(x).float()))]
        value = shared[0][1]
        sums[name] = sums[name].add_(value) if name in sums else value.clone()

    for run in runs:
        with ExitStack() as hooks:
            for name, layer in layers.items():
                hook = partial(_call_with_input, partial(add, name, run))
                hooks.callback(layer.register_forward_pre_hook(hook).remove)
            run.output(block, index)
    if missing := [name for name in layers if name not in sums]:
        raise ValueError(f"{caller}: expected every layer to run, got no input of {missing[0]}")
    return sums


def _call_with_input(function: Callable[[Tensor], None], _: nn.Module, args: tuple[Any, ...]) -> None:
    function(args[0])


def _gram(rows: Tensor) -> Tensor:
    return rows.t() @ rows


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum(dim=0)


def _restorer(layer: nn.Linear) -> Callable[[], None]:
    """A function that gives a layer the weight and the mask that it has now."""
    weight = trainable_weight(layer).detach().clone()
    present = mask_of(layer)
    mask = None if present is None else present.mask.clone()

    def restore() -> None:
        if mask is None:
            if mask_of(layer) is not None:
                take_mask_(layer, keep_zeros=False)
        else:
            mask_of(layer).mask.copy_(mask)  # type: ignore[union-attr]
        with torch.no_grad():
            trainable_weight(layer).copy_(weight)

    return restore
