"""What a compiler is given: the ops of a function on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_function


class Traced(Exception):
    """Carries the graph that a compiler was given."""


def traced_graph(function: Callable[..., Any], *arguments: Tensor) -> fx.GraphModule:
    """What AOTAutograd makes of the function."""

    def compiler(graph: fx.GraphModule, _: Any) -> Any:
        raise Traced(graph)

    with pytest.raises(Traced) as caught:
        aot_function(function, fw_compiler=compiler)(*arguments)
    return caught.value.args[0]


def traced_ops(function: Callable[..., Any], *arguments: Tensor) -> list[str]:
    graph = traced_graph(function, *arguments)
    return [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"]
