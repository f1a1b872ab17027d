from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from attention_cases import BlockSparseAttentionCase
from cases import AddLayerNormCase, BsrLinearCase, EmbedLayerNormCase, NMLinearCase
from conv_cases import ConvCase
from decoder_cases import DecoderCase
from encoder_cases import DenseAttentionCase, EncoderLayerCase, SparseFfnCase
from op_calls import CALLS, GPU_ONLY, argument_names, draw_call, op_of
from recurrent_cases import RecurrentCase
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsenlp import SparseLinear, native, ops
from sparsenlp.reference import encoder_layer as encoder_reference


def moved(value: Any, device: str = "meta") -> Iterator[tuple[str, Any]]:
    """(path, value) with each tensor in it on `device` in turn."""
    if isinstance(value, Tensor):
        yield "", value.to(device)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            for path, other in moved(item, device):
                changed = [*value[:i], other, *value[i + 1 :]]
                yield f"[{i}]{path}", type(value)._make(changed) if hasattr(value, "_make") else type(value)(changed)
    elif is_dataclass(value):
        for field in fields(value):
            for path, other in moved(getattr(value, field.name), device):
                yield f".{field.name}{path}", replace(value, **{field.name: other})


OF_ONE_TENSOR = {"padding_keys", "fingerprint", "unwatch"}
WITHOUT_FAKE = {"watch"}


def test_every_op_is_covered():
    names = [name.partition("::") for name in torch._C._dispatch_get_all_op_names()]
    covered = {*CALLS, *GPU_ONLY, *OF_ONE_TENSOR, *WITHOUT_FAKE}
    assert {name for library, _, name in names if library == "sparsenlp"} == covered


def test_an_op_without_fake_kernel_has_none_for_meta():
    with pytest.raises(NotImplementedError):
        op_of("watch")([torch.ones(4), torch.ones(4, device="meta")], torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.skipif(not native.available, reason="the extension is not built")
def test_elements_outside_of_a_watched_tensor_are_refused():
    with pytest.raises(RuntimeError, match="expected places within 4 elements, got 4"):
        op_of("watch")([torch.ones(4)], torch.full((1, 4), 4))
    with pytest.raises(RuntimeError, match="number of a watch"):
        op_of("fingerprint")(torch.full((1,), 2**31 - 1, dtype=torch.int32))


@pytest.mark.parametrize("op", [*CALLS, *GPU_ONLY])
def test_a_meta_tensor_beside_others_is_refused_by_every_op(op):
    """Not answered by the fake kernel, whose result nobody has written."""
    arguments = [*draw_call(op, 1)]
    schema = op_of(op)._schema.arguments
    for at, argument in enumerate(schema[: len(arguments)]):
        value = arguments[at]
        if value is None and "Tensor" in str(argument.type):
            value = torch.ones(1)
        for path, changed in moved(value):
            given = [*arguments[:at], changed, *arguments[at + 1 :]]
            count = sum(isinstance(t, Tensor) or (isinstance(t, list) and len(t) > 1) for t in given)
            if count == 1:
                continue
            with pytest.raises(ValueError, match=f"^{op}: expected .* on (cpu, got meta|meta, got cpu)$") as error:
                op_of(op)(*given)
            assert count < 3 or f"expected {argument.name} on cpu" in str(error.value), path


@pytest.mark.parametrize("op", CALLS)
def test_all_on_meta_gives_meta(op):
    def to_meta(value: Any) -> Any:
        if isinstance(value, list):
            return [to_meta(item) for item in value]
        return value.to("meta") if isinstance(value, Tensor) else value

    arguments = draw_call(op, 0)
    for kept in ({"batch_sizes"}, set()):  # which are read on the CPU, wherever x is
        names = argument_names(op)
        given = [a if name in kept else to_meta(a) for name, a in zip(names, arguments, strict=False)]
        y = op_of(op)(*given)
        assert all(t.is_meta for t in (y if isinstance(y, tuple) else (y,)) if t is not None)


def test_fake_tensors_of_two_devices_are_refused():
    weight, x = BsrLinearCase((2,), 16, 8, (8, 1)).weight(), torch.ones(2, 8)
    mode = FakeTensorMode()
    x, crow, col, values, bias = (mode.from_tensor(t) for t in (x, *_tensors(weight), torch.ones(16)))
    with mode:
        assert op_of("bsr_linear")(x, crow, col, values, bias, "none").shape == (2, 16)
        with pytest.raises(ValueError, match="expected bias on cpu, got meta"):
            op_of("bsr_linear")(x, crow, col, values, torch.ones(16, device="meta"), "none")


def _tensors(weight: Any) -> tuple[Tensor, Tensor, Tensor]:
    return weight.crow_indices, weight.col_indices, weight.values


def public_calls() -> dict[str, dict[str, Any]]:
    """Of every function in sparsenlp.ops, by name, with every optional tensor."""
    linear = BsrLinearCase((3,), 16, 8, (8, 4), residual=True, int8=True)
    of_linear = {"x": linear.x(), "weight": linear.weight(), "bias": linear.bias_vector()}
    nm = NMLinearCase((3,), 16, 8, residual=True)
    conv, norm = ConvCase(batch=1), AddLayerNormCase((3,), 8)
    attention, sparse = DenseAttentionCase((3, 5), position_bias=True), BlockSparseAttentionCase(20, padding=True)
    encoder = EncoderLayerCase((3, 5), position_bias=True)
    ffn = SparseFfnCase((3,))
    fc1, fc2 = ffn.weights()
    decoder = DecoderCase(padded=True, bias=True, layer_norm=True, layers=1)
    lstm, gru = (RecurrentCase(op, projection=p, steps=2) for op, p in (("sparse_lstm", 8), ("sparse_gru", 0)))
    stream, spans = encoder_reference.encoder_pack(encoder.x(), encoder.mask(), encoder.tile)
    return {
        "bsr_linear": of_linear | {"residual": linear.residual_tensor()},
        "bsr_linear_add_": {"y": linear.residual_tensor()} | of_linear,
        "nm_linear": {"x": nm.x(), "weight": nm.weight(), "bias": nm.bias_vector(), "residual": nm.residual_tensor()},
        "sparse_conv1d": conv.arguments(),
        "sparse_ffn": {"x": ffn.x(), "fc1": fc1, "fc2": fc2},
        "add_layer_norm": dict(zip(("x", "residual", "weight", "bias", "eps"), norm.arguments(), strict=True)),
        "embed_layer_norm": EmbedLayerNormCase((2,), 5, 8, "given").arguments(),
        "dense_attention": attention.arguments(),
        "block_sparse_attention": sparse.arguments(),
        "encoder_pack": {"x": encoder.x(), "mask": encoder.mask()},
        "encoder_unpack": {"stream": stream, "spans": spans, "batch": 2, "length": 5},
        "encoder_layer": {
            "stream": stream,
            "spans": spans,
            "weights": encoder.weights(),
            "position_bias": encoder.bias(),
        },
        "decoder_layers": {"weights": decoder.weights(), **decoder.inputs()},
        "sparse_lstm": {"weights": lstm.weights(), **lstm.inputs()},
        "sparse_gru": {"weights": gru.weights(), **gru.inputs()},
    }


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op", ops.__all__)
def test_a_meta_tensor_beside_others_is_refused_by_every_function(op, backend):
    arguments = public_calls()[op] | ({} if op == "bsr_linear_add_" else {"backend": backend})
    with torch.no_grad():
        getattr(ops, op)(**arguments)
        for name, value in arguments.items():
            for path, changed in moved(value):
                with pytest.raises(ValueError, match=f"^{op.removesuffix('_add_')}(_add_)?: expected "):
                    pytest.fail(f"{name}{path}: {getattr(ops, op)(**arguments | {name: changed})}")


@pytest.mark.parametrize("grad", [True, False])
def test_a_layer_with_a_meta_bias_is_refused(grad):
    layer = SparseLinear.from_dense(torch.nn.Linear(16, 8), (8, 1))
    layer.bias = torch.nn.Parameter(layer.bias.to("meta"))
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="bsr_linear: expected bias on cpu, got meta"):
        layer(torch.ones(2, 16))
