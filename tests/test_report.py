import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from sparsenlp import NMLinear, SparseLinear
from sparsenlp.report import cosine_similarity, effective_weight, report


class Halve(nn.Module):
    def forward(self, weight):
        return torch.cat([torch.zeros_like(weight[: len(weight) // 2]), weight[len(weight) // 2 :]])


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8, bias=False))
    with torch.no_grad():
        model[1].weight[:24] = 0
    return model


def test_dense_with_zeros(mlp):
    result = report(mlp)
    first, second = result.layers
    assert (first.name, first.kind, first.shape, first.parameters) == ("1", "dense", (32, 16), 32 * 16 + 32)
    assert first.sparsity == 0.75
    assert (first.dense_bytes, first.stored_bytes) == (4 * 544, 4 * 544)
    assert (first.flops, first.dense_flops) == (2 * 512, 2 * 512)
    assert second.sparsity == 0.0
    assert result.sparsity == pytest.approx(384 / 768)
    assert (result.parameters, result.dense_bytes) == (160 + 544 + 256, 4 * (160 + 544 + 256))
    assert (result.other_parameters, result.other_bytes) == (160, 640)


def test_sparse_layer_counts_what_it_stores(mlp):
    mlp[1] = SparseLinear.from_dense(mlp[1], (8, 1))
    with torch.no_grad():
        mlp[1].values[0, 0, 0] = 0
    layer = report(mlp).layers[0]
    assert layer.kind == "8x1"
    assert layer.nonzeros == 127
    assert layer.flops == 2 * 128
    assert layer.stored_bytes == 4 * (128 + 16 + 5 + 32)
    assert report(mlp).parameters == 160 + 544 + 256


def test_a_layer_in_n_of_m_counts_what_it_stores(mlp):
    with torch.no_grad():
        mlp[3].weight.view(8, 8, 4)[:, :, 1:3] = 0
    dense = report(mlp)
    expected = mlp[3].weight.detach().clone()
    mlp[3] = NMLinear.from_dense(mlp[3], (2, 4))
    layer = report(mlp).layers[1]
    assert (layer.kind, layer.shape, layer.nonzeros, layer.sparsity) == ("2:4", (8, 32), 128, 0.5)
    assert (layer.flops, layer.dense_flops) == (2 * 128, 2 * 256)
    assert (layer.dense_bytes, layer.stored_bytes) == (4 * 256, (4 + 1) * 128)
    assert report(mlp).parameters == dense.parameters
    assert torch.equal(effective_weight(mlp[3]), expected)


def test_masked_layers(mlp):
    parametrize.register_parametrization(mlp[1], "weight", Halve())
    prune.l1_unstructured(mlp[3], "weight", amount=0.5)
    with torch.no_grad():
        mlp[3].weight_orig.mul_(2)
    first, second = report(mlp).layers
    assert (first.kind, first.sparsity) == ("masked", 0.75)
    assert (second.kind, second.sparsity) == ("masked", 0.5)
    assert report(mlp).parameters == 160 + 544 + 256
    assert torch.equal(effective_weight(mlp[3]), mlp[3].weight_orig * mlp[3].weight_mask)


def test_report_is_json(mlp):
    data = json.loads(json.dumps(report(mlp).as_dict()))
    assert data["layers"][0]["shape"] == [32, 16]
    assert data["sparsity"] == 0.5


def test_shared_layer_counts_once():
    layer = nn.Linear(8, 8)
    assert report(nn.Sequential(layer, layer)).parameters == 72


def test_model_without_linear_layers():
    result = report(nn.ReLU())
    assert (result.sparsity, result.parameters, result.layers) == (0.0, 0, ())


def test_cosine_of_pruned_and_dense(mlp):
    dense = copy.deepcopy(mlp)
    prune.l1_unstructured(mlp[3], "weight", amount=0.5)
    mlp[1] = SparseLinear.from_dense(mlp[1], (8, 1))
    result = cosine_similarity(dense, mlp)
    wanted = torch.cosine_similarity(dense[3].weight.flatten(), mlp[3].weight.flatten(), dim=0).detach()
    assert result.layers["1"] == pytest.approx(1.0)
    assert result.layers["3"] == pytest.approx(float(wanted), abs=1e-6)
    assert result.layers["3"] < result.overall < 1.0
    assert json.loads(json.dumps(result.as_dict()))["overall"] == result.overall


def test_cosine_with_a_zero_weight_is_zero(mlp):
    other = copy.deepcopy(mlp)
    nn.init.zeros_(other[1].weight)
    assert cosine_similarity(mlp, other).layers["1"] == 0.0


def test_cosine_errors(mlp):
    with pytest.raises(ValueError, match="the same linear layers in both models, got '3' in one only"):
        cosine_similarity(mlp, mlp[:2])
    other = copy.deepcopy(mlp)
    other[3] = nn.Linear(32, 4)
    with pytest.raises(ValueError, match=r"expected 3 of shape \(8, 32\), got \(4, 32\)"):
        cosine_similarity(mlp, other)
