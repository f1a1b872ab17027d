"""The CUDA kernels of sparse_lstm and sparse_gru: the PTX nvcc emits for sm_80, executed by the interpreter in
tests/gpu/ptx, and their machine code. Compiled and simulated, not run on hardware."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import nvcc
import ptx
import pytest
import torch
from recurrent_cases import RecurrentCase

from sparsenlp.ops import recurrent_cuda
from sparsenlp.ops.recurrent_gpu import Direction, table_of_steps

pytestmark = pytest.mark.skipif(bool(nvcc.WHY_NOT), reason=nvcc.WHY_NOT or "")

HALF, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
SCHEDULES = [ptx.LockStep(), ptx.Adversarial(0)]
SHARED = 163 * 1024  # bytes for a block of an A100
OPS = ("sparse_lstm", "sparse_gru")
SMALL = RecurrentCase(lengths=(1, 3), columns=8, hidden=16, dtype=HALF)
ONE = RecurrentCase(steps=2, batch=1, columns=8, hidden=24)


# (case, multiprocessors, bytes of shared memory for a block): several blocks and one, blocks of the weight that a
# block of threads holds several of, one of, and a part of; units past the last; columns beyond the shared memory.
CASES = [
    (SMALL, 8, SHARED),
    (replace(SMALL, op="sparse_gru"), 8, SHARED),
    (replace(SMALL, lengths=(3, 2, *(1,) * 6), hidden=12, block=(4, 2), dtype=BFLOAT16, reverse=True), 8, SHARED),
    (replace(SMALL, op="sparse_gru", dtype=FLOAT32, block=(16, 8), reverse=True, bias=False), 8, 8600),
    (replace(SMALL, op="sparse_gru", dtype=BFLOAT16, lengths=(1, 1)), 8, SHARED),
    (replace(SMALL, dtype=FLOAT32, lengths=(1, 2)), 8, SHARED),
    (replace(ONE, hidden=5, columns=5, block=(1, 1)), 8, SHARED),
    (replace(ONE, dtype=BFLOAT16, density=1.0), 8, 2048),
    (replace(ONE, dtype=HALF, block=(3, 1), empty_rows=True), 8, SHARED),
    (replace(ONE, op="sparse_gru"), 2, SHARED),
    (replace(ONE, op="sparse_gru", dtype=HALF), 8, SHARED),
    (replace(ONE, op="sparse_gru", dtype=BFLOAT16), 8, SHARED),
]
ADVERSARIAL = [CASES[0], (replace(ONE, op="sparse_gru", dtype=HALF, hidden=16), 8, SHARED)]
BUGS = {
    1: "counts itself in before all its warps have written",
    2: "counts itself in without a release",
    3: "does not wait for other blocks",
    4: "waits without an acquire",
    5: "only the first warp waits",
    6: "waits for the step before",
    7: "does not wait for cp.async",
    8: "the first row's weights for all rows of a block",
    9: "columns that are not in shared memory are left out",
    10: "no barrier before the sums are added",
    11: "writes the half of the state that others read",
    12: "goes on with sequences that have ended",
}
BUG_CASE = (replace(SMALL, dtype=FLOAT32, lengths=(1, 3, 3, 3, 3)), 8, 9000)


@pytest.fixture(scope="module")
def sm80(tmp_path_factory) -> dict[str, str]:
    return {op: nvcc.compile_ptx(op, tmp_path_factory.mktemp("ptx")) for op in OPS}


def check(text: str, case: RecurrentCase, processors: int, shared: int, schedule: ptx.LockStep | ptx.Adversarial):
    """Run what the launcher would launch for `case`, with kernels of `text`, and compare; outputs are NaN before."""
    x, batch_sizes, crow, col, values, _, biases, *states, reverse = case.arguments()
    sizes = [case.batch] * case.steps if batch_sizes is None else batch_sizes.tolist()
    bias_input, bias_recurrent = biases if biases else (None, None)
    inputs = torch.nn.functional.linear(x.flatten(0, -2), case.weights()[0].input.to_dense(), bias_input)
    c = states[1][0].float() if case.lstm else None
    shapes = [(len(inputs), case.hidden), states[0].shape[1:], (len(inputs), 4 * case.hidden)]
    y, h_n, gates = (
        torch.full(shape, torch.nan, dtype=dtype)
        for shape, dtype in zip(shapes, (case.dtype, case.dtype, FLOAT32), strict=True)
    )
    cells = torch.full(shapes[0], torch.nan) if case.lstm else None
    table = table_of_steps(sizes, reverse, x.device)
    direction = Direction(
        inputs, crow[1], col[1], values[1], bias_recurrent, states[0][0], c, y, h_n, gates, cells, table
    )
    arguments, held = recurrent_cuda.prepare(direction)
    launch = nvcc.recurrent_launch(case.op, arguments, processors, shared)
    assert launch.blocks
    pointers = [held[name].view(torch.uint8).numpy().reshape(-1) if name in held else 0 for name in arguments.POINTERS]
    numbers = [getattr(arguments, name) for name in arguments.SIZES[:-1]]
    ptx.run(
        text,
        launch.kernel.decode(),
        (launch.blocks,),
        (launch.threads,),
        [*pointers, *numbers, launch.units, launch.capacity],
        launch.shared_bytes,
        schedule,
        cooperative=True,
    )
    expected_y, expected_h, *others = case.expected(save=True)
    found = [y, h_n, gates] if c is None or cells is None else [y, h_n, c, gates, cells]
    for got, expected in zip(found, [expected_y.flatten(0, -2), expected_h[0], *(t[0] for t in others)], strict=True):
        torch.testing.assert_close(got.double(), expected, **case.tolerance)


@pytest.mark.parametrize(("case", "processors", "shared"), CASES, ids=str)
def test_result(case, processors, shared, sm80):
    check(sm80[case.op], case, processors, shared, ptx.LockStep())


@pytest.mark.parametrize(("case", "processors", "shared"), ADVERSARIAL, ids=str)
def test_result_under_another_schedule(case, processors, shared, sm80):
    check(sm80[case.op], case, processors, shared, ptx.Adversarial(0))


def test_every_kernel_is_simulated(sm80):
    names = set()
    for case, *_ in CASES:
        kernel = recurrent_cuda.KERNELS[recurrent_cuda.kernel_for(len(case.lengths) or case.batch)][0]
        kind = str(case.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")
        names.add(f"{case.op}_{kernel}_{kind}")
    assert names == {line.split()[2].strip("(") for op in OPS for line in sm80[op].splitlines() if ".entry" in line}


@pytest.mark.parametrize("bug", BUGS, ids=BUGS.values())
def test_seeded_bug_is_caught(bug, tmp_path, assert_caught):
    text = nvcc.compile_ptx("sparse_lstm", tmp_path, bug)

    def caught(schedule: ptx.LockStep | ptx.Adversarial) -> str | None:
        try:
            check(text, *BUG_CASE, schedule)
        except ptx.PtxError as error:
            return str(error)
        except AssertionError:
            return "wrong result"
        return None

    names = "PTX lock-step", "PTX adversarial"
    checks = {name: partial(caught, schedule) for name, schedule in zip(names, SCHEDULES, strict=True)}
    assert_caught("sparse_lstm persistent", BUGS[bug], checks)


def test_every_seeded_bug_is_listed():
    text = (nvcc.SOURCES / "persistent.h").read_text()
    assert {int(part.split(")")[0]) for part in text.split("bug(")[1:]} == set(BUGS)


def arguments_of(hidden: int, batch: int, dtype: torch.dtype, n: int = 8) -> recurrent_cuda.Arguments:
    """Of a weight in n x 1 blocks: what decides the launch."""
    half = hidden * recurrent_cuda.KERNELS[recurrent_cuda.kernel_for(batch)][1]
    return recurrent_cuda.Arguments(B=batch, H=hidden, n=n, k=1, half=half, dtype=recurrent_cuda.DTYPES[dtype])


@pytest.mark.parametrize(
    ("hidden", "n", "batch", "processors", "blocks", "units"),
    [
        (256, 8, 8, 108, 32, 8),
        (1024, 8, 1, 108, 64, 16),  # 128 blocks of 8 units would not run at once
        (1024, 64, 1, 108, 64, 16),  # a quarter of each block of the weight
        (1024, 12, 1, 108, 0, 0),
        (1024, 3, 1, 16, 0, 0),
        (1023, 3, 1, 108, 86, 12),
        (1024, 8, 8, 15, 0, 0),
        (5, 5, 2, 108, 1, 10),
        (134, 67, 1, 108, 0, 0),
    ],
)
def test_blocks_that_run_at_once(hidden, n, batch, processors, blocks, units):
    launch = nvcc.recurrent_launch("sparse_lstm", arguments_of(hidden, batch, HALF, n), processors)
    assert (launch.blocks, launch.units if launch.blocks else 0) == (blocks, units)
    assert launch.shared_bytes <= SHARED


def test_a_state_too_large_for_shared_memory_is_refused():
    assert not nvcc.recurrent_launch("sparse_lstm", arguments_of(1024, 8, FLOAT32), 108, 40 * 1024).blocks


# registers; one block of 256 threads on a multiprocessor is enough, as its weights fill the shared memory
BUDGETS = {"one": 128, "few": 144}


@pytest.mark.skipif(nvcc.cuobjdump() is None, reason="cuobjdump is neither on the PATH nor in a wheel of Triton")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_machine_code(target):
    kernels = {name: code for op in OPS for name, code in nvcc.machine_code_of(op, target).items()}
    assert len(kernels) == len(OPS) * len(BUDGETS) * len(recurrent_cuda.DTYPES)
    for name, code in kernels.items():
        assert code.stack == code.count("LDL") + code.count("STL") == 0, f"{name}: registers are spilled"
        assert code.count("FFMA") > 0, name
        assert code.count("LDGSTS") > 0, f"{name}: the state is not copied asynchronously"
        assert code.registers <= BUDGETS[name.split("_")[2]], f"{name}: {code.registers} registers"
