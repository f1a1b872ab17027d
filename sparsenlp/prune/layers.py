"""Which linear layers of a model are pruned, and the masks they carry."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from ..layers.adapters import adapter_modules
from ..layers.composite import named_layers
from ..obstacles import skipped_weights
from ..report import torch_pruned
from .masked import computed, put_mask_
from .selection import body, is_router, is_task_part

if TYPE_CHECKING:
    from .patterns import Pattern

FilterFn = Callable[[nn.Module, str], bool]


class Mask(nn.Module):
    """Parametrization weight -> weight * mask, with the mask (N, K) a bool buffer.

    It follows state_dict, deepcopy and device moves; a dtype change leaves it bool. `put_mask_` puts it on.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, pattern: str) -> None:
        super().__init__()
        self.pattern = pattern
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return computed(weight * self.mask)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to a masked weight stores the new values as they are; the mask stays."""
        return weight

    def extra_repr(self) -> str:
        return f"pattern={self.pattern}, sparsity={1 - self.mask.float().mean().item():.3f}"


def default_filter(module: nn.Module, name: str) -> bool:
    """Every nn.Linear, except under a module named in TASK_PARTS, routers, and the out_proj of nn.MultiheadAttention.

    Decided by the parts of the dotted name, so `classifier.dense` is left alone and
    `encoder.layer.0.output.dense` is not; nn.MultiheadAttention reads its out_proj's weight without
    calling the layer, which therefore could not be replaced by a sparse one.
    """
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return not is_task_part(name) and not is_router(module, name)


def prunable(model: nn.Module, filter_fn: FilterFn | None = None) -> dict[str, nn.Linear]:
    """The linear layers that `filter_fn(module, name)` selects, by dotted name, in the model's order.

    `filter_fn` is asked about nn.Linear modules only. By default those are selected that `default_filter` accepts, that
    no head of a transformers model holds (what is outside of its base model, and its output embeddings), whose weight
    no embedding or head shares, and that are no adapter (see layers.adapters). The matrices of an nn.LSTM or
    nn.GRU (`lstm.ih_l0`, `lstm.hh_l0`, ...) come as views: their weights and gradients are those of the model; the
    filters of an nn.Conv1d (`conv.filters`) as a copy. Before masks or hooks are put on them,
    `layers.composite.split_composites_` must make them part of the model, as `prune_` and the solvers do by
    themselves. Raises ValueError if the model has no linear layer or the filter selects none.
    """
    linears = {name: module for name, module in named_layers(model) if isinstance(module, nn.Linear)}
    if not linears:
        raise ValueError(
            f"prune: expected a model with nn.Linear layers, got none in {type(model).__name__}{_left_out(model)}"
        )
    by_default = filter_fn in (None, default_filter)
    adapters = adapter_modules(model) if by_default else set()
    selects = filter_fn or default_filter
    chosen = {name: m for name, m in linears.items() if m not in adapters and selects(m, name)}
    if filter_fn is None:
        chosen = body(model, chosen)
    if not chosen:
        shown = ", ".join(list(linears)[:3])
        raise ValueError(
            f"prune: expected filter_fn to select a layer, got none of {len(linears)} ({shown}, ...){_left_out(model)}"
        )
    return chosen


def left_alone(model: nn.Module) -> dict[str, str]:
    """{name of a module that holds matrices which the default filter cannot prune: why}, as `say_left_alone` says."""
    adapters = adapter_modules(model)
    views = {name.rpartition(".")[0] for name, _ in named_layers(model)}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if module in adapters:
            if isinstance(module, nn.Linear) and default_filter(module, name):
                reasons[name] = "part of an adapter; merge it, or choose it with filter_fn"
        elif tensors := torch_pruned(module) if not isinstance(module, nn.Linear) else []:
            reasons[name] = f"{tensors[0]} carries a mask of torch.nn.utils.prune; finalize_ makes its zeros plain"
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.Conv1d) and name not in views:
            reasons[name] = f"a {kind} as it is here cannot be split into linear matrices"
    return reasons


def say_left_alone(model: nn.Module, filter_fn: FilterFn | None) -> None:
    """Warn about what the default filter leaves dense and a user may not expect."""
    reasons = left_alone(model) if filter_fn in (None, default_filter) else {}
    for reason in dict.fromkeys(reasons.values()):
        names = [name for name, other in reasons.items() if other == reason]
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        warnings.warn(f"prune: left alone: {', '.join(names[:2])}{more}: {reason}", stacklevel=4)


def _left_out(model: nn.Module) -> str:
    """The end of an error: weights that are in no nn.Linear."""
    return "".join(f"; {row}" for row in skipped_weights(model) if not row.prunable)


def mask_of(layer: nn.Linear) -> Mask | None:
    """The mask on a layer's weight, None if it has none or one of torch.nn.utils.prune.

    What follows a mask, like int8 rounding, is left alone.

    Raises ValueError if the weight is computed in another way, such as by a weight norm.
    """
    chain = _parametrizations(layer)
    if chain is not None:
        if isinstance(chain[0], Mask):
            return chain[0]
        raise ValueError(f"expected a plain weight, got one parametrized by {type(chain[0]).__name__}")
    if "weight" not in layer._parameters and torch_mask_of(layer) is None:
        raise ValueError("expected the weight to be a Parameter, got a computed one; make it permanent first")
    return None


def torch_mask_of(layer: nn.Linear) -> Tensor | None:
    """The mask (N, K) of 0 and 1 that torch.nn.utils.prune keeps for a layer's weight, None without one."""
    return layer._buffers.get("weight_mask") if "weight_orig" in layer._parameters else None


def solvable(
    caller: str, model: nn.Module, pattern: Pattern, filter_fn: FilterFn | None = None
) -> dict[str, nn.Linear]:
    """The layers of `prunable`, checked for a solver, which writes weights and masks.

    Raises ValueError, beginning with `caller` and naming the layer, for a shape that the pattern does not divide, a
    weight that is computed or tied to another selected layer's, and masks of another pattern.
    """
    layers = prunable(model, filter_fn)
    say_left_alone(model, filter_fn)
    owners: dict[Tensor, str] = {}
    for name, layer in layers.items():
        try:
            present = mask_of(layer)
            pattern.check((layer.out_features, layer.in_features))
        except ValueError as error:
            raise ValueError(f"{caller}: {name or type(layer).__name__}: {error}") from None
        if present is not None and present.pattern != str(pattern):
            raise ValueError(
                f"{caller}: expected pattern {present.pattern}, which {name} has been pruned to, got {pattern}; "
                "call finalize_ first"
            )
        if torch_mask_of(layer) is not None:
            raise ValueError(
                f"{caller}: expected {name} without a mask of torch.nn.utils.prune, got one; "
                "torch.nn.utils.prune.remove makes its zeros plain weights"
            )
        owner = owners.setdefault(trainable_weight(layer), name)
        if owner != name:
            raise ValueError(f"{caller}: expected weights of their own, got {name} tied to {owner}; select one of them")
    return layers


@torch.no_grad()
def apply_solution_(layer: nn.Linear, mask: Tensor, weight: Tensor, pattern: Pattern) -> None:
    """Give a layer a new weight (N, K) and the mask that it keeps; a mask that it carries is replaced."""
    trainable_weight(layer).copy_(weight)
    present = mask_of(layer)
    if present is not None:
        present.mask.copy_(mask)
    else:
        put_mask_(layer, Mask(mask, str(pattern)))


def masked_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that carry a mask, by dotted name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(isinstance(p, Mask) for p in _parametrizations(module) or ())
    }


def trainable_weight(layer: nn.Linear) -> Tensor:
    """The Parameter that an optimizer updates: the weight itself, or the one under its mask."""
    chain = _parametrizations(layer)
    if chain is not None:
        return chain.original
    return layer.weight if torch_mask_of(layer) is None else cast(Tensor, layer.weight_orig)


def _parametrizations(layer: nn.Linear) -> parametrize.ParametrizationList | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return cast(nn.ModuleDict, layer.parametrizations)["weight"]  # type: ignore[return-value]
