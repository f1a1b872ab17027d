"""What a compiler is given of a function on fake tensors of a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_function

from sparsenlp import triton_kernels


def plan_for_an_a100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the launchers of our kernels believe that there is one."""
    from sparsenlp_kernels import launch

    monkeypatch.setattr(triton_kernels, "why_unavailable", lambda: "")
    monkeypatch.setattr(triton_kernels, "why_device_unavailable", lambda index: "")
    monkeypatch.setattr(launch.Device, "of", classmethod(lambda cls, tensor: launch.Device("sm_80", 108)))


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
