"""What a compiled kernel must be: the right instructions, no stack, no spills, within its budget."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from problems import Row
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes a CTA may have
TENSOR_CORE = re.compile(r"HMMA|IMMA|HGMMA|IGMMA|UTC\w*MMA|v_s?mfma")
FMA = re.compile(r"FFMA|v_(?:pk_)?(?:fma|fmac|fmamk|fmaak)_f32|v_dot2")
ROUNDED = re.compile(r"HMMA|IMMA|HGMMA|IGMMA|UTC\w*MMA|v_mfma\w*_xf32")  # no matrix unit of NVIDIA's takes float32
ASYNCHRONOUS = re.compile(r"LDGSTS|UTMALDG")
SPILLS = re.compile(r"LDL|STL|scratch_")
DOT = re.compile(r"\b(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b")
TILE = re.compile(r"tt\.load .*tensor<([\dx]+)x!tt\.ptr")


@dataclass(frozen=True)
class Usage:
    """Per thread: registers and bytes of stack. Per CTA: bytes of shared memory."""

    registers: int
    shared: int
    stack: int
    instructions: Counter[str]

    def count(self, pattern: re.Pattern[str]) -> int:
        return sum(n for opcode, n in self.instructions.items() if pattern.match(opcode))


def usage(compiled: Any) -> Usage:
    """Of what triton.compile returned."""
    return _usage_amd(compiled) if "amdgcn" in compiled.asm else _usage_nvidia(compiled)


def _usage_nvidia(compiled: Any) -> Usage:
    resources = resource_usage(compiled.asm["cubin"])
    opcodes = re.findall(r"^\S+\t(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", compiled.asm["sass"], re.MULTILINE)
    return Usage(resources["REG"], compiled.metadata.shared, resources["STACK"], Counter(opcodes))


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL, ... of the only kernel of a cubin, by cuobjdump."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [os.fspath(tool), "--dump-resource-usage", os.fspath(file)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", output)}


def _usage_amd(compiled: Any) -> Usage:
    text = compiled.asm["amdgcn"]

    def value(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", text)
        assert match is not None, f"{name} is not in the metadata of the kernel"
        return int(match[1])

    assert value("vgpr_spill_count") == value("sgpr_spill_count") == 0, "registers are spilled"
    opcodes = re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE)
    return Usage(value("vgpr_count"), compiled.metadata.shared, value("private_segment_fixed_size"), Counter(opcodes))


def complaints(compiled: Any, target: str, row: Row) -> list[str]:
    """What is wrong with the machine code of a kernel of the row, in words; empty where nothing is."""
    aside = compiled.metadata.name in row.aside
    math = "" if aside else row.math
    used = usage(compiled)
    tensor_core, found = used.count(TENSOR_CORE), []
    if used.stack or used.count(SPILLS):
        found.append(f"{used.stack} bytes of stack, {used.count(SPILLS)} instructions that spill")
    if used.shared > SHARED[target]:
        found.append(f"{used.shared} bytes of shared memory, more than {SHARED[target]}")
    if math == "tensor core" and not tensor_core:
        found.append("no tensor-core instruction")
    if math == "fma" and (used.count(ROUNDED) or not used.count(FMA) + tensor_core):
        found.append(f"{used.count(ROUNDED)} instructions that round float32, {used.count(FMA)} FMA")
    if not aside and target != "gfx942":
        waits = not used.count(ASYNCHRONOUS) or synchronous_tiles(compiled.asm["ttgir"]) > 0
        if waits and target not in row.synchronous:
            found.append("a loop waits for what it loads: no asynchronous copies")
        if target in row.synchronous and not waits:
            found.append("all copies are asynchronous: not to be listed in `synchronous`")
    if re.search(r"tt\.addptr .*tensor<\d+x\d+xi32>", compiled.asm["ttir"]):
        found.append("an address is computed in 32 bits")
    return found


def synchronous_tiles(ttgir: str) -> int:
    """Tiles (two sides longer than 1) that loops around dots load into registers, but for those in an `if`."""
    regions, found = [[False, 0, 0]], 0  # of those that are open: whether a loop, dots, tiles
    for line in ttgir.splitlines():
        text = line.split(" loc(")[0].strip()
        if text.startswith("}") and len(regions) > 1:
            loop, dots, tiles = regions.pop()
            found += tiles if loop and dots else 0
        if text.endswith("{"):
            regions.append(["scf.for" in text or text.startswith("} do"), 0, 0])
        regions[-1][1] += bool(DOT.search(text))
        if match := TILE.search(text):
            regions[-1][2] += sum(side != "1" for side in match[1].split("x")) > 1
    return found
