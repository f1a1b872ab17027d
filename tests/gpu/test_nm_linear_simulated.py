"""The CUDA kernels of nm_linear: the PTX nvcc emits for sm_80, executed by the interpreter in tests/gpu/ptx, and their
machine code. Compiled and simulated, not run on hardware."""

from __future__ import annotations

import ctypes
import shutil
from functools import partial

import nvcc
import ptx
import pytest
import torch
from cases import NMLinearCase
from torch import Tensor

from sparsenlp import native_cuda
from sparsenlp.ops import nm_linear_cuda
from sparsenlp.ops.nm_linear import pack

pytestmark = pytest.mark.skipif(bool(nvcc.WHY_NOT), reason=nvcc.WHY_NOT or "")

HALF, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
SCHEDULES = [ptx.LockStep(), ptx.Adversarial(0)]
LARGE, SMALL, FEW = range(3)


def case(tokens: int, rows: int, columns: int, dtype: torch.dtype, int8: bool = False, **options) -> NMLinearCase:
    return NMLinearCase((tokens,), rows, columns, dtype=dtype, int8=int8, **options)


# Ragged in every direction: rows and tokens past the last tile, a last stage of one unit of columns, more stages than
# the pipeline holds, and a single one.
CASES = [
    *((FEW, case(1, 40, 96, *types)) for types in ((HALF,), (BFLOAT16,), (FLOAT32, True))),
    (FEW, case(5, 24, 1120, HALF, activation="gelu_tanh", residual=True)),
    (FEW, case(8, 17, 352, BFLOAT16, activation="relu")),
    (FEW, case(8, 24, 1184, HALF, int8=True, activation="gelu")),
    (FEW, case(3, 16, 64, BFLOAT16, int8=True, residual=True)),
    (FEW, case(8, 33, 16, HALF, bias=False)),
    (FEW, case(2, 8, 0, HALF)),
    *((SMALL, case(17, 40, 352, *types, activation="gelu")) for types in ((HALF,), (BFLOAT16,), (FLOAT32, True))),
    (SMALL, case(33, 69, 592, HALF, activation="gelu_tanh", residual=True)),
    (SMALL, case(1, 64, 16, BFLOAT16, bias=False)),
    (SMALL, case(20, 72, 672, HALF, int8=True, residual=True)),
    (SMALL, case(40, 31, 32, BFLOAT16, int8=True, activation="relu")),
    (SMALL, case(8, 8, 0, HALF)),
    (LARGE, case(130, 136, 96, HALF, residual=True)),
    (LARGE, case(130, 133, 336, BFLOAT16, activation="relu")),
    (LARGE, case(17, 40, 544, FLOAT32, int8=True)),
    (LARGE, case(9, 130, 288, HALF, int8=True, activation="gelu")),
    (LARGE, case(3, 24, 64, BFLOAT16, int8=True, activation="gelu_tanh")),
]

BUGS = {
    1: "does not wait for cp.async",
    2: "no barrier before a stage is read",
    3: "a stage is overwritten while others read it",
    4: "two registers of operand A swapped",
    5: "metadata selector 0 for both steps",
    6: "sums written while others read the last stage",
    7: "no barrier before the sums are read",
    8: "one unit of columns too many takes metadata",
    9: "reads rows past the last",
    10: "writes one token too many",
    11: "scales of the first tile's rows for all",
    21: "no barrier before the sums are added",
    22: "two registers of operand A swapped",
    23: "metadata of the neighbouring lane",
    24: "metadata selector 0 for both steps",
    25: "the first warp's sums are left out",
    26: "reads one token too many",
    27: "reads one unit of columns too many",
    28: "scales of the first block's rows for all",
}
MANY_CASES = [case(17, 40, 352, HALF), case(32, 72, 64, HALF), case(33, 72, 480, FLOAT32, int8=True)]
FEW_CASES = [case(5, 24, 352, HALF), case(8, 40, 480, FLOAT32, int8=True)]


@pytest.fixture(scope="module")
def sm80(tmp_path_factory) -> str:
    return nvcc.compile_ptx("nm_linear", tmp_path_factory.mktemp("ptx"))


def simulate(text: str, kernel: int, case: NMLinearCase, schedule: ptx.LockStep | ptx.Adversarial) -> Tensor:
    """What the launcher would launch for `case`, with kernels of `text`; the output is NaN before."""
    weight, x = case.weight(), case.x()
    y = torch.full((*case.tokens, case.rows), torch.nan, dtype=case.dtype)
    packed = pack(weight.indices, weight.pattern)
    rest = (case.bias_vector(), case.activation, case.residual_tensor(), weight.scales, 0.0)
    arguments, held = nm_linear_cuda.prepare(x, weight.values, packed, *rest, y, "simulated")
    launch = nvcc.CudaLaunch()
    assert native_cuda.library().sparsenlp_nm_linear_plan(ctypes.byref(arguments), kernel, ctypes.byref(launch)) == 0
    pointers = [
        held[name].view(torch.uint8).numpy().reshape(-1) if name in held else 0
        for name, kind in nm_linear_cuda.Arguments._fields_
        if kind is ctypes.c_void_p
    ]
    sizes = [getattr(arguments, name) for name in ("M", "N", "K", "activation")]
    name, blocks, threads = launch.kernel.decode(), (launch.blocks,), (launch.threads,)
    ptx.run(text, name, blocks, threads, [*pointers, *sizes], launch.shared_bytes, schedule)
    return y


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    ("kernel", "case"), CASES, ids=lambda v: str(v) if isinstance(v, NMLinearCase) else f"kernel{v}"
)
def test_result(kernel, case, schedule, sm80):
    y = simulate(sm80, kernel, case, schedule)
    torch.testing.assert_close(y.double(), case.expected(), **case.tolerance)


def test_every_kernel_is_simulated(sm80):
    names = set()
    for kernel, case in CASES:
        kind = str(case.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")
        names.add(f"nm_linear_{nm_linear_cuda.KERNELS[kernel][0]}_{'i8_' * case.int8}{kind}")
    assert names == {line.split()[2].strip("(") for line in sm80.splitlines() if ".entry" in line}


@pytest.fixture(scope="module")
def two_types(tmp_path_factory):
    """The sources with only the kernels of float16 and int8, which compile faster."""
    folder = tmp_path_factory.mktemp("csrc")
    shutil.copytree(nvcc.SOURCES.parent, folder / "csrc", ignore=shutil.ignore_patterns("ops"))
    types = "KERNELS(f16, __half, __half)\nKERNELS(i8_f32, int8_t, float)\n"
    (folder / "csrc" / "cuda" / "nm_linear" / "nm_linear.inc").write_text(types)
    return folder / "csrc" / "cuda"


def caught_by(text: str, kernel: int, case: NMLinearCase, schedule: ptx.LockStep | ptx.Adversarial) -> str:
    """How a bug shows, "" if it does not."""
    try:
        y = simulate(text, kernel, case, schedule)
        torch.testing.assert_close(y.double(), case.expected(), **case.tolerance)
    except ptx.PtxError as error:
        return str(error)
    except AssertionError:
        return "wrong result"
    return ""


@pytest.mark.parametrize("bug", BUGS, ids=BUGS.values())
def test_seeded_bug_is_caught(bug, two_types, tmp_path, assert_caught):
    text = nvcc.compile_ptx("nm_linear", tmp_path, bug, two_types)
    kernel, cases = (FEW, FEW_CASES) if bug > 20 else (SMALL, MANY_CASES)

    def first_catch(schedule: ptx.LockStep | ptx.Adversarial) -> str | None:
        return next(filter(None, (caught_by(text, kernel, case, schedule) for case in cases)), None)

    names = "PTX lock-step", "PTX adversarial"
    checks = {name: partial(first_catch, schedule) for name, schedule in zip(names, SCHEDULES, strict=True)}
    assert_caught(f"nm_linear {nm_linear_cuda.KERNELS[kernel][0]}", BUGS[bug], checks)


def test_every_seeded_bug_is_listed():
    numbers = [
        int(part.split(")")[0])
        for source in nvcc.SOURCES.rglob("nm_linear/*.h")
        for part in source.read_text().split("bug(")[1:]
    ]
    assert set(numbers) == set(BUGS)


# kernel: {target: (registers, bytes of shared memory with what the launch allocates)}; what the compiler needs now.
# From sm_90 on, 1 KiB of it is the system's.
BUDGETS = {
    "nm_linear_large": {"sm_80": (251, 79872), "sm_90": (254, 80896), "sm_100": (228, 80896)},
    "nm_linear_small": {"sm_80": (126, 36864), "sm_90": (128, 37888), "sm_100": (54, 37888)},
    "nm_linear_few": {"sm_80": (80, 5120), "sm_90": (80, 6144), "sm_100": (64, 6144)},
}


@pytest.mark.skipif(nvcc.cuobjdump() is None, reason="cuobjdump is neither on the PATH nor in a wheel of Triton")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_machine_code(target):
    kernels = nvcc.machine_code_of("nm_linear", target)
    assert set(kernels) == {f"{kernel}_{name}" for kernel in BUDGETS for name in nvcc.NM_LINEAR_TYPES}
    for name, code in kernels.items():
        kernel, number = next((k, i) for i, k in enumerate(BUDGETS) if name.startswith(k))
        registers, shared = BUDGETS[kernel][target]
        assert code.count("IMMA.SP" if "_i8_" in name else "HMMA.SP") > 0, name
        assert code.stack == code.count("LDL") + code.count("STL") == 0, f"{name}: registers are spilled"
        if number != FEW:  # whose weights go into registers, once, for all tokens
            assert code.count("LDGSTS") > 0, f"{name}: the loads are not pipelined"
        assert code.registers <= registers, f"{name}: {code.registers} registers"
        used = code.shared + nvcc.nm_linear_launch(name).shared_bytes
        assert used <= shared, f"{name}: {used} bytes of shared memory"
