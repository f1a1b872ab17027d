"""An interpreter of PTX for GPUs that are not there: runs what Triton or nvcc emitted for sm_80, on numpy.

    run(ptx, kernel, grid, block, arguments, shared_bytes=0, schedule=Adversarial(seed=1))

What it checks while it runs: bounds and alignment of every access, shared memory that is read before it is
written or while a cp.async into it is in flight, races between warps in shared memory, warp-wide instructions that
only a part of a warp reaches, barriers that nobody leaves. Races in global memory are looked for where the launch is
cooperative; elsewhere they show as wrong results under one of the schedules. An instruction that is not in its table
is an error.

What it does not model: speed, caches, weak memory order (every store is seen at once), threads of a warp
drifting apart within a basic block, and the order in which a tensor core adds.

parse.py     text -> instructions, registers, parameters, shared variables
bits.py      PTX types as numpy arrays
table.py     the table of instructions; the modules named in its docstring fill it
memory.py    global and shared memory, asynchronous copies
races.py     accesses that no barrier, release or acquire orders
schedule.py  which warps run next
machine.py   the threads and the main loop

Source: the PTX ISA 9.0; sections are named as there.
"""

from .bits import PtxError
from .machine import run
from .memory import Pointer
from .parse import parse
from .schedule import Adversarial, LockStep

__all__ = ["Adversarial", "LockStep", "Pointer", "PtxError", "parse", "run"]
