import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from sparsenlp.prune import Block, Unstructured, finalize_, harden_, movement_, prune_
from sparsenlp.prune.layers import mask_of
from sparsenlp.train.int8 import start_rounding


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def masked(seed=0, sparsity=0.5):
    model = mlp(seed)
    prune_(model, Block(8, 1), sparsity)
    return model


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(16, 24, 3, padding=1)
        self.lstm = nn.LSTM(24, 16, batch_first=True, bidirectional=True, num_layers=2)
        self.out = nn.Linear(32, 8)

    def forward(self, x):
        return self.out(self.lstm(self.conv(x.transpose(1, 2)).transpose(1, 2))[0])


def tagger(seed=0):
    torch.manual_seed(seed)
    return Tagger().eval()


X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
SEQUENCES = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def add_to_data(weight):
    weight.data += 1


def set_data(weight):
    weight.data = torch.zeros_like(weight)


def set_rows(weight):
    weight[:, 0] = 1.0


@pytest.mark.parametrize(
    "write", [add_to_data, set_data, set_rows, nn.init.normal_, lambda weight: weight.add_(1)], ids=range(5)
)
@pytest.mark.parametrize("frozen", [False, True])
def test_what_would_be_lost_cannot_be_written(write, frozen):
    model = masked().requires_grad_(not frozen)
    before = model(X)
    with torch.no_grad(), pytest.raises(RuntimeError, match="masked weight: expected to be read only"):
        write(model[0].weight)
    assert torch.equal(model(X), before)
    with torch.no_grad():
        write(finalize_(model)[0].weight)
    assert not torch.equal(model(X), before)


def test_a_masked_weight_is_an_ordinary_tensor_to_whoever_reads_it():
    model = masked()
    weight = model[0].weight
    assert type(weight * 2) is type(weight.data) is type(weight.detach()) is type(model(X)) is torch.Tensor
    assert torch.equal(copy.deepcopy(model)[0].weight, weight)
    assert type(copy.deepcopy(weight.detach())) is type(pickle.loads(pickle.dumps(weight))) is torch.Tensor
    assert type(copy.deepcopy(masked().requires_grad_(False)[0].weight)) is torch.Tensor
    with torch.no_grad():
        model[0].weight = torch.ones_like(weight)
    assert torch.equal(model[0].weight, mask_of(model[0]).mask.float())


@pytest.mark.parametrize("rounded", [False, True])
def test_a_state_dict_saved_with_masks_on_loads_into_a_dense_model(rounded):
    model = masked()
    if rounded:
        start_rounding([model[0], model[2]])
    dense = mlp(seed=1)
    missing, unexpected = dense.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all("parametrizations" in name for name in unexpected)
    assert torch.equal(dense(X), model(X))
    assert torch.equal(finalize_(copy.deepcopy(model))(X), model(X))


def test_movement_masks_are_saved_and_burned_in():
    model, dense = mlp(), mlp(seed=1)
    movement_(model, Block(8, 1), 0.5)
    expected = model(X)
    dense.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(dense(X), expected)
    assert torch.equal(finalize_(model)(X), expected)
    assert list(model.state_dict()) == list(mlp().state_dict())


def test_a_state_dict_brings_masks_and_what_is_beneath_them_back():
    model, other = masked(), masked(seed=1, sparsity=0.0)
    other.load_state_dict(model.state_dict())
    assert other.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_a_dense_state_dict_goes_beneath_the_masks():
    model, dense = masked(), mlp(seed=1)
    mask = mask_of(model[0]).mask.clone()
    with pytest.warns(UserWarning, match=r"0: 256 of the 512 weights loaded are not zero but pruned by the mask"):
        model.load_state_dict(dense.state_dict())
    assert torch.equal(model[0].weight, dense[0].weight * mask)
    assert torch.equal(model[0].parametrizations.weight.original, dense[0].weight)


def test_weights_with_the_zeros_of_the_masks_load_without_a_warning(recwarn):
    model = masked()
    model.load_state_dict(finalize_(copy.deepcopy(model)).state_dict())
    assert not [warning for warning in recwarn if "mask" in str(warning.message)]


def test_pruning_and_saving_again():
    model, dense = masked(sparsity=0.3), mlp(seed=1)
    prune_(model, Block(8, 1), 0.6)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    dense.load_state_dict(again.state_dict(), strict=False)
    assert torch.equal(dense(X), model(X))


def test_a_copy_is_finalized_without_the_original():
    model = masked()
    expected = model(X)
    for other in (copy.deepcopy(model), model):
        assert torch.equal(finalize_(other)(X), expected)
        assert type(other[0]) is nn.Linear
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("end", [finalize_, harden_], ids=["finalize_", "harden_"])
def test_nothing_is_left_of_the_masks(end):
    model = masked()
    finalize_(end(model))
    assert not any(layer._state_dict_hooks or layer._load_state_dict_pre_hooks for layer in model.modules())
    assert list(model.state_dict()) == list(mlp().state_dict())


def test_a_split_layer_is_saved_under_the_names_of_torch():
    model, dense = tagger(), tagger(seed=1)
    prune_(model, Block(8, 1), 0.5)
    missing, _ = dense.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    torch.testing.assert_close(dense(SEQUENCES), model(SEQUENCES))
    other = tagger(seed=2)
    prune_(other, Block(8, 1), 0.0)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(SEQUENCES), model(SEQUENCES))


def test_a_split_layer_loads_what_torch_saved():
    model, dense = tagger(), tagger(seed=1)
    prune_(model, Block(8, 1), 0.0)
    model.load_state_dict(dense.state_dict())
    torch.testing.assert_close(model(SEQUENCES), dense(SEQUENCES))


def test_finalize_removes_masks_of_torch_too():
    model = tagger()
    torch_prune.l1_unstructured(model.lstm, "weight_hh_l0", 0.9)
    torch_prune.l1_unstructured(model.out, "weight", 0.5)
    expected = model(SEQUENCES)
    finalize_(model)
    assert list(model.state_dict().keys() - tagger().state_dict().keys()) == []
    torch.testing.assert_close(model(SEQUENCES), expected)


def test_what_the_default_filter_cannot_prune_is_said():
    model = tagger()
    torch_prune.l1_unstructured(model.lstm, "weight_hh_l0", 0.9)
    model.cell = nn.LSTMCell(8, 8)
    with pytest.warns(UserWarning, match="prune: left alone") as caught:
        sparsity = prune_(model, Unstructured(), 0.5)
    said = [str(warning.message) for warning in caught]
    assert [name for name in sparsity if "lstm" in name] == []
    assert any(text.startswith("prune: left alone: lstm: weight_hh_l0 carries a mask of torch") for text in said)
    assert any(text.startswith("prune: left alone: cell: a LSTMCell") for text in said)
