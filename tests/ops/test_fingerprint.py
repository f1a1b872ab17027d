"""Watches of tensors: what they see, and that they go."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsenlp import native
from sparsenlp.ops import fingerprint
from sparsenlp.ops.fingerprint import Watch


def test_edits_through_data_are_seen():
    tensors = [torch.ones(300), torch.zeros(0), torch.arange(12.0).view(3, 4).t(), torch.tensor(2.0)]
    watch = Watch(tensors)
    before = watch.fingerprint()
    assert watch.fingerprint() == before
    for tensor in (tensors[0], tensors[2], tensors[3]):
        tensor.data.mul_(2)
        assert watch.fingerprint() != before
        tensor.data.div_(2)
        assert watch.fingerprint() == before


@pytest.mark.skipif(not native.available, reason="the extension is not built")
def test_a_watch_that_goes_while_a_graph_is_traced_lets_its_tensors_go_later():
    tensor = torch.ones(8)
    watch, gone = Watch([tensor]), weakref.ref(tensor)
    with FakeTensorMode():
        del watch
    assert len(fingerprint._kept) == 1
    Watch([torch.ones(3)])
    assert not fingerprint._kept
    del tensor
    assert gone() is None
