"""The program that torch.compile generates for a GPU holds our Triton kernels: written without a GPU, never run.

Inductor asks torch.cuda for the device's properties and Triton for a driver; both are stubs here, of an A100. The whole
of torch.compile cannot run so, as it loads what it generated, which needs a driver: the graph goes from AOTAutograd
through Inductor's lowering to the text of its program. Inductor's pass that spares copies is left out on the way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from attention_cases import BlockSparseAttentionCase
from cases import BsrLinearCase
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from traced import plan_for_an_a100, traced_graph

from sparsenlp.ops.bsr_linear import call

triton = pytest.importorskip("triton", reason="Triton is not installed (its wheels are for Linux)")
pytest.importorskip("sparsenlp_kernels", reason="the package sparsenlp_kernels is not installed")

A100 = {"major": 8, "minor": 0, "multi_processor_count": 108, "warp_size": 32, "name": "A100", "gcnArchName": ""}
A100 |= {"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024}
A100 |= {"total_memory": 1 << 36, "L2_cache_size": 40 << 20}
A100 |= {"shared_memory_per_block_optin": 166912, "shared_memory_per_multiprocessor": 167936}


def stub_driver() -> None:
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 80, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    triton.runtime.driver.set_active(driver)


def stub_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.hints import DeviceProperties

    properties = DeviceProperties(
        type="cuda", index=0, cc=80, **{name: A100[name] for name in DeviceProperties._fields if name in A100}
    )
    monkeypatch.setattr(DeviceProperties, "create", classmethod(lambda cls, device: properties))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(**A100))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def program(graph: fx.GraphModule, arguments: list[Tensor], mode: FakeTensorMode) -> str:
    """What Inductor generates for a graph of AOTAutograd."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import decompose_triton_kernel_wrapper_functional
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    decompose_triton_kernel_wrapper_functional(graph.graph)
    graph.recompile()
    lowering = GraphLowering(graph, example_inputs=arguments, shape_env=mode.shape_env)
    with mode, V.set_graph_handler(lowering), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        lowering.run(*arguments)
        return lowering.codegen()[0].value


def bsr_linear_case():
    case = BsrLinearCase((64,), 128, 128, (32, 32), dtype=torch.float16)
    weight = case.weight()
    tensors = [case.x(), weight.crow_indices, weight.col_indices, weight.values, case.bias_vector()]
    return lambda x, *rest: call(x, *rest[:3], 128, rest[3], "gelu") + 1, tensors, ("_stream_kernel", "_join_kernel")


def block_sparse_attention_case():
    case = BlockSparseAttentionCase(64, mask="causal", block=(32, 32), padding=True, dtype=torch.float16)
    *tensors, scale = case.raw_arguments()
    op = torch.ops.sparsenlp.block_sparse_attention.default
    return lambda *tensors: op(*tensors, scale)[0] + 1, tensors, ("_forward_kernel",)


def main() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        plan_for_an_a100(monkeypatch)
        stub_driver()
        traced = []
        for function, tensors, kernels in (bsr_linear_case(), block_sparse_attention_case()):
            with FakeTensorMode() as mode:
                arguments = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]
                traced.append((traced_graph(function, *arguments), arguments, mode, kernels))
        stub_torch(monkeypatch)  # not before: AOTAutograd would look for the state of a generator of random numbers
        for graph, arguments, mode, kernels in traced:
            text = program(graph, arguments, mode)
            for kernel in kernels:
                assert f"async_compile.triton('{kernel}'" in text, f"{kernel} is not in the program"
                assert f"{kernel}_" in text.partition("def call(")[2], f"{kernel} is not launched"
            assert "torch.ops.sparsenlp" not in text


def test_the_generated_program_holds_our_kernels():
    """In a process of its own: Inductor remembers that there is a GPU."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


if __name__ == "__main__":
    main()
