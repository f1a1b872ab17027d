"""CUTLASS's order of metadata is what the lanes of a warp hand to mma.sp, by the map that the PTX ISA documents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import NMLinearCase
from ptx.mma import metadata_place

from sparsenlp.formats.semi_structured import to_semi_structured


@pytest.mark.parametrize(("dtype", "rows", "columns", "selectors"), [("f16", 32, 32, 2), ("s8", 16, 64, 1)])
def test_words_of_a_tile_are_the_lanes_metadata(dtype, rows, columns, selectors):
    case = NMLinearCase((1,), rows, columns, dtype=torch.float16, int8=dtype == "s8")
    weight = case.weight()
    words = to_semi_structured(weight)[1].contiguous().view(torch.int32).numpy().view(np.uint32).reshape(32)
    for selector in range(selectors):
        lane, bit = metadata_place(dtype, columns // 2, selector)
        found = words[lane] >> bit.astype(np.uint32) & 3
        np.testing.assert_array_equal(found, weight.indices[16 * selector : 16 * selector + 16].numpy())
