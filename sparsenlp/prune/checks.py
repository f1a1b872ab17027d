"""Checks that the functions which remove structures share; `what` begins the message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..report import is_masked


def check_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError for a value that is not among those known."""
    if value not in known:
        raise ValueError(f"{what}: expected one of {', '.join(known)}, got {value}")


def check_numbers(what: str, kind: str, numbers: Sequence[int], count: int) -> None:
    """Raise ValueError for a number that is not below `count`, or there twice."""
    wrong = [number for number in numbers if not 0 <= number < count]
    if wrong:
        raise ValueError(f"{what}: expected {kind} from 0 to {count - 1}, got {wrong[0]}")
    twice = [number for number, times in Counter(numbers).items() if times > 1]
    if twice:
        raise ValueError(f"{what}: expected each of the {kind} once, got {twice[0]} twice")


def remaining(what: str, kind: str, removed: Sequence[int], count: int) -> Tensor:
    """The numbers below `count` that are not among `removed`, (n,) int64. Raises ValueError if none is left."""
    check_numbers(what, kind, removed, count)
    if len(removed) == count:
        raise ValueError(f"{what}: expected to keep at least one of {count} {kind}, got all to remove")
    stay = torch.ones(count, dtype=torch.bool)
    stay[torch.tensor([*removed], dtype=torch.int64)] = False
    return stay.nonzero().flatten()


def check_unmasked(what: str, name: str, module: nn.Module) -> None:
    """Raise ValueError if a weight of the module called `name` is masked."""
    if any(map(is_masked, module.modules())):
        raise ValueError(f"{what}: expected masks burned in (finalize_), got a mask on {name}")


def check_own(what: str, model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Raise ValueError if the weights of one of these parts of `model` are masked, or shared with another module."""
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    names = {module: name for name, module in model.named_modules()}
    for module in modules:
        name = names[module]
        check_unmasked(what, name, module)
        if places[id(module)] > 1 or any(owners[id(p)] > 1 for p in module.parameters()):
            raise ValueError(f"{what}: expected weights of its own in {name}, got weights shared with another module")
