"""What data sheets and compiled code say of a GPU's time. Nothing here is measured.

occupancy   how many CTAs fit on one processor, from their registers, shared memory and warps
floor       the least time of an op: what it must read and write over the memory's rate, or what it must multiply over
            the peak, whichever is longer
efficiency  the share of the peak that a kernel's loop can reach. A turn takes the longest of
                flops  / FLOPs that a processor does per clock
                bytes  / bytes that a processor gets from L2 per clock
                issued * warps / 4    (four schedulers issue one instruction per clock each)
            clocks, and its efficiency is the first over the longest. Latency, bank conflicts, the prologue and uneven
            rows are left out, so that it bounds what is reached from above
break_even  the least sparsity at which the sparse layer's floor, with the peak times the efficiency, is no longer than
            the dense layer's floor at the full peak. No library reaches the latter, which moves the prediction up;
            what efficiency leaves out moves it down
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from gpu_loop import Loop


@dataclass(frozen=True)
class Processor:
    """What the CTAs of one multiprocessor (AMD's compute unit) share. Registers are of 32 bits."""

    warps: int
    ctas: int
    shared: int  # bytes
    reserved: int = 1024  # bytes of shared memory that each CTA loses
    shared_unit: int = 128
    parts: int = 1  # registers and warps are divided among these, and a warp lies in one
    lanes: int = 32  # of a warp
    registers: int = 65536  # of all parts
    register_unit: int = 256  # of a warp


# Source: CUDA C++ Programming Guide, "Technical Specifications"; LLVM's "User Guide for AMDGPU Backend", gfx942: 512
# VGPRs for each of four SIMDs, in units of 8, and 8 waves.
PROCESSORS = {
    "sm_80": Processor(64, 32, 164 * 1024),
    "sm_89": Processor(48, 24, 100 * 1024),
    "sm_90": Processor(64, 32, 228 * 1024),
    "sm_100": Processor(64, 32, 228 * 1024),
    "gfx942": Processor(32, 32, 64 * 1024, 0, 512, parts=4, lanes=64, registers=4 * 512 * 64, register_unit=8 * 64),
}


def ctas_per_processor(registers: int, shared: int, warps: int, processor: Processor) -> tuple[int, str]:
    """How many CTAs fit, and what limits them; registers are per thread, shared bytes per CTA."""
    unit = processor.register_unit
    per_warp = max(-(-registers * processor.lanes // unit) * unit, unit)
    by_registers = processor.registers // processor.parts // per_warp * processor.parts
    per_cta = -(-shared // processor.shared_unit) * processor.shared_unit + processor.reserved
    limits = {
        "registers": by_registers // warps,
        "shared memory": processor.shared // per_cta if per_cta else processor.ctas,
        "warps": processor.warps // warps,
        "CTAs": processor.ctas,
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


@dataclass(frozen=True)
class Gpu:
    """Peaks of the data sheet: dense tensor cores with float32 sums, float32 FMA, memory.

    l2_bytes are those that one multiprocessor gets from L2 per clock: 5120 for the A100's 108 (NVIDIA A100 Tensor Core
    GPU Architecture, 2020); the others are taken to give each as much, which no data sheet says.
    """

    name: str
    target: str  # whose machine code it runs
    processors: int
    ghz: float  # boost clock
    half_tflops: float
    float_tflops: float
    gbytes: float  # per second
    l2_bytes: float = 5120 / 108

    def peak(self, item: int) -> float:
        """FLOPs per second for values of `item` bytes; int8 as many as twice those of float16."""
        return 1e12 * {1: 2 * self.half_tflops, 2: self.half_tflops, 4: self.float_tflops}[item]


GPUS = [
    Gpu("A100 80GB", "sm_80", 108, 1.41, 312, 19.5, 2039),
    Gpu("H100 SXM", "sm_90", 132, 1.83, 989, 67, 3350),
    Gpu("RTX 4090", "sm_80", 128, 2.52, 165, 82.6, 1008),
]
LAYERS = [(768, 768), (768, 3072), (3072, 768), (4096, 4096), (4096, 14336)]  # K -> N
TOKENS = [1, 128, 4096]
SPARSITIES = [0.0, 0.5, 0.75, 0.9]
LENGTHS = [1024, 4096]  # of attention, with 12 heads of 64
UNITS = [512, 1024]  # of a recurrent layer, with 128 steps of one and of 16 sequences


class Work(Protocol):
    """item is the bytes of a value."""

    @property
    def item(self) -> int: ...

    def memory(self, stored: float) -> float:
        """Bytes read and written once, with a share `stored` of the weights, or of the keys of each query."""

    def flops(self, stored: float) -> float: ...


@dataclass(frozen=True)
class Layer:
    """y = x Wᵀ; item is the bytes of a value of x, of W and of y."""

    tokens: int
    inputs: int
    outputs: int
    item: int = 2

    def memory(self, stored: float, index_bytes: float = 0.0) -> float:
        """Bytes read and written once, with a share `stored` of the weights and index_bytes for each of them."""
        rows = self.tokens * (self.inputs + self.outputs) * self.item
        return rows + stored * self.inputs * self.outputs * (self.item + index_bytes)

    def flops(self, stored: float) -> float:
        return 2 * self.tokens * stored * self.inputs * self.outputs


@dataclass(frozen=True)
class Attention:
    """softmax(q kᵀ) v, forward; its softmax is left out."""

    length: int
    heads: int = 12
    size: int = 64
    item: int = 2

    def memory(self, stored: float) -> float:
        return 4 * self.heads * self.length * self.size * self.item

    def flops(self, stored: float) -> float:
        return 4 * self.heads * self.length**2 * stored * self.size


@dataclass(frozen=True)
class Recurrent:
    """The steps of an LSTM (4 gates) or GRU (3), forward: what inputs add is there, W_hh is read once and kept.

    That a step waits for the one before, which is most of the time of few sequences, is left out.
    """

    gates: int
    units: int
    sequences: int
    steps: int = 128
    item: int = 2

    def memory(self, stored: float) -> float:
        each = (self.gates + 1) * self.units * self.item  # the sums read, and the hidden state written
        return stored * self.gates * self.units**2 * self.item + self.steps * self.sequences * each

    def flops(self, stored: float) -> float:
        return 2 * self.gates * self.units**2 * stored * self.steps * self.sequences


def floor(work: Work, sparsity: float, gpu: Gpu) -> tuple[float, str]:
    """Least microseconds, and whether memory or arithmetic bounds it; indices are left out."""
    memory = work.memory(1 - sparsity) / (gpu.gbytes * 1e3)
    arithmetic = work.flops(1 - sparsity) / gpu.peak(work.item) * 1e6
    return max(memory, arithmetic), "memory" if memory >= arithmetic else "arithmetic"


def efficiency(loop: Loop, warps: int, item: int, gpu: Gpu) -> tuple[float, str]:
    """(share of the peak that the loop can reach, what bounds it), as the module says."""
    per_clock = gpu.peak(item) / (gpu.processors * gpu.ghz * 1e9)
    clocks = {
        "arithmetic": loop.flops / per_clock,
        "L2": loop.bytes / gpu.l2_bytes,
        "issue": loop.issued * warps / 4,
    }
    bound = max(clocks, key=lambda name: clocks[name])
    return clocks["arithmetic"] / clocks[bound], bound


def break_even(layer: Layer, block: tuple[int, int], reached: float, gpu: Gpu) -> float:
    """Least sparsity from which blocks (4 bytes of index each) are no slower than dense; above 1: none."""
    rate, peak, index_bytes = gpu.gbytes * 1e9, gpu.peak(layer.item), 4 / (block[0] * block[1])
    dense = max(layer.memory(1) / rate, layer.flops(1) / peak)
    fixed, per_stored = layer.memory(0) / rate, (layer.memory(1, index_bytes) - layer.memory(0)) / rate
    stored = min((dense - fixed) / per_stored, dense * peak * reached / layer.flops(1))
    return max(1 - stored, 0.0)
