"""The PTX interpreter against results by hand, on small kernels written here."""

from __future__ import annotations

import re
import struct

import numpy as np
import ptx
import pytest
from ptx.bits import encode
from ptx.mma import a_layout, b_layout, c_layout, metadata_place

RAGGED = np.array([0.0, -0.0, 1.0, -1.5, 3.14159, 65504.0, 1e-6, -2.7, np.inf, -np.inf, np.nan], np.float32)


def kernel(body: str, parameters: int = 3, before: str = "") -> str:
    """A module with one kernel `k` of pointer parameters, loaded into %rd0, %rd1, ...; %r0 is the thread."""
    names = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "".join(f"ld.param.u64 %rd{i}, [p{i}];\n" for i in range(parameters))
    return f"""
        .version 8.0\n.target sm_80\n.address_size 64\n{before}
        .visible .entry k({names}) {{
        .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .b64 %rd<99>; .reg .f32 %f<9>; .reg .f64 %d<9>;
        {loads} mov.u32 %r0, %tid.x;
        {body}
        ret;
        }}"""


def apply(instruction: str, sources: list[np.ndarray], result: type, registers: str) -> np.ndarray:
    """`instruction` on each element of the sources; `registers` names its operands: "%r9 %r1 %r2" (result first)."""
    threads = len(sources[0])
    names = registers.split()
    body = ""
    for i, (name, source) in enumerate(zip(names[1:], sources, strict=True)):
        size = source.dtype.itemsize
        body += f"mad.wide.u32 %rd90, %r0, {size}, %rd{i + 1}; ld.global.b{8 * size} {name}, [%rd90];\n"
    size = np.dtype(result).itemsize
    body += f"{instruction} {', '.join(names)};\n"
    body += f"mad.wide.u32 %rd90, %r0, {size}, %rd0; st.global.b{8 * size} [%rd90], {names[0]};"
    out = np.zeros(threads, result)
    ptx.run(kernel(body, 1 + len(sources)), "k", (1,), (threads,), [out, *(source.copy() for source in sources)])
    return out


I32 = np.array([0, 1, -1, 7, -7, 2**31 - 1, -(2**31), 12345], np.int32)
J32 = np.array([3, -1, 1, 2, 2, 2, 1, -99], np.int32)
U32, V32 = I32.view(np.uint32), J32.view(np.uint32)


def wrapped(values: list[int], kind: type) -> np.ndarray:
    """Exact integers reduced to the type."""
    size = np.dtype(kind).itemsize * 8
    return np.array([v % 2**size for v in values], f"u{size // 8}").view(kind)


INTEGERS = {
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.s32": lambda a, b: a * b >> 32,
    "min.s32": min,
    "max.s32": max,
    "div.s32": lambda a, b: abs(a) // abs(b) * (1 if a * b >= 0 else -1),
    "rem.s32": lambda a, b: a - abs(a) // abs(b) * (1 if a * b >= 0 else -1) * b,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "add.sat.s32": lambda a, b: min(max(a + b, -(2**31)), 2**31 - 1),
}


@pytest.mark.parametrize("opcode", INTEGERS)
def test_integer(opcode):
    expected = wrapped([INTEGERS[opcode](int(a), int(b)) for a, b in zip(I32, J32, strict=True)], np.int32)
    np.testing.assert_array_equal(apply(opcode, [I32, J32], np.int32, "%r9 %r1 %r2"), expected)


UNSIGNED = {
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "div.u32": lambda a, b: a // b,
    "rem.u32": lambda a, b: a % b,
    "min.u32": min,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b if b < 32 else 0,
}


@pytest.mark.parametrize("opcode", UNSIGNED)
def test_unsigned(opcode):
    expected = wrapped([UNSIGNED[opcode](int(a), int(b)) for a, b in zip(U32, V32, strict=True)], np.uint32)
    np.testing.assert_array_equal(apply(opcode, [U32, V32], np.uint32, "%r9 %r1 %r2"), expected)


def test_wide_and_64_bit_integers():
    a, b = np.array([-5, 2**40, -(2**62)], np.int64), np.array([3, 2**40, 7], np.int64)
    high = apply("mul.hi.s64", [a, b], np.int64, "%rd9 %rd5 %rd6")
    assert high.tolist() == [int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)]
    wide = apply("mul.wide.s32", [I32, J32], np.int64, "%rd9 %r1 %r2")
    assert wide.tolist() == [int(x) * int(y) for x, y in zip(I32, J32, strict=True)]
    assert apply("shr.s64", [a, np.array([1, 50, 99], np.uint32)], np.int64, "%rd9 %rd5 %r2").tolist() == [-3, 0, -1]


@pytest.mark.parametrize(
    ("instruction", "registers", "sources", "expected"),
    [
        ("bfe.u32", "%r9 %r1 4 8", [0xABCDEF], 0xDE),
        ("bfe.s32", "%r9 %r1 4 8", [0xABCDEF], 0xFFFFFFDE),
        ("bfi.b32", "%r9 %r1 %r2 8 4", [0xF5, 0xABCDEF], 0xABC5EF),
        ("prmt.b32", "%r9 %r1 %r2 0x5410", [0x33221100, 0x77665544], 0x55441100),
        ("prmt.b32", "%r9 %r1 %r2 0x9b76", [0x83221100, 0x77665544], 0x00FF7766),
        ("lop3.b32", "%r9 %r1 %r2 %r3 0x96", [0b1100, 0b1010, 0b0110], 0b1100 ^ 0b1010 ^ 0b0110),
        ("shf.l.wrap.b32", "%r9 %r1 %r2 8", [0x11223344, 0xAABBCCDD], 0xBBCCDD11),
        ("shf.r.wrap.b32", "%r9 %r1 %r2 8", [0x11223344, 0xAABBCCDD], 0xDD112233),
        ("popc.b32", "%r9 %r1", [0xF0F], 8),
        ("clz.b32", "%r9 %r1", [0xF0F], 20),
        ("bfind.u32", "%r9 %r1", [0xF0F], 11),
        ("brev.b32", "%r9 %r1", [0x80000001], 0x80000001),
        ("brev.b32", "%r9 %r1", [0x1], 0x80000000),
        ("dp4a.s32.s32", "%r9 %r1 %r2 %r3", [0x01FF0203, 0x01020304, 10], 1 - 2 + 6 + 12 + 10),
        ("mad.lo.s32", "%r9 %r1 %r2 %r3", [5, 7, 0xFFFFFFFF], 34),
        ("not.b32", "%r9 %r1", [0xFFFF0000], 0x0000FFFF),
        ("cvt.pack.sat.s8.s32.b32", "%r9 %r1 %r2 %r3", [300, 0xFFFFFF00, 0x1234], 0x12347F80),
    ],
)
def test_bits(instruction, registers, sources, expected):
    names = registers.split()
    constants = [n for n in names if not n.startswith("%")]
    used = " ".join(n for n in names if n.startswith("%"))
    arrays = [np.array([source], np.uint32) for source in sources]
    body_names = used.split()
    body = "".join(
        f"mad.wide.u32 %rd90, %r0, 4, %rd{i + 1}; ld.global.b32 {n}, [%rd90];\n" for i, n in enumerate(body_names[1:])
    )
    body += f"{instruction} {', '.join(body_names + constants)}; st.global.b32 [%rd0], %r9;"
    out = np.zeros(1, np.uint32)
    ptx.run(kernel(body, 1 + len(arrays)), "k", (1,), (1,), [out, *arrays])
    assert hex(out[0]) == hex(expected)


FLOATS = {
    "add.f32": lambda a: a + a,
    "mul.rn.f32": lambda a: a * a,
    "sub.f32": lambda a: a - a,
    "max.f32": lambda a: a,
    "div.rn.f32": lambda a: a / a,
}
UNARY = {
    "neg.f32": np.negative,
    "abs.f32": np.abs,
    "ex2.approx.ftz.f32": np.exp2,
    "lg2.approx.f32": np.log2,
    "rcp.approx.ftz.f32": lambda a: 1 / a,
    "sqrt.rn.f32": np.sqrt,
    "rsqrt.approx.f32": lambda a: 1 / np.sqrt(a),
    "tanh.approx.f32": np.tanh,
    "sin.approx.f32": np.sin,
}


@pytest.mark.parametrize("opcode", UNARY)
@np.errstate(all="ignore")
def test_unary_float(opcode):
    expected = UNARY[opcode](RAGGED.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(apply(opcode, [RAGGED], np.float32, "%f8 %f1"), expected)


@pytest.mark.parametrize("opcode", FLOATS)
@np.errstate(all="ignore")
def test_binary_float(opcode):
    result = apply(opcode, [RAGGED, RAGGED], np.float32, "%f8 %f1 %f2")
    np.testing.assert_array_equal(result, FLOATS[opcode](RAGGED))


def test_fma_rounds_once():
    a = np.array([1 + 2**-12], np.float32)
    c = np.array([-(1 + 2**-11)], np.float32)
    assert apply("fma.rn.f32", [a, a, c], np.float32, "%f8 %f1 %f2 %f3") == [2**-24]


def test_ftz_takes_subnormals_for_zero():
    tiny = np.array([1e-39, -1e-39], np.float32)
    assert apply("add.f32", [tiny, tiny], np.float32, "%f8 %f1 %f2")[0] > 0
    flushed = apply("add.ftz.f32", [tiny, tiny], np.float32, "%f8 %f1 %f2")
    np.testing.assert_array_equal(np.signbit(flushed), [False, True])
    assert not flushed.any()


def test_min_and_max_with_nan():
    a, b = np.array([1, np.nan], np.float32), np.array([np.nan, 2], np.float32)
    np.testing.assert_array_equal(apply("max.f32", [a, b], np.float32, "%f8 %f1 %f2"), [1, 2])
    assert np.isnan(apply("max.NaN.f32", [a, b], np.float32, "%f8 %f1 %f2")).all()


def pairs(kind: str, low: list[float], high: list[float]) -> np.ndarray:
    return encode(f"{kind}x2", np.array([low, high], np.float32).T.copy())


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_packed_halves(kind):
    a, b = pairs(kind, [1, 2.5, -3], [4, 0.5, 6]), pairs(kind, [7, -2.5, 2], [1, 8, 0.25])
    for op, low, high in (
        ("add", [8, 0, -1], [5, 8.5, 6.25]),
        ("mul", [7, -6.25, -6], [4, 4, 1.5]),
        ("sub", [-6, 5, -5], [3, -7.5, 5.75]),
        ("min", [1, -2.5, -3], [1, 0.5, 0.25]),
    ):
        np.testing.assert_array_equal(apply(f"{op}.{kind}x2", [a, b], np.uint32, "%r9 %r1 %r2"), pairs(kind, low, high))
    fused = apply(f"fma.rn.{kind}x2", [a, b, a], np.uint32, "%r9 %r1 %r2 %r3")
    np.testing.assert_array_equal(fused, pairs(kind, [8, -3.75, -9], [8, 4.5, 7.5]))


def test_bfloat16_rounds_to_nearest_even():
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, np.nan, np.inf, 3.4e38], np.float32)
    result = apply("cvt.rn.bf16.f32", [values], np.uint16, "%h5 %f1")
    assert [hex(x) for x in result] == ["0x3f80", "0x3f82", "0x3f81", "0x7fff", "0x7f80", "0x7f80"]


@pytest.mark.parametrize(
    ("opcode", "source", "expected"),
    [
        ("cvt.rni.s32.f32", [2.5, 3.5, -2.5, 3e9, np.nan], [2, 4, -2, 2**31 - 1, 0]),
        ("cvt.rzi.s32.f32", [2.9, -2.9, 0.0, -3e9, -np.inf], [2, -2, 0, -(2**31), -(2**31)]),
        ("cvt.rmi.s32.f32", [2.9, -2.1], [2, -3]),
        ("cvt.rpi.s32.f32", [2.1, -2.9], [3, -2]),
        ("cvt.rni.sat.s8.f32", [127.5, -200.0, 1.5], [127, -128, 2]),
    ],
)
def test_float_to_integer(opcode, source, expected):
    values = np.array(source, np.float32)
    assert apply(opcode, [values], np.int32, "%r9 %f1").tolist() == expected


def test_other_conversions():
    halves = np.array([1.5, -2.25, 65504], np.float16)
    np.testing.assert_array_equal(apply("cvt.f32.f16", [halves], np.float32, "%f8 %h1"), halves.astype(np.float32))
    packed = apply("cvt.rn.f16x2.f32", [RAGGED[:4], RAGGED[4:8]], np.uint32, "%r9 %f1 %f2").view(np.float16)
    np.testing.assert_array_equal(packed, np.stack([RAGGED[4:8], RAGGED[:4]], 1).astype(np.float16).reshape(-1))
    rounded = apply("cvt.rna.tf32.f32", [np.array([1 + 2**-11, 1 + 2**-12], np.float32)], np.float32, "%r9 %f1")
    assert rounded.tolist() == [1 + 2**-10, 1]
    assert apply("cvt.s64.s32", [I32], np.int64, "%rd9 %r1").tolist() == I32.tolist()
    assert apply("cvt.u32.u16", [np.array([65535], np.uint16)], np.uint32, "%r9 %h1").tolist() == [65535]
    assert apply("cvt.rn.f32.s32", [I32], np.float32, "%f8 %r1").tolist() == I32.astype(np.float32).tolist()


def test_comparisons_with_nan():
    body = """
        ld.global.f32 %f1, [%rd1]; mov.f32 %f2, 0f3F800000;
        setp.lt.f32 %p1, %f1, %f2; setp.ltu.f32 %p2, %f1, %f2; setp.ne.f32 %p3, %f1, %f2;
        setp.nan.f32 %p4|%p5, %f1, %f2;
        setp.eq.and.s32 %p6, 1, 1, !%p1;
        selp.b32 %r1, 1, 0, %p1; selp.b32 %r2, 2, 0, %p2; selp.b32 %r3, 4, 0, %p3; selp.b32 %r4, 8, 0, %p4;
        selp.b32 %r5, 16, 0, %p5; selp.b32 %r6, 32, 0, %p6;
        or.b32 %r1, %r1, %r2; or.b32 %r1, %r1, %r3; or.b32 %r1, %r1, %r4; or.b32 %r1, %r1, %r5; or.b32 %r1, %r1, %r6;
        st.global.u32 [%rd0], %r1;"""
    out = np.zeros(1, np.uint32)
    ptx.run(kernel(body, 2), "k", (1,), (1,), [out, np.array([np.nan], np.float32)])
    assert out[0] == 2 + 8 + 32


def test_parameters_of_every_kind():
    text = """.visible .entry k(.param .u64 out, .param .u32 n, .param .f32 x, .param .align 8 .b8 s[12]) {
        .reg .b32 %r<9>; .reg .b64 %rd<9>;
        ld.param.u64 %rd1, [out]; ld.param.u32 %r1, [n]; ld.param.b32 %r2, [x]; ld.param.v2.b32 {%r3, %r4}, [s];
        ld.param.b32 %r5, [s+8];
        st.global.v4.b32 [%rd1], {%r1, %r2, %r3, %r4}; st.global.b32 [%rd1+16], %r5; ret; }"""
    out = np.zeros(5, np.uint32)
    ptx.run(text, "k", (1,), (1,), [out, -3, 1.0, struct.pack("III", 4, 5, 6)])
    assert out.tolist() == [2**32 - 3, 0x3F800000, 4, 5, 6]


def test_branches_reconverge_and_loops_end():
    """Thread i adds 1 + 2 + ... + i."""
    body = """
        mov.u32 %r1, 0; mov.u32 %r2, 0;
    $LOOP: setp.ge.u32 %p1, %r2, %r0; @%p1 bra $DONE;
        add.u32 %r2, %r2, 1; add.u32 %r1, %r1, %r2; bra.uni $LOOP;
    $DONE: bar.sync 0;
        mad.wide.u32 %rd1, %r0, 4, %rd0; st.global.u32 [%rd1], %r1;"""
    out = np.zeros(100, np.uint32)
    ptx.run(kernel(body, 1), "k", (1,), (100,), [out])
    assert out.tolist() == [i * (i + 1) // 2 for i in range(100)]


def test_names_of_an_inline_block_are_its_own():
    body = """
        mov.u32 %r1, 5;
        { .reg .b64 t; .reg .pred p; mov.u64 t, 7; setp.eq.u64 p, t, 7; @p bra L; mov.u32 %r1, 0;
          L: cvt.u32.u64 %r2, t; }
        { .reg .b32 t; .reg .pred p; mov.u32 t, 9; setp.ne.u32 p, t, 9; @p bra L; add.u32 %r1, %r1, t; L: }
        st.global.v2.u32 [%rd0], {%r1, %r2};"""
    out = np.zeros(2, np.uint32)
    ptx.run(kernel(body, 1), "k", (1,), (1,), [out])
    assert out.tolist() == [14, 7]


def test_grid_and_block_have_three_sides():
    body = """
        mov.u32 %r1, %tid.y; mov.u32 %r2, %ctaid.z; mov.u32 %r3, %ntid.x; mov.u32 %r4, %nctaid.x; mov.u32 %r5, %ctaid.x;
        mad.lo.u32 %r6, %r1, %r3, %r0; mad.lo.u32 %r7, %r2, %r4, %r5; mad.lo.u32 %r8, %r7, 6, %r6;
        mad.wide.u32 %rd1, %r8, 4, %rd0; st.global.u32 [%rd1], %r8;"""
    out = np.full(24, 99, np.uint32)
    ptx.run(kernel(body, 1), "k", (2, 1, 2), (3, 2), [out])
    assert out.tolist() == list(range(24))


@pytest.mark.parametrize("mode", ["bfly", "idx", "up", "down"])
def test_shuffle(mode):
    clamp = "0" if mode == "up" else "31"
    body = f"""shfl.sync.{mode}.b32 %r1|%p1, %r0, 3, {clamp}, -1; selp.u32 %r2, 1, 0, %p1;
        mad.wide.u32 %rd1, %r0, 8, %rd0; st.global.v2.u32 [%rd1], {{%r1, %r2}};"""
    out = np.zeros((64, 2), np.uint32)
    ptx.run(kernel(body, 1), "k", (1,), (64,), [out])
    for thread in range(64):
        lane, warp = thread % 32, thread // 32 * 32
        source = {"bfly": lane ^ 3, "idx": 3, "up": lane - 3, "down": lane + 3}[mode]
        valid = 0 <= source < 32
        assert out[thread].tolist() == [warp + (source if valid else lane), valid]


def test_votes_and_reductions():
    body = """and.b32 %r1, %r0, 1; setp.eq.u32 %p1, %r1, 1;
        vote.sync.ballot.b32 %r2, %p1, -1; vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1;
        selp.u32 %r3, 1, 0, %p2; selp.u32 %r4, 1, 0, %p3; redux.sync.add.u32 %r5, %r0, -1; activemask.b32 %r6;
        st.global.v4.u32 [%rd0], {%r2, %r3, %r4, %r5}; st.global.u32 [%rd0+16], %r6;"""
    out = np.zeros(5, np.uint32)
    ptx.run(kernel(body, 1), "k", (1,), (32,), [out])
    assert out.tolist() == [0xAAAAAAAA, 1, 0, 31 * 16, 0xFFFFFFFF]


def test_atomics_meet():
    body = """atom.global.add.u32 %r1, [%rd0], 1; red.global.add.f32 [%rd0+4], 0f3F000000; red.shared.max.u32 [s], 1;
        mad.wide.u32 %rd1, %r1, 4, %rd0; st.global.u32 [%rd1+8], %r0;"""
    out = np.zeros(66, np.uint32)
    with pytest.raises(ptx.PtxError, match="before it is written"):
        ptx.run(kernel(body, 1, ".shared .align 4 .b8 s[4];"), "k", (1,), (64,), [out])
    ptx.run(kernel(body.replace("red.shared.max.u32 [s], 1;", ""), 1), "k", (1,), (64,), [out])
    assert out[0] == 64
    assert out[1:2].view(np.float32) == [32]
    assert sorted(out[2:]) == list(range(64))


def test_compare_and_swap():
    body = "atom.global.cas.b32 %r1, [%rd0], 0, 7; st.global.u32 [%rd0+4], %r1;"
    out = np.zeros(2, np.uint32)
    ptx.run(kernel(body, 1), "k", (1,), (2,), [out])
    assert out.tolist() == [7, 7]  # the second thread finds what the first left


# Matrices


def fragments(matrix: np.ndarray, layout: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(32 lanes, 32-bit registers)"""
    return np.ascontiguousarray(matrix[layout]).view(np.uint32)


def multiply(opcode: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, extra: str = "", metadata=None) -> np.ndarray:
    """D (32 lanes, registers) of one warp from fragments."""

    def registers(first: int, count: int) -> str:
        return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"

    body, operands = "", []
    for i, fragment in enumerate((a, b, c)):
        for j in range(fragment.shape[1]):
            body += f"mad.wide.u32 %rd90, %r0, {4 * fragment.shape[1]}, %rd{i + 1};"
            body += f"ld.global.b32 %r{10 * (i + 1) + j}, [%rd90+{4 * j}];\n"
        operands.append(registers(10 * (i + 1), fragment.shape[1]))
    if metadata is not None:
        body += "mad.wide.u32 %rd90, %r0, 4, %rd4; ld.global.b32 %r50, [%rd90];"
        operands += ["%r50", extra]
    count = c.shape[1]
    body += f"{opcode} {registers(60, count)}, {', '.join(operands)};\n mad.wide.u32 %rd90, %r0, {4 * count}, %rd0;"
    body += "".join(f"st.global.b32 [%rd90+{4 * j}], %r{60 + j};" for j in range(count))
    out = np.zeros((32, count), np.uint32)
    arrays = [out, a, b, c, *([] if metadata is None else [metadata])]
    ptx.run(kernel(body, len(arrays)), "k", (1,), (32,), arrays)
    return out


TYPES = {"f16": np.float16, "tf32": np.float32, "s8": np.int8}
MMA = [("f16", 16, "f32"), ("f16", 8, "f32"), ("f16", 16, "f16"), ("tf32", 8, "f32"), ("s8", 32, "s32")]


def small_integers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Exact in every type, so that results have no rounding."""
    return np.random.default_rng(seed).integers(-4, 5, shape)


@pytest.mark.parametrize(("kind", "depth", "total"), MMA)
def test_mma(kind, depth, total):
    a, b, c = small_integers((16, depth), 0), small_integers((depth, 8), 1), small_integers((16, 8), 2)
    result = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[total]
    words = multiply(
        f"mma.sync.aligned.m16n8k{depth}.row.col.{total}.{kind}.{kind}.{total}",
        fragments(a.astype(TYPES[kind]), a_layout(kind, depth)),
        fragments(b.astype(TYPES[kind]), b_layout(kind, depth)),
        fragments(c.astype(result), c_layout()),
    )
    np.testing.assert_array_equal(words.view(result).reshape(32, 4), (a @ b + c).astype(result)[c_layout()])


def test_mma_of_bfloat16():
    a, b = (encode("bf16", small_integers(s, i).astype(np.float32)) for i, s in enumerate(((16, 16), (16, 8))))
    words = multiply(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        fragments(a, a_layout("bf16", 16)),
        fragments(b, b_layout("bf16", 16)),
        np.zeros((32, 4), np.uint32),
    )
    expected = small_integers((16, 16), 0) @ small_integers((16, 8), 1)
    np.testing.assert_array_equal(words.view(np.float32), expected[c_layout()])


def compressed(kind: str, depth: int, selector: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A 2:4 matrix (16, depth), its stored values (16, depth / 2), and the metadata of the 32 lanes."""
    generator = np.random.default_rng(3)
    kept = np.sort(np.argsort(generator.random((16, depth // 4, 4)), 2)[..., :2], 2)
    values = small_integers((16, depth // 4, 2), 4)
    dense = np.zeros((16, depth // 4, 4), values.dtype)
    np.put_along_axis(dense, kept, values, 2)
    metadata = np.full(32, 0x44444444, np.uint64)  # indices 0 and 1, where the selector does not look
    lane, bit = np.broadcast_arrays(*metadata_place(kind, depth // 2, selector))
    metadata[np.unique(lane)] = 0
    for where, shift, index in zip(lane.flat, bit.flat, kept.reshape(16, -1).flat, strict=True):
        metadata[where] |= np.uint64(int(index) << int(shift))
    return dense.reshape(16, depth), values.reshape(16, -1), metadata.astype(np.uint32)


@pytest.mark.parametrize(
    ("kind", "depth", "selector"), [("f16", 32, 0), ("f16", 32, 1), ("f16", 16, 3), ("s8", 64, 0), ("s8", 32, 1)]
)
def test_sparse_mma(kind, depth, selector):
    total, result = ("s32", np.int32) if kind == "s8" else ("f32", np.float32)
    dense, values, metadata = compressed(kind, depth, selector)
    b = small_integers((depth, 8), 5)
    words = multiply(
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k{depth}.row.col.{total}.{kind}.{kind}.{total}",
        fragments(values.astype(TYPES[kind]), a_layout(kind, depth // 2)),
        fragments(b.astype(TYPES[kind]), b_layout(kind, depth)),
        np.zeros((32, 4), np.uint32),
        f"0x{selector:x}",
        metadata,
    )
    np.testing.assert_array_equal(words.view(result), (dense @ b).astype(result)[c_layout()])


def test_sparse_mma_refuses_unordered_metadata():
    _, values, metadata = compressed("f16", 32, 0)
    metadata[4] = 0x11111111
    b = np.zeros((32, 4), np.uint32)
    with pytest.raises(ptx.PtxError, match="ascending"):
        multiply(
            "mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32",
            fragments(values.astype(np.float16), a_layout("f16", 16)), b, b, "0x0", metadata,
        )  # fmt: skip


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(trans):
    """Four matrices pass through shared memory: lane l has elements of row l / 4, or of a column with .trans."""
    body = f"""
        shl.b32 %r1, %r0, 4; mov.u32 %r2, s; add.u32 %r1, %r1, %r2; mad.wide.u32 %rd5, %r0, 16, %rd1;
        ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%rd5]; st.shared.v4.b32 [%r1], {{%r3, %r4, %r5, %r6}}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r3, %r4, %r5, %r6}}, [%r1];
        mad.wide.u32 %rd6, %r0, 16, %rd0; st.global.v4.b32 [%rd6], {{%r3, %r4, %r5, %r6}}; bar.sync 0;
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r1], {{%r3, %r4, %r5, %r6}}; bar.sync 0;
        ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r1];
        mad.wide.u32 %rd6, %r0, 16, %rd2; st.global.v4.b32 [%rd6], {{%r3, %r4, %r5, %r6}};"""
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    loaded, stored = np.zeros((32, 4, 2), np.uint16), np.zeros((4, 8, 8), np.uint16)
    ptx.run(kernel(body, 3, ".shared .align 16 .b8 s[512];"), "k", (1,), (32,), [loaded, matrices, stored])
    for lane in range(32):
        for i in range(4):
            matrix = matrices[i].T if trans else matrices[i]
            assert loaded[lane, i].tolist() == matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].tolist()
    np.testing.assert_array_equal(stored, matrices)


# What goes wrong


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mul.frobnicate.u32 %r1, %r0, 2;", "unknown opcode mul.frobnicate.u32"),
        ("st.global.u32 [%rd0+16], %r0;", "out of bounds of every global buffer"),
        ("st.global.u32 [%rd0+-4], %r0;", "out of bounds"),
        ("mov.u64 %rd1, 64; ld.global.u32 %r1, [%rd1];", "out of bounds"),
        ("st.global.u32 [%rd0+2], %r0;", "misaligned 4-byte access to global memory"),
        ("ld.global.v2.u32 {%r1, %r2}, [%rd0+4];", "misaligned 8-byte"),
        ("ld.shared.u32 %r1, [s];", "before it is written"),
        ("st.shared.u32 [s+62], %r0;", "misaligned 4-byte access to shared memory"),
        ("st.shared.u32 [s+64], %r0;", "out of 64 bytes of shared memory"),
        ("setp.lt.u32 %p1, %r0, 8; @%p1 bar.sync 0;", "a part of a warp reached"),
        ("setp.lt.u32 %p1, %r0, 8; @%p1 shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;", "not those of its membermask"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra L; bar.sync 1, 96; L:", "wait for ever at barrier 1"),
        ("L: bra L;", "still running"),
        ("trap;", "trap in thread 0"),
        ("add.u32 %rd1, %r0, 1;", "%rd1: expected a register of 32 bits, got 64"),
        ("ld.param.u64 %rd5, [p7];", "unknown parameter p7"),
        ("st.shared.u32 [elsewhere], %r0;", "unknown symbol elsewhere"),
    ],
)
def test_errors(body, message):
    out = np.zeros(4, np.uint32)
    with pytest.raises(ptx.PtxError, match=message):
        ptx.run(kernel(body, 1, ".shared .align 16 .b8 s[64];"), "k", (1,), (64,), [out], max_steps=99)
    assert not out.any()


def test_wrong_number_of_arguments():
    with pytest.raises(ptx.PtxError, match="expected 1 arguments, got 2"):
        ptx.run(kernel("", 1), "k", (1,), (1,), [1, 2])


def test_arrays_keep_the_alignment_they_have():
    """A pointer into an array that is aligned to 4 bytes only must not serve 16-byte loads."""
    shifted = ptx.Pointer(np.zeros(64, np.uint8), 4)
    with pytest.raises(ptx.PtxError, match="misaligned 16-byte"):
        ptx.run(kernel("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd0];", 1), "k", (1,), (1,), [shifted])


REVERSE = """
    shl.b32 %r1, %r0, 2; mov.u32 %r2, s; add.u32 %r3, %r1, %r2; st.shared.u32 [%r3], %r0;
    bar.sync 0;
    sub.u32 %r4, 508, %r1; add.u32 %r4, %r4, %r2; ld.shared.u32 %r5, [%r4];
    mad.wide.u32 %rd1, %r0, 4, %rd0; st.global.u32 [%rd1], %r5;"""
SCHEDULES = [ptx.LockStep(), *(ptx.Adversarial(seed) for seed in range(3))]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedules_agree_where_there_is_no_race(schedule):
    out = np.zeros(128, np.uint32)
    text = kernel(REVERSE, 1, ".shared .align 16 .b8 s[512];")
    ptx.run(text, "k", (1,), (128,), [out], schedule=schedule)
    assert out.tolist() == list(range(127, -1, -1))


def test_a_missing_barrier_shows():
    text = kernel(REVERSE.replace("bar.sync 0;", ""), 1, ".shared .align 16 .b8 s[512];")
    with pytest.raises(ptx.PtxError, match="a read races with another warp's write"):
        ptx.run(text, "k", (1,), (128,), [np.zeros(128, np.uint32)])
    for seed in range(3):
        with pytest.raises(ptx.PtxError, match="before it is written"):
            ptx.run(text, "k", (1,), (128,), [np.zeros(128, np.uint32)], schedule=ptx.Adversarial(seed))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_overwriting_what_others_read_is_a_race(schedule):
    """The barrier before the read is there, the one after it is missing."""
    again = REVERSE + "st.shared.u32 [%r3], %r5;"
    text = kernel(again, 1, ".shared .align 16 .b8 s[512];")
    with pytest.raises(ptx.PtxError, match="races with another warp's"):
        ptx.run(text, "k", (1,), (128,), [np.zeros(128, np.uint32)], schedule=schedule)
    ptx.run(
        text.replace("st.shared.u32 [%r3], %r5;", "bar.sync 0; st.shared.u32 [%r3], %r5;"),
        "k",
        (1,),
        (128,),
        [np.zeros(128, np.uint32)],
        schedule=schedule,
    )


def test_an_asynchronous_copy_over_what_others_read_is_a_race():
    copy = "cp.async.ca.shared.global [%r3], [%rd0], 4;"
    text = kernel(REVERSE + copy, 1, ".shared .align 16 .b8 s[512];")
    with pytest.raises(ptx.PtxError, match="a write races"):
        ptx.run(text, "k", (1,), (128,), [np.zeros(128, np.uint32)])


def test_warps_that_write_the_same_value_do_not_race():
    body = (
        "and.b32 %r1, %r0, 31; shl.b32 %r1, %r1, 2; mov.u32 %r2, s; add.u32 %r1, %r1, %r2; st.shared.u32 [%r1], VALUE;"
    )
    text = kernel(body, 0, ".shared .align 16 .b8 s[128];")
    for schedule in SCHEDULES:
        ptx.run(text.replace("VALUE", "7"), "k", (1,), (64,), [], schedule=schedule)
        with pytest.raises(ptx.PtxError, match=r"two warps write different values|a write races"):
            ptx.run(text.replace("VALUE", "%r0"), "k", (1,), (64,), [], schedule=schedule)


ASYNC = """
    shl.b32 %r1, %r0, 4; mov.u32 %r2, s; add.u32 %r3, %r1, %r2; mad.wide.u32 %rd3, %r0, 16, %rd1;
    cp.async.cg.shared.global [%r3], [%rd3], 16, 12; cp.async.commit_group;
    mad.wide.u32 %rd4, %r0, 16, %rd0; cp.async.wait_group 0; bar.sync 0;
    ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r3]; st.global.v4.u32 [%rd4], {%r4, %r5, %r6, %r7};"""


def test_asynchronous_copy():
    source, out = np.arange(1, 257, dtype=np.uint32).reshape(64, 4), np.full((64, 4), 9, np.uint32)
    text = kernel(ASYNC, 2, ".extern .shared .align 16 .b8 s[];")
    ptx.run(text, "k", (1,), (64,), [out, source], shared_bytes=1024)
    np.testing.assert_array_equal(out[:, :3], source[:, :3])
    assert not out[:, 3].any()


@pytest.mark.parametrize("missing", ["cp.async.wait_group 0;", "cp.async.commit_group;"])
def test_a_missing_wait_shows(missing):
    text = kernel(ASYNC.replace(missing, ""), 2, ".extern .shared .align 16 .b8 s[];")
    with pytest.raises(ptx.PtxError, match="while an asynchronous copy is in flight"):
        ptx.run(text, "k", (1,), (64,), [np.zeros((64, 4), np.uint32)] * 2, shared_bytes=1024)


def test_a_wait_for_too_few_groups_shows():
    text = kernel(ASYNC.replace("wait_group 0", "wait_group 1"), 2, ".extern .shared .align 16 .b8 s[];")
    with pytest.raises(ptx.PtxError, match="in flight"):
        ptx.run(text, "k", (1,), (64,), [np.zeros((64, 4), np.uint32)] * 2, shared_bytes=1024)


def test_named_barriers_pass_work_between_warps():
    """Warp 0 produces and does not wait; warp 1 waits for it."""
    body = """
        mov.u32 %r2, s; setp.lt.u32 %p1, %r0, 32; @!%p1 bra CONSUME;
        shl.b32 %r1, %r0, 2; add.u32 %r3, %r1, %r2; st.shared.u32 [%r3], %r0; bar.arrive 1, 64; ret;
    CONSUME: bar.sync 1, 64;
        sub.u32 %r1, %r0, 32; shl.b32 %r1, %r1, 2; add.u32 %r3, %r1, %r2; ld.shared.u32 %r4, [%r3];
        cvt.u64.u32 %rd1, %r1; add.u64 %rd1, %rd1, %rd0; st.global.u32 [%rd1], %r4;"""
    for schedule in SCHEDULES:
        out = np.zeros(32, np.uint32)
        ptx.run(kernel(body, 1, ".shared .align 16 .b8 s[128];"), "k", (1,), (64,), [out], schedule=schedule)
        assert out.tolist() == list(range(32))


def test_a_cta_that_spins_on_another_does_not_hang():
    """CTA 1 waits for a flag that CTA 0 sets; the schedule must let both go on."""
    body = """
        mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; @%p1 bra SET;
    SPIN: ld.acquire.gpu.global.u32 %r2, [%rd0]; setp.eq.u32 %p2, %r2, 0; @%p2 bra SPIN;
        st.global.u32 [%rd0+4], 5; ret;
    SET: st.release.gpu.global.u32 [%rd0], 1;"""
    for schedule in SCHEDULES:
        out = np.zeros(2, np.uint32)
        ptx.run(kernel(body, 1), "k", (2,), (32,), [out], schedule=schedule)
        assert out.tolist() == [1, 5]


HAND_OVER = """
    mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; @%p1 bra SET;
SPIN: ACQUIRE setp.eq.u32 %p2, %r2, 0; @%p2 bra SPIN;
    AFTER ld.global.u32 %r3, [%rd0+4]; st.global.u32 [%rd0+8], %r3; ret;
SET: st.global.u32 [%rd0+4], 5; BEFORE RELEASE"""
LOAD = "ld.{}.gpu.global.u32 %r2, [%rd0];"


def hand_over(release: str, acquire: str, before: str = "", after: str = "") -> str:
    parts = {"ACQUIRE": acquire, "AFTER": after, "BEFORE": before, "RELEASE": release}
    body = HAND_OVER
    for name, text in parts.items():
        body = body.replace(name, text)
    return kernel(body, 1)


IMPATIENT = [ptx.LockStep(), *(ptx.Adversarial(seed, patience=(1, 3, 30)) for seed in range(3))]
"""Schedules that do not leave a CTA for long to spin, of which each atomic takes milliseconds."""


@pytest.mark.parametrize("schedule", IMPATIENT, ids=repr)
@pytest.mark.parametrize(
    "parts",
    [
        ("st.release.gpu.global.u32 [%rd0], 1;", LOAD.format("acquire")),
        ("red.release.gpu.global.add.u32 [%rd0], 1;", "atom.acquire.gpu.global.or.b32 %r2, [%rd0], 0;"),
        ("st.relaxed.gpu.global.u32 [%rd0], 1;", LOAD.format("relaxed"), "fence.acq_rel.gpu;", "membar.gl;"),
    ],
)
def test_what_was_released_and_acquired_is_no_race_between_ctas(parts, schedule):
    out = np.zeros(3, np.uint32)
    ptx.run(hand_over(*parts), "k", (2,), (32,), [out], schedule=schedule, cooperative=True)
    assert out[1:].tolist() == [5, 5]


@pytest.mark.parametrize(
    "parts",
    [
        ("st.relaxed.gpu.global.u32 [%rd0], 1;", LOAD.format("acquire")),
        ("st.release.gpu.global.u32 [%rd0], 1;", LOAD.format("relaxed")),
        ("st.release.cta.global.u32 [%rd0], 1;", LOAD.format("acquire")),
        ("red.global.add.u32 [%rd0], 1;", LOAD.format("acquire")),
        ("st.relaxed.gpu.global.u32 [%rd0], 1;", LOAD.format("relaxed"), "fence.acq_rel.gpu;", "membar.cta;"),
    ],
)
def test_what_was_not_released_or_acquired_is_a_race_between_ctas(parts):
    with pytest.raises(ptx.PtxError, match="a read races with another warp's write"):
        ptx.run(hand_over(*parts), "k", (2,), (32,), [np.zeros(3, np.uint32)], cooperative=True)


def test_a_plain_write_races_with_a_plain_read_of_another_cta():
    body = "mov.u32 %r1, %ctaid.x; st.global.u32 [%rd0], %r1;"
    with pytest.raises(ptx.PtxError, match=r"two warps write different values|a write races"):
        ptx.run(kernel(body, 1), "k", (2,), (32,), [np.full(1, 7, np.uint32)], cooperative=True)


def test_generic_addresses_reach_both_memories():
    body = """
        mov.u64 %rd1, s; cvta.shared.u64 %rd2, %rd1; mad.wide.u32 %rd2, %r0, 4, %rd2; st.u32 [%rd2], %r0;
        ld.u32 %r1, [%rd2];
        cvta.to.global.u64 %rd3, %rd0; mad.wide.u32 %rd3, %r0, 4, %rd3; st.u32 [%rd3], %r1;"""
    out = np.zeros(32, np.uint32)
    ptx.run(kernel(body, 1, ".shared .align 16 .b8 s[128];"), "k", (1,), (32,), [out])
    assert out.tolist() == list(range(32))


def test_every_row_names_its_section():
    from ptx.table import TABLE

    assert len(TABLE) > 50
    assert all(re.match(r"9\.7\.\d+", row.section) for row in TABLE)


def test_opcodes_are_counted_by_warp():
    counts = ptx.run(kernel("bar.sync 0;", 0), "k", (2,), (64,), [])
    assert counts == {"mov.u32": 4, "bar.sync": 4, "ret": 4}
