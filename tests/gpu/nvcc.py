"""csrc/cuda compiled by nvcc, and what the machine code of the built library holds. Needs no GPU."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsenlp import native_cuda
from sparsenlp.ops import nm_linear_cuda, recurrent_cuda

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
NVCC = None if os.environ.get("SPARSENLP_CUDA") == "0" else shutil.which(os.environ.get("NVCC") or "nvcc")
WHY_NOT = "nvcc was not found, or SPARSENLP_CUDA=0 hides it" if NVCC is None else native_cuda.why_unavailable


def compile_ptx(op: str, folder: Path, bug: int = 0, sources: Path = SOURCES) -> str:
    """The sm_80 PTX of sources/<op>/<op>.cu, with the seeded bug `bug`."""
    assert NVCC is not None
    output = folder / f"{op}-{bug}.ptx"
    command = [NVCC, "-O3", "-std=c++17", "-arch=compute_80", "-ptx", f"-DBUG={bug}", "-o", str(output)]
    run = subprocess.run([*command, str(sources / op / f"{op}.cu")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return output.read_text()


@dataclass
class MachineCode:
    """Of one kernel, for one target; shared memory without what the launch allocates."""

    registers: int
    stack: int
    shared: int
    opcodes: Counter[str]

    def count(self, prefix: str) -> int:
        return sum(count for opcode, count in self.opcodes.items() if opcode.startswith(prefix))


def cuobjdump() -> str | None:
    """The one on the PATH, or the one in Triton's wheel."""
    try:
        from triton.backends import nvidia
    except ImportError:
        return shutil.which("cuobjdump")
    return shutil.which("cuobjdump") or str(Path(nvidia.__file__).parent / "bin" / "cuobjdump")


@functools.cache
def machine_code(target: str) -> dict[str, MachineCode]:
    """{kernel: its machine code for "sm_80", ...} of the built library."""
    tool = cuobjdump()
    assert tool is not None
    command = [tool, "-arch", target, "-res-usage", "-sass", str(native_cuda.LIBRARY)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resources = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", listing)
    kernels = {
        name: MachineCode(int(reg), int(stack), int(shared), Counter()) for name, reg, stack, shared in resources
    }
    for part in listing.split("Function : ")[1:]:
        name, _, code = part.partition("\n")
        kernels[name].opcodes.update(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code))
    return kernels


def machine_code_of(op: str, target: str) -> dict[str, MachineCode]:
    """`machine_code` of the kernels of one op."""
    return {name: code for name, code in machine_code(target).items() if name.startswith(f"{op}_")}


class CudaLaunch(ctypes.Structure):
    """struct CudaLaunch of csrc/cuda/export.h."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("blocks", ctypes.c_int64),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
    )


NM_LINEAR_TYPES = {
    "f16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "i8_f32": (torch.int8, torch.float32),
    "i8_f16": (torch.int8, torch.float16),
    "i8_bf16": (torch.int8, torch.bfloat16),
}
"""Name in nm_linear.inc: (dtype of W, dtype of y)."""


def nm_linear_launch(name: str) -> CudaLaunch:
    """How the library would launch the kernel of this name, for 8 tokens."""
    kernel, types = name.removeprefix("nm_linear_").split("_", 1)
    number = [known for known, _ in nm_linear_cuda.KERNELS].index(kernel)
    dtype, y_dtype = (nm_linear_cuda.DTYPES[dtype] for dtype in NM_LINEAR_TYPES[types])
    arguments = nm_linear_cuda.Arguments(M=8, N=64, K=64, dtype=dtype, y_dtype=y_dtype)
    launch = CudaLaunch()
    assert native_cuda.library().sparsenlp_nm_linear_plan(ctypes.byref(arguments), number, ctypes.byref(launch)) == 0
    assert launch.kernel.decode() == name
    return launch


class RecurrentLaunch(ctypes.Structure):
    """struct RecurrentLaunch of csrc/cuda/recurrent.h."""

    _fields_ = (*CudaLaunch._fields_, ("units", ctypes.c_int), ("capacity", ctypes.c_int))


def recurrent_launch(
    op: str, arguments: recurrent_cuda.Arguments, processors: int = 108, shared_bytes: int = 163 * 1024
) -> RecurrentLaunch:
    """How the library would launch the steps of `op` where there are so many multiprocessors; by default on an A100."""
    launch, kernel = RecurrentLaunch(), recurrent_cuda.kernel_for(arguments.B)
    plan = getattr(native_cuda.library(), f"sparsenlp_{op}_plan")
    assert plan(ctypes.byref(arguments), kernel, processors, shared_bytes, ctypes.byref(launch)) == 0
    return launch
