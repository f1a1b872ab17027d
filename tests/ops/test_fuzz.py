"""Valid calls beside unreadable pages, and calls with one number spoiled, of every op: results are those of the
reference, errors are exceptions, and nothing ends in a signal. SPARSENLP_FUZZ=1000 draws so many calls of each op."""

from __future__ import annotations

import os
import random
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import Fences, in_a_child
from op_calls import CALLS, argument_names, draw_call, op_of
from torch import Tensor

from sparsenlp import reference

CALLS_OF_EACH = int(os.environ.get("SPARSENLP_FUZZ", "6"))
EDGES = [-(2**63), -(2**62), -(2**31) - 1, -(2**31), -2, -1, 0, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1]
INDICES = {
    *("crow_indices", "col_indices", "pattern_indices", "spans", "ids", "position_ids", "token_type_ids"),
    *("positions", "batch_sizes", "indices", "packed"),
}
LIST_INDICES = {"query", "key", "value", "output", "fc1", "fc2"}  # of encoder_layer and sparse_ffn: tensors 0 and 1


def run(op: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Results, and what was written to, with the memory they begin in poisoned by torch's allocator or not at all."""
    y = op_of(op)(*arguments)
    written = [arguments[0]] if op == "bsr_linear_add_" else [arguments[1]] if op == "decoder_layers" else []
    return [*(y if isinstance(y, tuple) else [y] if y is not None else []), *written]


def close(op: str, got: list[Tensor], expected: list[Tensor], int8: bool) -> str:
    for at, (one, other) in enumerate(zip(got, expected, strict=True)):
        rough = int8 or one.dtype == torch.bfloat16
        tolerance = {"rtol": 1e-1, "atol": 2e-1} if rough else {"rtol": 1e-4, "atol": 1e-4}
        try:
            torch.testing.assert_close(one.float(), other.float(), equal_nan=True, **tolerance)
        except AssertionError as error:
            return f"result {at}: {error}"
    return ""


def fenced(op: str, seed: int) -> str:
    """Fault of a valid call with each tensor against a page, at its end and then at its beginning."""
    expected = None
    for at_end in (True, False):
        fences = Fences()
        arguments = tuple(fences.fence_all(value, at_end) for value in draw_call(op, seed))
        plain = run(op, draw_call(op, seed)) if expected is None else expected
        if fault := close(op, run(op, arguments), plain, True):
            return f"{op} {seed} at_end={at_end}: {fault}"
        expected = plain
    return ""


def spoiled(op: str, seed: int) -> tuple[str, tuple[Any, ...]]:
    """(what was done, arguments) with one index, pointer, number or size that does not fit."""
    draw, arguments, names = random.Random(f"spoil {op} {seed}"), [*draw_call(op, seed)], argument_names(op)
    places = []
    for at, (name, value) in enumerate(zip(names, arguments, strict=False)):
        if isinstance(value, Tensor) and name in INDICES and value.numel():
            places.append((at, None))
        elif isinstance(value, list) and name in INDICES:
            places += [(at, i) for i, t in enumerate(value) if t.numel()]
        elif isinstance(value, list) and name in LIST_INDICES and op in ("encoder_layer", "sparse_ffn"):
            places += [(at, i) for i in (0, 1) if value[i].numel()]
        elif isinstance(value, int) and not isinstance(value, bool):
            places.append((at, None))
        elif isinstance(value, list) and value and isinstance(value[0], int):
            places += [(at, i) for i in range(len(value))]
    if not places:
        return "", tuple(arguments)
    at, inside = draw.choice(places)
    holder: Any = arguments if inside is None else [*arguments[at]]
    key: Any = at if inside is None else inside
    value = holder[key]
    if isinstance(value, Tensor):
        value, info = value.clone(), torch.iinfo(value.dtype)
        number = max(info.min, min(info.max, draw.choice(EDGES)))
        place = draw.randrange(value.numel())
        value.view(-1)[place] = number
        what = f"{names[at]}[{key}].flat[{place}] = {number}"
    else:
        value = draw.choice(EDGES)
        what = f"{names[at]}[{key}] = {value}"
    holder[key] = value
    if inside is not None:
        arguments[at] = holder
    return what, tuple(arguments)


def refused(op: str, seed: int) -> None:
    """Run a spoiled call beside unreadable pages; any exception will do, and so will a result."""
    what, arguments = spoiled(op, seed)
    if not what:
        return
    fences = Fences()
    with suppress(RuntimeError, ValueError, IndexError, TypeError, OverflowError, MemoryError):
        run(op, tuple(fences.fence_all(value, seed % 2 == 0) for value in arguments))


def all_of(op: str, seeds: range) -> str:
    """The first fault, or "ok", in a process that gets no more than another gigabyte."""
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
    for seed in seeds:
        if fault := fenced(op, seed):
            return fault
        refused(op, seed)
    return "ok"


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("op", CALLS)
def test_nothing_is_touched_beyond_a_tensor(op):
    assert in_a_child(lambda: all_of(op, range(CALLS_OF_EACH))) == "ok"


BSR = {"bsr_linear": 2, "bsr_linear_dgrad": 2, "bsr_linear_wgrad": 3, "sparse_conv1d": 2, "bsr_linear_add_": 3}
PLACES = {  # of an index tensor in the arguments of an op, and of one in a list
    **dict.fromkeys(BSR.items()),
    **dict.fromkeys((("encoder_layer", 2), ("encoder_layer", 7), ("sparse_ffn", 1), ("sparse_ffn", 2)), 1),
    **dict.fromkeys((("sparse_lstm", 3), ("sparse_gru", 3), ("decoder_layers", 4)), 0),
    ("block_sparse_attention", 4): None,
    ("block_sparse_attention", 5): None,
}


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize(("op", "at"), PLACES, ids=str)
@pytest.mark.parametrize("number", [-(2**31), -2, 10**6, 2**31 - 1])
def test_an_index_outside_of_its_matrix_is_refused(op, at, number):
    inside = PLACES[op, at]
    for seed in range(100):
        arguments = [*draw_call(op, seed)]
        given = arguments[at] if inside is None else arguments[at][inside]
        if given.numel():
            break
    index = given.clone()
    index[-1] = number
    arguments[at] = index if inside is None else [*arguments[at][:inside], index, *arguments[at][inside + 1 :]]
    with pytest.raises(
        RuntimeError, match=rf"{op.removesuffix('_add_')}: expected (col|pattern)_indices in \[-?[01], "
    ):
        op_of(op)(*arguments)


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("ring", [(2**31 - 1, -(2**31), -1), (1, 0, 0), (-1, 0, 0)])
def test_row_pointers_that_go_round_are_refused(ring):
    crow = torch.tensor([0, *ring, 0], dtype=torch.int32)
    none, values = torch.zeros(0, dtype=torch.int32), torch.zeros(0, 1, 1)
    message = "bsr_linear: expected crow_indices from 0 to 0 that never decrease"
    with pytest.raises(RuntimeError, match=message):
        op_of("bsr_linear")(torch.ones(1, 16), crow, none, values, None, "none")


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("past", [-1, 2**31, 2**62, 2**63 - 1, -(2**63)])
def test_past_beyond_any_cache_is_refused(past):
    arguments = [*draw_call("decoder_layers", 0)]
    arguments[2] = past
    with pytest.raises(RuntimeError, match=f"decoder_layers: expected past from 0 to 2147483647, got {past}"):
        op_of("decoder_layers")(*arguments)


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation"])
@pytest.mark.parametrize("number", [-1, 2**31, 2**62, 2**63 - 1])
def test_windows_beyond_any_sequence_are_refused(name, number):
    arguments, at = [*draw_call("sparse_conv1d", 0)], argument_names("sparse_conv1d").index(name)
    arguments[at] = [number, 0] if name == "padding" else number
    with pytest.raises(RuntimeError, match=f"sparse_conv1d: expected {name} from . to 2147483647, got {number}"):
        op_of("sparse_conv1d")(*arguments)


@pytest.mark.usefixtures("needs_native")
def test_packed_sizes_that_add_up_beyond_64_bits_are_refused():
    """Four times 2^62 is 0, and so is the sum of these and the tokens of x, in 64 bits."""
    arguments = [*draw_call("sparse_gru", 0)]
    columns = arguments[0].shape[-1]
    arguments[0] = torch.ones(4, columns, dtype=arguments[0].dtype)
    arguments[1] = torch.tensor([2**62 + 1] * 4)
    with pytest.raises(RuntimeError, match="sparse_gru: expected batch_sizes that add up to 4, got more"):
        op_of("sparse_gru")(*arguments)


@pytest.mark.usefixtures("needs_native")
def test_a_lane_without_a_token_attends_within_the_stream_too():
    arguments = next(
        call for call in (draw_call("encoder_layer", seed) for seed in range(50)) if bool((call[1][0] < 0).any())
    )
    spans = arguments[1].clone()
    spans[2, int((spans[0] >= 0).sum())] = 2**31 - 1  # in the last tile that is used, or one that is not read
    tokens, tile = int((spans[0] >= 0).sum()), arguments[0].shape[2]
    if tokens % tile == 0:
        op_of("encoder_layer")(arguments[0], spans, *arguments[2:])
        return
    with pytest.raises(RuntimeError, match=f"encoder_layer: expected spans within the {tokens} tokens"):
        op_of("encoder_layer")(arguments[0], spans, *arguments[2:])


@pytest.mark.usefixtures("needs_native")
def test_a_gate_without_rows_needs_an_inner_projection_without_rows():
    arguments = next(
        [*draw_call("decoder_layers", seed)] for seed in range(50) if len(draw_call("decoder_layers", seed)[3]) % 2
    )
    gate = len(arguments[3]) - 3
    for at, empty in ((3, torch.zeros(1)), (4, torch.zeros(0)), (5, torch.zeros(0, 1, 1))):
        dtype = arguments[0].dtype if at == 5 else torch.int32
        arguments[at] = [*arguments[at][:gate], empty.to(dtype), *arguments[at][gate + 1 :]]
    arguments[6] = arguments[7] = []
    if arguments[5][0].dtype == torch.int8:
        pytest.skip("int8 weights need scales")
    with pytest.raises(RuntimeError, match="to have N = "):
        op_of("decoder_layers")(*arguments)


@pytest.mark.usefixtures("needs_native")
def test_few_outputs_far_apart_are_computed():
    """The distance of outputs in a lane is cut to what there is, and large dilations and strides keep their windows."""
    torch.manual_seed(0)
    for length, taps, stride, dilation in ((41, 2, 1, 40), (42, 2, 3, 40), (60, 3, 7, 20), (5, 1, 1, 2**31 - 1)):
        x, weight = torch.randn(2, length, 4), torch.randn(8, 4, taps)
        crow, col = torch.arange(9, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
        values = weight.transpose(1, 2).reshape(8, 1, 4 * taps).contiguous()
        window = (taps, stride, [0, 0], dilation)
        y = op_of("sparse_conv1d")(x, crow, col, values, None, "none", *window)
        expected = reference.sparse_conv1d.sparse_conv1d(x, crow, col, values, None, "none", *window, None, 0.0)
        torch.testing.assert_close(y, expected)
