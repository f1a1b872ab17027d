"""What criteria know about a layer beside its weight, and how it is collected while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layers import trainable_weight


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Float32 tensors about an (N, K) weight; None is what was not collected.

    taylor           (N, K)  running mean of |w · dL/dw|
    gradient_square  (N, K)  mean of (dL/dw)², the diagonal of the empirical Fisher matrix
    gradient_sum     (N, K)  sum of |dL/dw|
    connection       (N, K)  |sum of w · dL/dw|, which is |w · sum of dL/dw| while w stands still
    movement         (N, K)  -(sum of w · dL/dw), signed: positive where w moves away from zero
    input_square     (K,)    E[x²] of each input feature
    input_gram       (K, K)  E[x xᵀ] of the inputs
    """

    taylor: Tensor | None = None
    gradient_square: Tensor | None = None
    gradient_sum: Tensor | None = None
    connection: Tensor | None = None
    movement: Tensor | None = None
    input_square: Tensor | None = None
    input_gram: Tensor | None = None

    def require(self, field: str) -> Tensor:
        """The field's tensor; ValueError if it was not collected."""
        value = getattr(self, field)
        if value is None:
            raise ValueError(f"statistics: expected {field}, got None; collect it first")
        return value


class Collector(Mapping[str, LayerStatistics]):
    """Layer name -> LayerStatistics of what has been seen; a layer is absent until then.

    seen  layer name -> how many backward passes or tokens

    The tensors handed out may be the ones that later updates change. Memory: one float32 tensor of
    the field's shape per field and layer.
    """

    fields_offered: tuple[str, ...] = ()

    def __init__(self, layers: Mapping[str, nn.Linear], fields: Sequence[str], decay: float | None) -> None:
        kind = type(self).__name__
        unknown = [field for field in fields if field not in self.fields_offered]
        if unknown or not fields:
            raise ValueError(
                f"{kind}: expected fields among {', '.join(self.fields_offered)}, got {unknown or list(fields)}"
            )
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"{kind}: expected a decay in [0, 1), got {decay}")
        self.layers = dict(layers)
        self.fields = tuple(fields)
        self.decay = decay
        self.seen = dict.fromkeys(self.layers, 0)
        self._values = {
            f"{field}.{name}": torch.zeros(_shape(field, layer), device=trainable_weight(layer).device)
            for field in self.fields
            for name, layer in self.layers.items()
        }

    def __getitem__(self, name: str) -> LayerStatistics:
        if not self.seen[name]:
            raise KeyError(name)
        return LayerStatistics(**{field: self._read(field, name) for field in self.fields})

    def __iter__(self) -> Iterator[str]:
        return (name for name, seen in self.seen.items() if seen)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def observing(self, attention_mask: Tensor | None = None) -> AbstractContextManager[None]:
        """Surround a forward pass with this; see the class for what it does."""
        return nullcontext()

    def update(self) -> None:
        """Call after `backward`; see the class for what it does."""

    def state_dict(self) -> dict[str, Tensor]:
        """The sums and means under "<field>.<layer>", and "seen", (layers,) int64."""
        return self._values | {"seen": torch.tensor(list(self.seen.values()), dtype=torch.int64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError, with nothing loaded, if names or shapes are not those of these fields and layers."""
        kind, expected = type(self).__name__, self.state_dict()
        if expected.keys() != state.keys():
            differing = sorted(expected.keys() ^ state.keys())
            raise ValueError(f"{kind}: expected a state of the same layers, got a difference in {differing}")
        for key, tensor in expected.items():
            if state[key].shape != tensor.shape:
                raise ValueError(
                    f"{kind}: expected {key} of shape {tuple(tensor.shape)}, got {tuple(state[key].shape)}"
                )
        for key, value in self._values.items():
            value.copy_(state[key])
        self.seen = dict(zip(self.layers, state["seen"].tolist(), strict=True))

    def _read(self, field: str, name: str) -> Tensor:
        return self._values[f"{field}.{name}"]

    def _rate(self, name: str, amount: int) -> float:
        """The weight of `amount` new observations in a mean that holds all the earlier ones."""
        if not self.seen[name]:
            return 1.0
        return 1.0 - self.decay if self.decay is not None else amount / (self.seen[name] + amount)


class GradientStatistics(Collector):
    """Statistics of gradients: "taylor", "gradient_square", "gradient_sum", "connection", "movement".

    layers  name -> nn.Linear, as `prunable` returns them
    fields  which of those are kept
    decay   in [0, 1): means are exponential, with this weight of the past; None: plain means. Sums
            ignore it

    Call `update` after `backward` and before the gradients are clipped or cleared. One update is one
    observation: with batches of one example "gradient_square" is the empirical Fisher, with larger
    ones that of the batch's mean loss, as in Adam. For a layer that carries a mask the gradient is
    that of the masked weight: a pruned weight has none, so its means decay to zero.
    """

    fields_offered = ("taylor", "gradient_square", "gradient_sum", "connection", "movement")

    def __init__(
        self, layers: Mapping[str, nn.Linear], fields: Sequence[str] = ("taylor",), decay: float | None = 0.95
    ) -> None:
        super().__init__(layers, fields, decay)

    @torch.no_grad()
    def update(self) -> None:
        """Fold the present gradients in. Raises RuntimeError, with nothing changed, if a layer has none."""
        weights = {name: trainable_weight(layer) for name, layer in self.layers.items()}
        gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        for name in weights:
            if name not in gradients:
                raise RuntimeError(f"GradientStatistics: expected a gradient in {name}, got None; call backward first")
        for name, gradient in gradients.items():
            rate = self._rate(name, 1)
            for field in self.fields:
                value = self._values[f"{field}.{name}"]
                observed = _OBSERVED[field](weights[name], gradient).to(value.dtype)
                if field in _MEANS:
                    value.lerp_(observed, rate)
                else:
                    value.add_(observed)
            self.seen[name] += 1

    def _read(self, field: str, name: str) -> Tensor:
        value = super()._read(field, name)
        return value.abs() if field == "connection" else value


class InputStatistics(Collector):
    """Statistics of what enters layers: "input_square" and "input_gram".

    layers  name -> nn.Linear, as `prunable` returns them
    fields  which of those are kept; a Gram matrix takes K² · 4 bytes per layer
    decay   None: plain means over all tokens; in [0, 1): exponential means over forward passes

        with statistics.observing(inputs["attention_mask"]):
            model(**inputs)

    Forward hooks stand only inside the `with` block. Source of the use: Sun et al. 2023, arXiv:2306.11695.
    """

    fields_offered = ("input_square", "input_gram")

    def __init__(
        self,
        layers: Mapping[str, nn.Linear],
        fields: Sequence[str] = ("input_square",),
        decay: float | None = None,
    ) -> None:
        super().__init__(layers, fields, decay)

    @contextmanager
    def observing(self, attention_mask: Tensor | None = None) -> Iterator[None]:
        """Fold in the inputs of every call of the layers inside the block.

        attention_mask  (B, T), 0 at padding tokens, which are left out; None counts every token

        Inside, a layer whose inputs are neither B · T tokens nor, as in a PackedSequence, those without the padding
        raises ValueError; leave it out of `layers`.
        """
        mask = None if attention_mask is None else attention_mask.detach().bool().flatten()
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.enter_context(layer.register_forward_pre_hook(self._hook(name, mask)))
            yield

    def _hook(self, name: str, mask: Tensor | None) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def observe(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            self._fold(name, arguments[0].detach(), mask)

        return observe

    @torch.no_grad()
    def _fold(self, name: str, inputs: Tensor, mask: Tensor | None) -> None:
        tokens = inputs.flatten(0, -2) if inputs.dim() > 1 else inputs[None]
        if mask is not None and len(tokens) != int(mask.count_nonzero()):
            if len(mask) != len(tokens):
                raise ValueError(
                    f"InputStatistics: expected {len(mask)} tokens in {name}, as in attention_mask, "
                    f"got inputs of shape {tuple(inputs.shape)}"
                )
            tokens = tokens[mask.to(tokens.device)]
        count = len(tokens)
        if not count:
            return
        rate = self._rate(name, count)
        tokens = tokens.float()
        with torch.autocast(tokens.device.type, enabled=False):
            for field in self.fields:
                mean = tokens.square().mean(dim=0) if field == "input_square" else tokens.T @ tokens / count
                self._values[f"{field}.{name}"].lerp_(mean, rate)
        self.seen[name] += count


def collector(layers: Mapping[str, nn.Linear], fields: Sequence[str], decay: float | None = 0.95) -> Collector | None:
    """The collector of `fields`, such as a criterion's `needs`; None if there are none.

    Raises ValueError for a decay out of range, an unknown field, or fields of both kinds.
    """
    if not fields:
        return None
    kind = InputStatistics if fields[0] in InputStatistics.fields_offered else GradientStatistics
    return kind(layers, fields, decay)


def fisher_from_adam(optimizer: torch.optim.Optimizer, layers: Mapping[str, nn.Linear]) -> dict[str, LayerStatistics]:
    """`gradient_square` of each layer from Adam's second moment, its bias corrected: no memory kept, no step slower.

    The optimizer sees gradients after clipping and unscaling. Raises ValueError if a layer's weight
    is not among those that an Adam or AdamW has stepped.
    """
    betas = {id(p): group.get("betas") for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, layer in layers.items():
        weight = trainable_weight(layer)
        state, beta = optimizer.state.get(weight, {}), betas.get(id(weight))
        if beta is None or "exp_avg_sq" not in state:
            raise ValueError(
                f"fisher_from_adam: expected {name} to have been stepped by Adam, got none of its second moment "
                f"in {type(optimizer).__name__}"
            )
        correction = 1.0 - beta[1] ** float(state["step"])
        found[name] = LayerStatistics(gradient_square=state["exp_avg_sq"].float() / correction)
    return found


_OBSERVED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "taylor": lambda weight, gradient: (weight * gradient).abs_(),
    "gradient_square": lambda weight, gradient: gradient.square(),
    "gradient_sum": lambda weight, gradient: gradient.abs(),
    "connection": lambda weight, gradient: weight * gradient,
    "movement": lambda weight, gradient: -weight * gradient,
}
_MEANS = ("taylor", "gradient_square")


def _shape(field: str, layer: nn.Linear) -> tuple[int, ...]:
    shapes = {"input_square": (layer.in_features,), "input_gram": (layer.in_features, layer.in_features)}
    return shapes.get(field, (layer.out_features, layer.in_features))
