"""Against torch's own conversion to the layout of CUTLASS, which runs on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsenlp.formats import NM
from sparsenlp.formats.semi_structured import from_semi_structured, to_semi_structured

SHAPES = [(32, 64), (64, 128), (96, 192)]
DTYPES = [torch.float16, torch.bfloat16, torch.int8]


def dense_matrix(rows: int, columns: int, dtype: torch.dtype, kept: int = 2) -> torch.Tensor:
    """Whole numbers with `kept` nonzeros in every group of 4 columns, at random places."""
    generator = torch.Generator().manual_seed(rows)
    places = torch.rand(rows, columns // 4, 4, generator=generator).argsort(dim=2) < kept
    values = torch.randint(1, 100, places.shape, generator=generator)
    return (values * places).flatten(1).to(dtype)


def weight_of(dense: torch.Tensor) -> NM:
    weight = NM.from_dense(dense.float())
    scales = torch.ones(dense.shape[0]) if dense.dtype == torch.int8 else None
    return NM(weight.values.to(dense.dtype), weight.indices, weight.shape, weight.pattern, scales).validate()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_torch_has_it(shape, dtype):
    dense = dense_matrix(*shape, dtype)
    values, metadata = to_semi_structured(weight_of(dense))
    expected_values, expected_metadata = sparse_semi_structured_from_dense_cutlass(dense)
    assert torch.equal(values, expected_values)
    assert torch.equal(metadata, expected_metadata)
    assert metadata.dtype == expected_metadata.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_round_trips(kept, dtype):
    dense = dense_matrix(64, 128, dtype, kept)
    values, metadata = to_semi_structured(weight_of(dense))
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, metadata), dense)
    assert torch.equal(from_semi_structured(values, metadata).to_dense().to(dtype), dense)
    assert torch.equal(
        from_semi_structured(*sparse_semi_structured_from_dense_cutlass(dense)).to_dense().to(dtype), dense
    )


def test_torchs_tensor_takes_it():
    dense = dense_matrix(64, 128, torch.float16)
    values, metadata = to_semi_structured(weight_of(dense))
    tensor = SparseSemiStructuredTensorCUTLASS(dense.shape, values, metadata, None, None, None)
    assert torch.equal(tensor.to_dense(), dense)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (NM.from_dense(torch.zeros(32, 32), (1, 4)), ValueError, "expected the pattern 2:4, got 1:4"),
        (NM.from_dense(torch.zeros(32, 32)), TypeError, "float16, bfloat16 or int8, got torch.float32"),
        (NM.from_dense(torch.zeros(16, 32).half()), ValueError, "a multiple of 32 x 32, got 16 x 32"),
        (NM.from_dense(torch.zeros(16, 32)).quantize(), ValueError, "a multiple of 16 x 64, got 16 x 32"),
    ],
    ids=str,
)
def test_errors(weight, error, message):
    with pytest.raises(error, match=message):
        to_semi_structured(weight)


def test_from_errors():
    values, metadata = to_semi_structured(weight_of(dense_matrix(64, 128, torch.float16)))
    with pytest.raises(ValueError, match=r"expected metadata of shape \(64, 8\) and dtype torch.int16"):
        from_semi_structured(values, metadata[:, :4])
    with pytest.raises(ValueError, match="indices to increase within each group"):
        from_semi_structured(values, torch.zeros_like(metadata))
