"""The loop in which a compiled Triton kernel spends its time: what a turn of it multiplies, reads and issues."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gates

BYTES = {"i1": 1, "i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8}
POINTERS = re.compile(r"(?:tensor<([\dx]+)x)?!tt\.ptr<(\w+)>")


@dataclass(frozen=True)
class Loop:
    """Per turn of a CTA's loop; `issued` per warp of it, 0 where it was not found."""

    flops: int
    bytes: int  # asked of global memory; neighbours ask for the same, so that most of it comes from L2
    issued: float = 0

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes


def hot_loop(compiled: Any) -> Loop | None:
    """The loop with the most FLOPs a turn, of what triton.compile returned; None where nothing is multiplied in one.

    FLOPs and bytes are read off Triton's own form of the kernel, before loads are moved ahead of their turn,
    instructions off the machine code of NVIDIA's targets.
    """
    loops = list(_loops(compiled.asm["ttir"]))
    loop = max(loops, key=lambda loop: loop.flops, default=None)
    if loop is None or not loop.flops:
        return None
    if "cubin" not in compiled.asm:
        return loop
    issued, fma = instructions(compiled.asm["sass"])
    unrolled = max(64 * fma * compiled.metadata.num_warps / loop.flops, 1)  # a warp's FFMA is 64 FLOPs
    return Loop(loop.flops, loop.bytes, issued / unrolled)


@dataclass
class _Region:
    loop: bool
    dots: int = 0
    largest_product: int = 0
    bytes: int = 0


def _loops(ttir: str) -> Iterator[Loop]:
    """The loops of a module, inner ones first; what an `if` holds counts for the loop around it."""
    stack = [_Region(False)]
    for line in ttir.splitlines():
        text = line.split(" loc(")[0].strip()
        if text.startswith("}") and len(stack) > 1:
            region = stack.pop()
            if region.loop:
                yield Loop(region.dots or 2 * region.largest_product, region.bytes)
            else:
                stack[-1].dots += region.dots
                stack[-1].bytes += region.bytes
                stack[-1].largest_product = max(stack[-1].largest_product, region.largest_product)
        if text.endswith("{") or text.endswith("({"):
            stack.append(_Region("scf.for" in text or text.startswith("} do")))
        region = stack[-1]
        if "tt.load" in text:
            region.bytes += sum(_size(match[1]) * BYTES[match[2]] for match in POINTERS.finditer(text))
        elif "tt.dot " in text:
            left, right = (_sides(sides) for sides in re.findall(r"tensor<([\dx]+)x\w+>", text)[:2])
            region.dots += 2 * left[0] * left[1] * right[1]
        elif match := re.search(r"arith\.mul(?:f|i) .*: tensor<([\dx]+)x(?:f32|i32)>", text):
            region.largest_product = max(region.largest_product, _size(match[1]))


def _sides(text: str | None) -> list[int]:
    return [int(side) for side in text.split("x")] if text else []


def _size(text: str | None) -> int:
    return math.prod(_sides(text))


def instructions(sass: str) -> tuple[int, int]:
    """(all, FMA where it has no tensor-core instruction) of the loop with the most products, 0 where there is none.

    Branches within it are taken to be passed.
    """
    lines = sass.splitlines()
    labels = {line.strip(" .:"): i for i, line in enumerate(lines) if re.fullmatch(r"\.?LBB\d+:", line.strip())}
    best = (0, 0, 0)  # products, minus instructions: of two with as many products, the inner one; FMA
    for end, line in enumerate(lines):
        target = re.search(r"BRA\S* (?:\S+, )?\.?(LBB\d+)", line)
        start = labels.get(target[1], end) if target else end
        if start >= end - 1:
            continue
        opcodes = re.findall(r"^\S+\t(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", "\n".join(lines[start:end]), re.MULTILINE)
        products = sum(bool(gates.TENSOR_CORE.match(opcode)) for opcode in opcodes)
        fma = 0 if products else sum(bool(gates.FMA.match(opcode)) for opcode in opcodes)
        best = max(best, (products or fma, -len(opcodes) - 1, fma))
    return -best[1], best[2]
