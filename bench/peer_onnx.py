"""An encoder as ONNX, in float32 and in the int8 forms that other engines run fast. Runs in their environment.

Needs torch, transformers, onnx, onnxruntime and numpy, nothing of sparsenlp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

OPSET = 14  # what DeepSparse reads; LayerNorm and GELU are recognized in their pieces by all


def export(model: Any, inputs: dict[str, np.ndarray], path: Path) -> Path:
    """Write a transformers encoder with the shape of the inputs; its output is the last hidden state."""
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            # four dimensions, else transformers traces a page of mask arithmetic into the graph
            bias = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
            return self.model(input_ids=input_ids, attention_mask=bias)[0]

    model.config._attn_implementation = "eager"
    names = ["input_ids", "attention_mask"]
    example = tuple(torch.from_numpy(inputs[name]) for name in names)
    with torch.no_grad():
        torch.onnx.export(Encoder().eval(), example, str(path), input_names=names, opset_version=OPSET, dynamo=False)
    return path


def dynamic_int8(source: Path, path: Path) -> Path:
    """ONNX Runtime's own dynamic quantization."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, path, weight_type=QuantType.QInt8)
    return path


def qdq_int8(source: Path, inputs: dict[str, np.ndarray], path: Path) -> Path:
    """Static quantization as QuantizeLinear and DequantizeLinear around every MatMul, calibrated on the inputs."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Once(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[dict[str, np.ndarray]] = iter([inputs])

        def get_next(self) -> Any:
            return next(self.batches, None)

    quantize_static(
        source,
        path,
        Once(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
    )
    return path


def sparseml_int8(source: Path, inputs: dict[str, np.ndarray], path: Path) -> Path:
    """The form that SparseML wrote, and DeepSparse has kernels for; attention's products are in int8 as well.

    QuantizeLinear -> MatMulInteger -> Add (int32 bias) -> Cast -> Mul in place of MatMul -> Add; one scale for a
    tensor, calibrated on the inputs.
    """
    import onnx

    model = onnx.load(str(source))
    nodes = list(model.graph.node)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in nodes:  # the exporter shares equal tensors through Identity
        if node.op_type == "Identity" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    consumers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    products = [node for node in nodes if node.op_type == "MatMul"]
    activations = {name for node in products for name in node.input if name not in constants}
    writer = _IntegerProducts(constants, _ranges(model, sorted(activations), inputs))
    replaced = {}
    for node in products:
        add = next((user for user in consumers[node.output[0]] if user.op_type == "Add"), None)
        bias = next((name for name in add.input if name in constants), None) if add is not None else None
        replaced[node.name] = list(writer.product(node, bias, add.output[0] if bias else node.output[0]))
        if bias:
            replaced[add.name] = []
    new = [one for node in nodes for one in replaced.get(node.name, [node])]
    used = {name for node in new for name in node.input}
    tensors = [tensor for tensor in [*model.graph.initializer, *writer.tensors] if tensor.name in used]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(new)
    model.graph.initializer.extend(tensors)
    onnx.save(model, str(path))
    return path


class _IntegerProducts:
    """Writes MatMulInteger in place of MatMul; collects the constants it needs in `tensors`."""

    def __init__(self, constants: dict[str, Any], ranges: dict[str, tuple[float, float]]) -> None:
        from onnx import TensorProto, helper, numpy_helper

        self.node, self.float = helper.make_node, TensorProto.FLOAT
        self.to_array, self.from_array = numpy_helper.to_array, numpy_helper.from_array
        self.constants, self.ranges = constants, ranges
        self.tensors: list[Any] = []
        self.scales: dict[str, float] = {}  # of the activations that are quantized already

    def product(self, node: Any, bias: str | None, output: str) -> Iterable[Any]:
        scale, names, zeros = 1.0, [], []
        for name in node.input:
            factor, nodes = self.weight(name) if name in self.constants else self.activation(name)
            yield from nodes
            scale *= factor
            names.append(f"{name}_int")
            zeros.append(f"{name}_zero")
        total = f"{output}_sum"
        yield self.node("MatMulInteger", [*names, *zeros], [total])
        if bias:
            value = np.round(self.to_array(self.constants[bias]) / scale).astype(np.int32)
            yield self.node("Add", [total, self.constant(f"{output}_bias", value)], [f"{total}_bias"])
            total = f"{total}_bias"
        yield self.node("Cast", [total], [f"{output}_float"], to=self.float)
        yield self.node("Mul", [f"{output}_float", self.constant(f"{output}_scale", np.float32(scale))], [output])

    def weight(self, name: str) -> tuple[float, list[Any]]:
        value = self.to_array(self.constants[name])
        scale = float(np.abs(value).max()) / 127 or 1.0
        self.constant(f"{name}_int", np.round(value / scale).astype(np.int8))
        self.constant(f"{name}_zero", np.int8(0))
        return scale, []

    def activation(self, name: str) -> tuple[float, list[Any]]:
        if name in self.scales:
            return self.scales[name], []
        low, high = self.ranges[name]
        scale = self.scales[name] = (high - low) / 255 or 1.0
        zero = self.constant(f"{name}_zero", np.uint8(round(-low / scale)))
        inputs = [name, self.constant(f"{name}_scale", np.float32(scale)), zero]
        return scale, [self.node("QuantizeLinear", inputs, [f"{name}_int"])]

    def constant(self, name: str, value: Any) -> str:
        self.tensors.append(self.from_array(np.asarray(value), name))
        return name


def _ranges(model: Any, names: list[str], inputs: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Least and most of tensors inside the graph, zero included."""
    import onnx
    import onnxruntime

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    found = onnxruntime.InferenceSession(probe.SerializeToString()).run(names, inputs)
    return {name: (min(float(v.min()), 0.0), max(float(v.max()), 0.0)) for name, v in zip(names, found, strict=True)}
