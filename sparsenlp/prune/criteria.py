"""How much each weight matters: (weight, statistic) -> nonnegative scores, lowest pruned first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import trainable_weight


@dataclass(frozen=True)
class Criterion:
    """`score(weight, statistic)` gives (N, K) scores; `statistic` is None unless `needs_statistics`."""

    score: Callable[[Tensor, Tensor | None], Tensor]
    needs_statistics: bool = False


def magnitude(weight: Tensor, statistic: Tensor | None = None) -> Tensor:
    """w², which sums to the squared L2 norm of a block (Han et al. 2015, arXiv:1506.02626)."""
    return weight.square()


def taylor(weight: Tensor, statistic: Tensor | None) -> Tensor:
    """Running mean of |w · dL/dw|: the first-order change of the loss when w becomes zero.

    Molchanov et al. 2017 (arXiv:1611.06440) and 2019 (arXiv:1906.10771), per weight; the mean comes
    from `GradientStatistics`.
    """
    if statistic is None:
        raise ValueError("taylor: expected statistics, got None; pass a GradientStatistics that saw a backward")
    return statistic


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude),
    "taylor": Criterion(taylor, needs_statistics=True),
}


class GradientStatistics:
    """Exponential running mean of |w · dL/dw| for the weights of some linear layers.

    layers   name -> nn.Linear, as `prunable` returns them
    decay    weight of the past, in [0, 1)

    Call `update` after `backward` and before the gradients are clipped or cleared. For a layer that
    carries a mask the product is that of the effective weight: a pruned weight has no gradient, so
    its mean decays to zero.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], decay: float = 0.95) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"GradientStatistics: expected a decay in [0, 1), got {decay}")
        self.layers = dict(layers)
        self.decay = decay
        self.updates = 0
        self.means = {name: torch.zeros_like(trainable_weight(layer).data) for name, layer in self.layers.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Fold the present gradients in. Raises RuntimeError if a layer has none."""
        weights = {name: trainable_weight(layer) for name, layer in self.layers.items()}
        gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        for name in weights:
            if name not in gradients:
                raise RuntimeError(f"GradientStatistics: expected a gradient in {name}, got None; call backward first")
        rate = 1.0 - self.decay if self.updates else 1.0
        for name, gradient in gradients.items():
            self.means[name].lerp_((weights[name] * gradient).abs_(), rate)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The means by layer name, and the number of updates as a 0-d int64 tensor under "updates"."""
        return {f"means.{name}": mean for name, mean in self.means.items()} | {"updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError, with nothing loaded, if names or shapes are not those of these layers."""
        expected = self.state_dict()
        if expected.keys() != state.keys():
            differing = sorted(expected.keys() ^ state.keys())
            raise ValueError(
                f"GradientStatistics: expected a state of the same layers, got a difference in {differing}"
            )
        for key, tensor in expected.items():
            if state[key].shape != tensor.shape:
                raise ValueError(
                    f"GradientStatistics: expected {key} of shape {tuple(tensor.shape)}, got {tuple(state[key].shape)}"
                )
        for name, mean in self.means.items():
            mean.copy_(state[f"means.{name}"])
        self.updates = int(state["updates"])
