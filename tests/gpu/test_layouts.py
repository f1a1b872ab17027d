"""The layouts of tensor-core fragments in ptx/mma.py, against two sources that were not read to write them.

CuTe's layouts of the sm_80 atoms: (thread, value) -> place in a matrix whose rows come first.
CUTLASS's order of the metadata of sparse matrices on sm_80, as `reorder_meta` of host_reorder.h produces it.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from ptx.mma import a_layout, b_layout, c_layout, metadata_place

# type, depth: name of the atom, (shape, stride) of A and of B; each of thread and value modes.
# Source: CUTLASS, include/cute/atom/mma_traits_sm80.hpp
Layout = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]
CUTE: dict[tuple[str, int], tuple[str, Layout, Layout]] = {
    ("f16", 16): (
        "SM80_16x8x16_F16F16F16F16_TN",
        (((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))),
        (((4, 8), (2, 2)), ((16, 1), (8, 64))),
    ),
    ("tf32", 8): (
        "SM80_16x8x8_F32TF32TF32F32_TN",
        (((4, 8), (2, 2)), ((16, 1), (8, 64))),
        (((4, 8), (2,)), ((8, 1), (32,))),
    ),
    ("tf32", 4): (
        "SM80_16x8x4_F32TF32TF32F32_TN",
        (((4, 8), (2,)), ((16, 1), (8,))),
        (((4, 8), (1,)), ((8, 1), (0,))),
    ),
    ("s8", 16): (
        "SM80_16x8x16_S32S8S8S32_TN",
        (((4, 8), (4, 2)), ((64, 1), (16, 8))),
        (((4, 8), (4,)), ((32, 1), (8,))),
    ),
    ("s8", 32): (
        "SM80_16x8x32_S32S8S8S32_TN",
        (((4, 8), (4, 2, 2)), ((64, 1), (16, 8, 256))),
        (((4, 8), (4, 2)), ((32, 1), (8, 128))),
    ),
    ("f16", 8): (
        "SM80_16x8x8_F16F16F16F16_TN",
        (((4, 8), (2, 2)), ((32, 1), (16, 8))),
        (((4, 8), (2,)), ((16, 1), (8,))),
    ),
}
ACCUMULATOR: Layout = (((4, 8), (2, 2)), ((32, 1), (16, 8)))
ALIASES = {"SM80_16x8_Row": ACCUMULATOR, "SM80_8x8_Row": CUTE["f16", 8][2], "SM80_8x4": CUTE["tf32", 4][2]}
ALIASES |= {"SM80_8x16_Row": CUTE["s8", 16][2]}


def places(layout: Layout, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns), each (32 threads, values), of a CuTe layout over a matrix of `rows` rows."""

    def offsets(shape: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
        coordinates = itertools.product(*(range(size) for size in reversed(shape)))  # the first mode is the fastest
        return np.array([sum(c * s for c, s in zip(reversed(x), stride, strict=True)) for x in coordinates])

    (threads, values), (thread_stride, value_stride) = layout
    index = offsets(threads, thread_stride)[:, None] + offsets(values, value_stride)
    return index % rows, index // rows


@pytest.mark.parametrize(("kind", "depth"), CUTE, ids=str)
def test_fragments_lie_as_in_cute(kind, depth):
    _, a, b = CUTE[kind, depth]
    np.testing.assert_array_equal(np.broadcast_arrays(*a_layout(kind, depth)), places(a, 16))
    columns, rows = places(b, 8)
    np.testing.assert_array_equal(np.broadcast_arrays(*b_layout(kind, depth)), (rows, columns))
    np.testing.assert_array_equal(np.broadcast_arrays(*c_layout()), places(ACCUMULATOR, 16))


def header() -> str:
    """mma_traits_sm80.hpp of the package nvidia-cutlass, without spaces."""
    spec = importlib.util.find_spec("cutlass_library")
    file = Path("include/cute/atom/mma_traits_sm80.hpp")
    folders = [Path(place) / "source" for place in (spec.submodule_search_locations or [])] if spec else []
    found = [folder / file for folder in folders if (folder / file).exists()]
    if not found:
        pytest.skip("the headers of the package nvidia-cutlass are not installed")
    return re.sub(r"\s", "", found[0].read_text())


def in_cute(layout: Layout) -> str:
    def mode(name: str, numbers: tuple[int, ...]) -> str:
        items = ",".join(f"_{number}" for number in numbers)
        return f"{name}<{items}>" if len(numbers) > 1 else items

    shape, stride = layout
    return "Layout<Shape<{},{}>,Stride<{},{}>>".format(
        *(mode("Shape", part) for part in shape), *(mode("Stride", part) for part in stride)
    )


@pytest.mark.parametrize(("kind", "depth"), CUTE, ids=str)
def test_the_table_is_cutes(kind, depth):
    text = header()
    for name, layout in ALIASES.items():
        assert f"using{name}={in_cute(layout)};" in text
        text = text.replace(f"={name};", f"={in_cute(layout)};")
    atom, a, b = CUTE[kind, depth]
    struct = text[text.index(f"structMMA_Traits<{atom}>") :]
    struct = struct[: struct.index("};")]
    assert f"usingALayout={in_cute(a)};" in struct
    assert f"usingBLayout={in_cute(b)};" in struct
    assert f"usingCLayout={in_cute(ACCUMULATOR)};" in struct


def reordered(bits: int, rows: int) -> np.ndarray:
    """Where CUTLASS stores metadata element (row, k), in elements: (rows, 2).

    An element is 16 bits (4 groups) for 16-bit values, 32 bits (8 groups) for 8-bit values.
    """
    group, interleave = (32, 4) if bits == 16 else (16, 2)
    place = np.zeros((rows, 2), int)
    for m, k in itertools.product(range(rows), range(2)):
        row, column = m // group * group + m % 8 * interleave + m % group // 8, k
        if row % 2 == 0 and column == 1:
            row, column = row + 1, 0
        elif row % 2 == 1 and column == 0:
            row, column = row - 1, 1
        place[m, k] = 2 * row + column  # pairs of columns lie side by side
    return place


@pytest.mark.parametrize("selector", [0, 1])
def test_metadata_of_16_bit_values_lie_as_in_cutlass(selector):
    """32 rows fill the 32 lanes' words: selector 0 reads rows 0 to 15, selector 1 rows 16 to 31."""
    place = reordered(16, 32)[16 * selector : 16 * selector + 16]  # in halves of words
    lane, bit = metadata_place("f16", 16, selector)
    for row, column in itertools.product(range(16), range(16)):
        element = place[row, column // 8]
        expected = element // 2, element % 2 * 16 + column % 8 * 2
        assert (lane[row, column], bit[row, column]) == expected


def test_metadata_of_8_bit_values_lie_as_in_cutlass():
    place = reordered(8, 16)  # in words
    lane, bit = metadata_place("s8", 32, 0)
    for row, column in itertools.product(range(16), range(32)):
        assert (lane[row, column], bit[row, column]) == (place[row, column // 16], column % 16 * 2)
