"""Other inference engines as columns of a benchmark: ONNX Runtime, OpenVINO, zentorch and DeepSparse.

An engine that is not installed is left out, and `missing` says so. The extra `peers` installs the first two.
zentorch wants the very torch it was built for (`pip install --no-deps zentorch==2.13.* deprecated wrapt`), and
DeepSparse, which is no longer developed, Python below 3.12 and an old onnx (`pip install --no-deps
deepsparse==1.8.0 sparsezoo==1.8.1 onnx==1.16.2`, and what `sparsezoo` asks for, with numpy<2); so neither is in the
extra.

Engines bring threads of their own, which go on spinning for a while after a call, on cores that the next
engine needs: a pause of SETTLE_SECONDS before each (see `harness.warmed`) keeps them apart.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Step
from torch import Tensor

ENGINES = {
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "onnx"),
    "zentorch": ("zentorch",),
    "deepsparse": ("deepsparse", "onnx"),
}
"""Engine -> the modules it takes to time it."""

LARGEST_ERROR = {"fp32": 1e-5, "bf16": 1e-2, "int8": 3e-2}
"""Norm of the error over norm of the result, above which a peer's result is wrong."""

SETTLE_SECONDS = 10e-3
"""Long enough for OpenMP's threads, and those of the engines here, to stop spinning."""


def missing() -> dict[str, str]:
    """Engine -> one sentence, for each that cannot be timed here."""
    absent = {engine: [m for m in modules if util.find_spec(m) is None] for engine, modules in ENGINES.items()}
    return {engine: f"{engine}: not timed, {' and '.join(m)} not installed" for engine, m in absent.items() if m}


def dense_peers(weight: Tensor, bias: Tensor, x: Tensor, threads: int) -> dict[str, Step]:
    """The installed engines' dense layers for weight (N, K), bias (N,) and x (M, K), all float32; checked.

    Raises AssertionError if an engine's result is wrong.
    """
    absent = missing()
    steps: dict[str, Step] = {}
    for engine, build in {"onnxruntime": onnx_runtime, "openvino": open_vino, "zentorch": zen_torch}.items():
        if engine not in absent:
            steps |= build(weight, bias, x, threads)
    check(steps, weight, bias, x)
    return steps


def sparse_peers(weight: Tensor, bias: Tensor, x: Tensor, threads: int) -> dict[str, Step]:
    """The installed engines that skip the zeros of weight (N, K): DeepSparse, in fp32; checked as `dense_peers`."""
    if "deepsparse" in missing():
        return {}
    os.environ.setdefault("NM_DISABLE_ANALYTICS", "True")  # it reports its use over the network otherwise
    with tempfile.TemporaryDirectory() as folder:
        path = save_onnx(weight, bias, x.shape[0], Path(folder) / "layer.onnx")
        engine = import_module("deepsparse").compile_model(str(path), batch_size=x.shape[0], num_cores=threads)
    steps: dict[str, Step] = {"deepsparse fp32": partial(engine.run, [x.numpy()], val_inp=False)}
    check(steps, weight, bias, x)
    return steps


def check(steps: Mapping[str, Step], weight: Tensor, bias: Tensor, x: Tensor) -> None:
    """Raise AssertionError unless every step computes x Wᵀ + b; its name ends in its dtype."""
    expected = F.linear(x, weight, bias)
    for name, step in steps.items():
        y = step()
        y = torch.as_tensor(y if isinstance(y, Tensor) else next(iter(y.values() if hasattr(y, "values") else y)))
        error = float((y.float() - expected).norm() / expected.norm())
        largest = LARGEST_ERROR[name.split()[-1]]
        assert error <= largest, f"{name}: expected an error of at most {largest:g}, got {error:g}"


def onnx_runtime(weight: Tensor, bias: Tensor, x: Tensor, threads: int) -> dict[str, Step]:
    """MatMul + Add, and the same after ONNX Runtime's dynamic quantization."""
    runtime, quantization = import_module("onnxruntime"), import_module("onnxruntime.quantization")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between calls: it would go on for long
    inputs = {"x": x.numpy()}
    with tempfile.TemporaryDirectory() as folder:
        files = {"onnxruntime fp32": save_onnx(weight, bias, x.shape[0], Path(folder) / "fp32.onnx")}
        files["onnxruntime int8"] = Path(folder) / "int8.onnx"
        logging.disable(logging.WARNING)  # it would recommend a preprocessing that one layer has no use for
        quantization.quantize_dynamic(*files.values(), weight_type=quantization.QuantType.QInt8)
        logging.disable(logging.NOTSET)
        sessions = {name: runtime.InferenceSession(str(path), options) for name, path in files.items()}
    return {name: partial(session.run, None, inputs) for name, session in sessions.items()}


def open_vino(weight: Tensor, bias: Tensor, x: Tensor, threads: int) -> dict[str, Step]:
    """MatMul + Add in OpenVINO's fp32 and, where the CPU has it, bf16."""
    core = import_module("openvino").Core()
    steps: dict[str, Step] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = core.read_model(save_onnx(weight, bias, x.shape[0], Path(folder) / "layer.onnx"))
    names = {"f32": "openvino fp32"}
    if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        names["bf16"] = "openvino bf16"
    for precision, name in names.items():
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        compiled = core.compile_model(model, "CPU", settings | {"INFERENCE_PRECISION_HINT": precision})
        request = compiled.create_infer_request()
        steps[name] = partial(request.infer, {0: x.numpy()}, share_inputs=True, share_outputs=True)
    return steps


def zen_torch(weight: Tensor, bias: Tensor, x: Tensor, threads: int) -> dict[str, Step]:
    """zentorch's linear op on prepacked weights, fp32 and bf16; it runs on torch's threads."""
    import_module("zentorch")
    ops = torch.ops.zentorch
    steps: dict[str, Step] = {}
    for name, dtype in {"zentorch fp32": torch.float32, "zentorch bf16": torch.bfloat16}.items():
        packed = ops.zentorch_weight_prepack_for_linear(weight.to(dtype))
        inputs = (x.to(dtype), packed, bias.to(dtype))
        steps[name] = partial(ops.zentorch_linear_unary, *inputs, is_weight_prepacked=True)
    return steps


def save_onnx(weight: Tensor, bias: Tensor, tokens: int, path: Path) -> Path:
    """y (M, N) = x (M, K) Wᵀ + b as an ONNX file with two nodes; returns `path`."""
    onnx = import_module("onnx")
    helper, array = onnx.helper, onnx.numpy_helper.from_array
    rows, columns = weight.shape

    def value(name: str, size: int) -> Any:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [tokens, size])

    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["product"]), helper.make_node("Add", ["product", "b"], ["y"])],
        "linear",
        [value("x", columns)],
        [value("y", rows)],
        [array(weight.t().contiguous().numpy(), "w"), array(bias.numpy(), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8  # what DeepSparse reads
    onnx.save(model, str(path))
    return path
