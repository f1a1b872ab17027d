"""What block_sparse_attention does with tensors on a GPU, without one: what torch.compile sees."""

from __future__ import annotations

import torch
from attention_cases import BlockSparseAttentionCase
from torch._subclasses import FakeTensorMode
from traced import traced_ops

OPS = torch.ops.sparsenlp
CASE = BlockSparseAttentionCase(64, mask="causal", block=(32, 32), padding=True, dtype=torch.float16)


def test_torch_compile_sees_the_kernels(a_gpu):
    *tensors, scale = CASE.raw_arguments()
    with FakeTensorMode():
        tensors = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]
        lse = torch.empty(tensors[0].shape[:3], device="cuda")
        forward = traced_ops(lambda *t: OPS.block_sparse_attention(*t, scale), *tensors)
        backward = traced_ops(
            lambda *t: OPS.block_sparse_attention_backward(*t, scale), tensors[0], *tensors[:3], lse, lse, *tensors[3:]
        )
    assert forward.count("triton_kernel_wrapper_functional") == 1
    assert backward.count("triton_kernel_wrapper_functional") == 2
    assert not any(op.startswith("block_sparse_attention") for op in (*forward, *backward))
