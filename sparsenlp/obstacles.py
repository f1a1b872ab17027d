"""What keeps a layer dense, and which large weights no sparse layer could hold."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator
from functools import cache

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from .layers import SparseEncoder
from .layers.adapters import adapted_layers, only_called
from .layers.composite import Twin, is_composite
from .plan import SkippedRow

WORTH_SAYING = 0.01
"""Share of a model's weights from which those that no sparse layer could hold are told of."""
ABOUT_A_TENSOR = frozenset({"dtype", "device", "shape", "size", "numel", "dim", "ndim", "is_meta", "requires_grad"})
"""Attributes that say nothing of a weight's values."""
NOT_ON_THE_CPU = ("__init__", "_init", "init", "reset", "cuda")
"""How the names of methods begin that run before there is a sparse layer, or on GPUs alone."""


def is_plain_linear(module: nn.Module) -> bool:
    """nn.Linear itself, parametrized or not: a subclass may compute something else or be read by its owner."""
    cls = type(module)
    return cls is nn.Linear or (parametrize.is_parametrized(module) and cls.__bases__ == (nn.Linear,))


def obstacles(model: nn.Module) -> dict[int, str]:
    """{id(linear, recurrent or convolution): why it must stay as it is}."""
    reasons = {}
    adapted = adapted_layers(model)
    owners: Counter[int] = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for module in model.modules():
        module = module.original if isinstance(module, SparseEncoder) else module
        if isinstance(module, nn.TransformerEncoderLayer):  # its fast path reads the weights itself
            for child in (module.linear1, module.linear2):
                reasons[id(child)] = "weight is read by nn.TransformerEncoderLayer"
        for name, values in weights_read_by(type(module)).items():  # type: ignore[arg-type]  # a class is hashable
            read = getattr(module, name, None)
            if isinstance(read, nn.Module) and (values or is_composite(read)):
                reasons[id(read)] = f"weight is read by {type(module).__name__}"
        if not is_plain_linear(module) and not is_composite(module):
            continue
        owner = adapted.get(module)
        if owner is not None and not (isinstance(module, nn.Linear) and only_called(module, owner)):
            reasons[id(module)] = "its weight is read by the adapter on it; merge that first"
        shared = [n for n, p in module.named_parameters() if owners[id(p)] > 1 and not n.endswith("bias")]
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if is_composite(module):
            shared, hooks = [n for n in shared if n.startswith("weight")], []
        if shared:
            reasons[id(module)] = "weight is shared with another module"
        elif any(not isinstance(hook, BasePruningMethod) for hook in hooks):
            reasons[id(module)] = "has forward hooks, which would be lost"
    return reasons


@cache
def weights_read_by(cls: type[nn.Module]) -> dict[str, bool]:
    """{child: whether its values matter} of the children whose `weight` the class reads instead of calling them.

    Found in the source, as `self.child.weight`; a class without source reads none.
    """
    read: dict[str, bool] = {}
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins", "sparsenlp"):
            continue
        for name, method in vars(base).items():
            if inspect.isfunction(method) and not name.startswith(NOT_ON_THE_CPU):
                function = inspect.unwrap(method)
                for child, values in _reads(function.__code__.co_names, function):
                    read[child] = read.get(child, False) or values
    return read


def _reads(names: tuple[str, ...], method: object) -> Iterator[tuple[str, bool]]:
    if "weight" not in names:
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))  # type: ignore[arg-type]
    except (OSError, SyntaxError):
        return
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.value, ast.Attribute)):
            continue
        child, parent = node.value, parents.get(node)
        if isinstance(child.value, ast.Name) and child.value.id == "self":
            about = isinstance(parent, ast.Attribute) and parent.attr in ABOUT_A_TENSOR
            asks = isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "isinstance"
            yield child.attr, not (about or asks)


def skipped_weights(model: nn.Module, share: float = WORTH_SAYING) -> tuple[SkippedRow, ...]:
    """The weights that `sparsify_` cannot consider, alike ones together, where they are that share of the model's."""
    total = sum(p.numel() for p in model.parameters())
    inside = {child for module in model.modules() if isinstance(module, Twin) for child in module.modules()}
    rows: dict[tuple[str, str, str, bool], list[Tensor]] = {}
    for module in model.modules():
        if module in inside or is_plain_linear(module) or is_composite(module):
            continue
        for name, parameter in module._parameters.items():
            reason = None if parameter is None else _why_skipped(module, parameter)
            if reason is not None and parameter is not None:
                rows.setdefault((type(module).__name__, name, reason, isinstance(module, nn.Linear)), []).append(
                    parameter
                )
    return tuple(
        SkippedRow(kind, name, len(each), weights, reason, linear)
        for (kind, name, reason, linear), each in rows.items()
        if (weights := sum(p.numel() for p in {id(p): p for p in each}.values())) >= max(share * total, 1)
    )


def _why_skipped(module: nn.Module, weight: Tensor) -> str | None:
    """None for what is no matrix, embeddings among them."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or sum(size > 1 for size in weight.shape) < 2:
        return None
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return f"{kind} is a class of its own beside nn.Linear, and may compute something else"
    if kind == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return "stored transposed; models.decoders.conv1d_to_linear_ makes nn.Linear of it"
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"no sparse kernel for {kind}" + (" with groups" if module.groups > 1 else "")
    if weight.dim() > 2:
        return f"{weight.dim()} dimensions, where sparse layers hold matrices"
    return "a matrix of the module itself, not of an nn.Linear in it"
