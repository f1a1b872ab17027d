"""The threads of a launch: registers, program counters, and the loop that runs them.

All threads of all CTAs are one axis of numpy arrays. A step executes one basic block for the threads that the
schedule allows and that have the lowest program counter among them, which makes branches reconverge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import arithmetic, collective, convert, mma, transfer  # noqa: F401  (they fill the table)
from .bits import UNSIGNED, PtxError, decode, encode, width
from .memory import AsyncCopies, GlobalMemory, Pointer, SharedMemory
from .parse import Immediate, Instruction, Kernel, Not, Operand, Register, Special, Symbol, parse
from .races import RaceDetector
from .schedule import Adversarial, LockStep
from .table import Execute, bind

Read = Callable[[], np.ndarray]
Write = Callable[[np.ndarray, np.ndarray], None]
BARRIERS = ("bar", "barrier")
CONTROL = ("bra", "ret", "exit", "trap", *BARRIERS)  # they end a basic block


def run(
    ptx: str,
    kernel: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    arguments: Sequence[np.ndarray | Pointer | int | float | bytes],
    shared_bytes: int = 0,
    schedule: LockStep | Adversarial | None = None,
    max_steps: int = 1_000_000,
    cooperative: bool = False,
) -> Counter[str]:
    """Run one launch and change the arrays among `arguments` in place.

    ptx           text of a module
    kernel        name of its entry
    grid, block   up to three sizes; a block of any size
    arguments     one per parameter: a contiguous array or Pointer into one, int, float, or bytes of a struct
    shared_bytes  dynamic shared memory
    schedule      LockStep() unless given
    max_steps     basic blocks after which the kernel is taken to hang
    cooperative   CTAs may wait for each other: races between warps in global memory are errors
    returns       how often each opcode was executed by a warp

    Raises PtxError for what the module's docstring lists; the arrays then keep their content.
    """
    program = parse(ptx, kernel)
    arguments = [Pointer(argument) if isinstance(argument, np.ndarray) else argument for argument in arguments]
    arrays = {id(argument.array): argument.array for argument in arguments if isinstance(argument, Pointer)}
    if not all(array.flags.c_contiguous and array.flags.writeable for array in arrays.values()):
        raise PtxError("arguments: expected contiguous, writeable arrays")
    memory = GlobalMemory(list(arrays.values()))
    values = [memory.address(argument) if isinstance(argument, Pointer) else argument for argument in arguments]
    with np.errstate(all="ignore"):
        machine = Machine(program, _three(grid), _three(block), memory, _parameters(program, values), shared_bytes)
        if cooperative:
            memory.races = RaceDetector(1, machine.warps, memory.content.size)
        machine.run(schedule or LockStep(), max_steps)
    memory.copy_back()
    return machine.executed


def _three(sizes: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def _parameters(kernel: Kernel, values: Sequence[Any]) -> np.ndarray:
    """The bytes of the parameters."""
    if len(values) != len(kernel.parameters):
        raise PtxError(f"{kernel.name}: expected {len(kernel.parameters)} arguments, got {len(values)}")
    size = max((p.offset + p.size for p in kernel.parameters), default=0)
    content = np.zeros(-(-size // 16) * 16 + 16, np.uint8)
    for parameter, value in zip(kernel.parameters, values, strict=True):
        if isinstance(value, bytes):
            raw = value
        elif isinstance(value, float):
            raw = np.array(value, {2: np.float16, 4: np.float32, 8: np.float64}[parameter.size]).tobytes()
        else:
            raw = (value % (1 << 8 * parameter.size)).to_bytes(parameter.size, "little")
        if len(raw) != parameter.size:
            raise PtxError(f"{parameter.name}: expected {parameter.size} bytes, got {len(raw)}")
        content[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(raw, np.uint8)
    return content


def warps_of(threads: np.ndarray) -> np.ndarray:
    """Indices of the warps of which a mask of threads has one."""
    return np.flatnonzero(threads.reshape(-1, 32).any(1))


class Machine:
    """A launch. `grid` and `block` are (x, y, z); threads are padded to whole warps."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        memory: GlobalMemory,
        parameters: np.ndarray,
        shared_bytes: int,
    ) -> None:
        self.kernel, self.memory, self.parameters = kernel, memory, parameters
        threads = block[0] * block[1] * block[2]
        if not 0 < threads <= 1024:
            raise PtxError(f"block: expected 1 to 1024 threads, got {threads}")
        self.ctas = grid[0] * grid[1] * grid[2]
        self.warps_per_cta = -(-threads // 32)
        self.threads_per_cta = 32 * self.warps_per_cta
        self.threads = self.ctas * self.threads_per_cta
        self.warps = self.ctas * self.warps_per_cta
        total_shared = -(-kernel.static_shared // 16) * 16 + shared_bytes
        self.shared = SharedMemory(self.ctas, total_shared, self.threads_per_cta)
        self.copies = AsyncCopies(self.shared, self.warps)
        self.executed: Counter[str] = Counter()
        self.registers = {
            name: np.zeros(self.threads, bool) if bits == 1 else np.full(self.threads, -1).astype(UNSIGNED[bits])
            for name, bits in kernel.registers.items()
        }
        local = np.arange(self.threads) % self.threads_per_cta
        self.cta = np.arange(self.threads) // self.threads_per_cta
        self.lane = local % 32
        self.pc = np.zeros(self.threads, np.int64)
        self.exited = local >= threads
        self.barrier = np.full(self.threads, -1)  # the barrier a thread waits at
        self.gathering = np.zeros(self.threads, bool)  # threads that wait in front of one for the rest of their warp
        self.arrived: dict[tuple[int, int], int] = {}  # (CTA, barrier) -> threads
        self.counted: set[tuple[int, int]] = set()  # those that open at a count, not when all of the CTA wait
        self.polling = np.zeros(self.warps, bool)  # warps that read what others may be about to write
        self.special = self._special(local, grid, block, shared_bytes, total_shared)
        self.ends = self._block_ends()
        self.code = [self._bind(instruction) for instruction in kernel.instructions]

    def _special(
        self, local: np.ndarray, grid: tuple[int, int, int], block: tuple[int, int, int], dynamic: int, total: int
    ) -> dict[str, np.ndarray]:
        """The special registers (PTX ISA 10), uint64."""
        lane = self.lane.astype(np.uint64)
        bit = np.uint64(1) << lane
        values: dict[str, Any] = {
            "%tid.x": local % block[0],
            "%tid.y": local // block[0] % block[1],
            "%tid.z": local // (block[0] * block[1]),
            "%ctaid.x": self.cta % grid[0],
            "%ctaid.y": self.cta // grid[0] % grid[1],
            "%ctaid.z": self.cta // (grid[0] * grid[1]),
            **{f"%ntid.{axis}": size for axis, size in zip("xyz", block, strict=True)},
            **{f"%nctaid.{axis}": size for axis, size in zip("xyz", grid, strict=True)},
            "%laneid": lane,
            "%warpid": local // 32,
            "%nwarpid": self.warps_per_cta,
            "%lanemask_eq": bit,
            "%lanemask_lt": bit - np.uint64(1),
            "%lanemask_le": 2 * bit - np.uint64(1),
            "%lanemask_gt": np.uint64(0xFFFFFFFF) & ~(2 * bit - np.uint64(1)),
            "%lanemask_ge": np.uint64(0xFFFFFFFF) & ~(bit - np.uint64(1)),
            "%smid": self.cta,
            "%nsmid": self.ctas,
            "%dynamic_smem_size": dynamic,
            "%total_smem_size": total,
            "WARP_SZ": 32,
        }
        return {name: np.broadcast_to(value, self.threads).astype(np.uint64) for name, value in values.items()}

    def _block_ends(self) -> list[int]:
        """For every instruction, where its basic block ends."""
        instructions = self.kernel.instructions
        starts = set(self.kernel.labels.values()) | {len(instructions)}
        starts |= {i + 1 for i, instruction in enumerate(instructions) if instruction.opcode.split(".")[0] in CONTROL}
        ends, end = [0] * len(instructions), len(instructions)
        for i in reversed(range(len(instructions))):
            end = i + 1 if i + 1 in starts else end
            ends[i] = end
        return ends

    def _bind(self, instruction: Instruction) -> Execute:
        try:
            execute = bind(self, instruction)
        except PtxError as error:
            raise PtxError(f"{instruction.text}: {error}") from None
        if instruction.guard is None:
            return execute
        guard = self.reader(instruction.guard, "pred")

        def guarded(mask: np.ndarray) -> None:
            if (live := mask & guard()).any():
                execute(live)

        return guarded

    # Operands

    def reader(self, operand: Operand, kind: str, wider: bool = False) -> Read:
        """A function that gives the operand's value in every thread, decoded as `kind`."""
        bits = self.bits_reader(operand, width(kind), wider)
        return lambda: decode(kind, bits())

    def bits_reader(self, operand: Operand, bits: int, wider: bool = False) -> Read:
        """A function that gives the operand as unsigned integers of `bits` bits (bool for 1).

        wider: a register may have more bits; the lower ones count (ld, st and cvt: PTX ISA 9.4.1)
        """
        if isinstance(operand, Register):
            name = operand.name
            if bits == self.kernel.registers[name]:
                return lambda: self.registers[name]
            if wider and 1 < bits < self.kernel.registers[name]:
                return lambda: self.registers[name].astype(UNSIGNED[bits])
            raise PtxError(f"{name}: expected a register of {bits} bits, got {self.kernel.registers[name]}")
        if isinstance(operand, Not):
            inner = self.bits_reader(operand.operand, 1)
            return lambda: ~inner()
        if isinstance(operand, Special) and operand.name in self.special:
            return self._constant(self.special[operand.name], bits)
        if isinstance(operand, Immediate):
            return self._constant(np.full(self.threads, operand.bits % (1 << 64), np.uint64), bits)
        if isinstance(operand, Symbol):
            return self._constant(np.full(self.threads, self.symbol(operand.name), np.uint64), bits)
        raise PtxError(f"operand: not supported here: {operand}")

    def _constant(self, value: np.ndarray, bits: int) -> Read:
        value = value.astype(bool if bits == 1 else UNSIGNED[bits])
        return lambda: value

    def symbol(self, name: str) -> int:
        """The address of a shared variable, in shared memory."""
        if name not in self.kernel.shared:
            raise PtxError(f"unknown symbol {name}")
        return self.kernel.shared[name]

    def writer(self, operand: Operand, kind: str, wider: bool = False) -> Write:
        """A function that stores decoded values of type `kind` for the threads of a mask."""
        write = self.bits_writer(operand, kind, wider)
        return lambda values, mask: write(encode(kind, values), mask)

    def bits_writer(self, operand: Operand, kind: str, wider: bool = False) -> Write:
        """A function that stores unsigned integers; a `wider` register gets the sign of s8 to s32, or zeros."""
        if operand is None:
            return lambda bits, mask: None
        if not isinstance(operand, Register):
            raise PtxError(f"destination: expected a register, got {operand}")
        name, size = operand.name, self.kernel.registers[operand.name]
        if size != width(kind) and not (wider and size > width(kind) > 1):
            raise PtxError(f"{name}: expected a register of {width(kind)} bits, got {size}")

        def write(bits: np.ndarray, mask: np.ndarray) -> None:
            if size > width(kind):
                bits = (decode(kind, bits).astype(np.int64) if kind[0] == "s" else bits).astype(UNSIGNED[size])
            self.registers[name] = np.where(mask, bits, self.registers[name])

        return write

    # Execution

    def whole_warps(self, mask: np.ndarray) -> np.ndarray:
        """(warps,) those in the mask; raises where one of them is there in part."""
        here = mask.reshape(-1, 32)
        if (here.any(1) & (here | self.exited.reshape(-1, 32) != here.any(1)[:, None]).any(1)).any():
            raise PtxError("a part of a warp reached an instruction for whole warps")
        return here.any(1)

    def gather(self, mask: np.ndarray, i: int) -> np.ndarray:
        """Threads of whole warps that have reached the barrier `i`; the others wait for the rest of their warp."""
        self.pc[mask] = i
        self.gathering |= mask
        there = self.exited | (self.gathering & (self.pc == i))
        whole = np.repeat(there.reshape(-1, 32).all(1), 32) & self.gathering
        stuck = (self.exited | self.gathering).reshape(-1, 32).all(1) & ~there.reshape(-1, 32).all(1)
        if stuck.any():
            raise PtxError(f"{self.kernel.name}: the threads of a warp reached different barriers")
        self.gathering &= ~whole
        self.pc[whole] = i + 1
        return whole

    def jump(self, mask: np.ndarray, target: int) -> None:
        self.pc[mask] = target

    def wait_at_barrier(self, mask: np.ndarray, barrier: np.ndarray, expected: np.ndarray | None, blocks: bool) -> None:
        """Threads arrive at a barrier of their CTA, and wait at it if it `blocks`.

        expected: threads that complete it; None for all of the CTA, where those that exited count as arrived.
        """
        for cta in np.unique(self.cta[mask]):
            here = mask & (self.cta == cta)
            for name in np.unique(barrier[here]):
                same = here & (barrier == name)
                key = int(cta), int(name)
                self.shared.races.arrive(*key, self._warps_of(same))
                if self.memory.races:
                    self.memory.races.arrive(0, key, warps_of(same))
                self.arrived[key] = self.arrived.get(key, 0) + 32 * int(same.reshape(-1, 32).any(1).sum())
                if blocks:
                    self.barrier[same] = name
                if expected is not None:
                    self.counted.add(key)
                    if self.arrived[key] >= int(expected[same][0]):
                        self.release(*key)
        if expected is None:
            self.release_full()

    def release_full(self) -> None:
        """Open the barriers that all threads of their CTA that have not exited wait at."""
        for cta, name in self.arrived.keys() - self.counted:
            threads = slice(cta * self.threads_per_cta, (cta + 1) * self.threads_per_cta)
            if (self.exited[threads] | (self.barrier[threads] == name)).all():
                self.release(cta, name)

    def release(self, cta: int, barrier: int) -> None:
        del self.arrived[cta, barrier]
        self.counted.discard((cta, barrier))
        waiting = (self.cta == cta) & (self.barrier == barrier)
        self.shared.races.leave(cta, barrier, self._warps_of(waiting))
        if self.memory.races:
            self.memory.races.leave(0, (cta, barrier), warps_of(waiting))
        self.barrier[waiting] = -1

    def _warps_of(self, threads: np.ndarray) -> np.ndarray:
        """Indices of warps within their CTA, of which `threads` has one."""
        return warps_of(threads) % self.warps_per_cta

    def run(self, schedule: LockStep | Adversarial, max_steps: int) -> None:
        schedule.start(self.ctas, self.warps_per_cta)
        for _ in range(max_steps):
            runnable = ~self.exited & (self.barrier < 0) & ~self.gathering
            if not runnable.any():
                break
            shape = self.ctas, self.warps_per_cta
            warps = schedule.choose(runnable.reshape(*shape, 32).any(2), self.polling.reshape(shape)).reshape(-1)
            self.polling &= ~warps
            chosen = runnable & np.repeat(warps, 32)
            if chosen.any():
                start = int(self.pc[chosen].min())
                self.step(start, chosen & (self.pc == start))
        else:
            raise PtxError(f"{self.kernel.name}: still running after {max_steps} basic blocks")
        if not self.exited.all():
            names = sorted({int(name) for name in self.barrier[~self.exited]})
            raise PtxError(f"{self.kernel.name}: threads wait for ever at barrier {', '.join(map(str, names))}")

    def step(self, start: int, mask: np.ndarray) -> None:
        """Execute the basic block that begins at `start`."""
        if start == len(self.code):
            raise PtxError(f"{self.kernel.name}: ran past its last instruction")
        end = self.ends[start]
        self.pc[mask] = end
        warps = int(mask.reshape(-1, 32).any(1).sum())
        for i in range(start, end):
            instruction = self.kernel.instructions[i]
            if instruction.opcode.split(".")[0] in BARRIERS:
                mask = self.gather(mask, i)
                warps = int(mask.reshape(-1, 32).any(1).sum())
                if not warps:
                    return
            self.executed[instruction.opcode] += warps
            try:
                self.code[i](mask)
            except PtxError as error:
                raise PtxError(f"{self.kernel.name}: {instruction.text}: {error}") from None
