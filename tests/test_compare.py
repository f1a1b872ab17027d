import json

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sparsenlp import SparseLinear, SparsifyConfig, sparsify_
from sparsenlp.compare import compare, output_similarity
from sparsenlp.models.structure import layer_stack
from sparsenlp.prune import (
    Block,
    finalize_,
    prune_,
    remove_heads_,
    remove_layers_,
    remove_neurons_,
)


@pytest.fixture
def linears():
    """Two models of one 8 x 4 layer of ones; the pruned one has lost rows 0-3 and 7, column 2 and weight (5, 1)."""
    dense, pruned = (nn.Sequential(nn.Linear(4, 8)) for _ in range(2))
    with torch.no_grad():
        for model in (dense, pruned):
            model[0].weight.fill_(1)
            model[0].bias.fill_(1)
        dense[0].weight[0, 0] = 0
        weight = pruned[0].weight
        weight[:4] = weight[7] = 0
        weight[:, 2] = 0
        weight[5, 1] = 0
    return dense, pruned


def test_layer_by_hand(linears):
    (change,) = compare(*linears, block=(4, 1)).layers
    assert (change.empty_rows, change.empty_columns) == ((0, 1, 2, 3, 7), (2,))
    assert (change.kept_blocks, change.blocks_in_a_row, change.empty_blocks) == ((0, 3), 4, 5)
    assert (change.dense_zeros, change.zeros, change.removed) == (1, 24, 31 - 8)
    assert change.cosine == pytest.approx(8 / (31 * 8) ** 0.5)


def test_whole_model_by_hand(linears):
    result = compare(*linears, tokens=10, seconds=(0.4, 0.1), metrics={"accuracy": (0.85, 0.83)})
    assert result.totals == {
        "sparsity": (1 / 32, 24 / 32),
        "parameters": (40, 40),
        "bytes": (160, 160),
        "flops": (640, 640),
        "seconds": (0.4, 0.1),
    }
    assert result.removed == pytest.approx(1 - 8 / 31)
    assert result.missing == result.structures == ()
    assert result.outputs is None


def test_sparse_and_masked_layers_are_read(linears):
    dense, pruned = linears
    pruned[0] = SparseLinear.from_dense(pruned[0], (4, 1))
    result = compare(dense, pruned, block=(4, 1))
    assert result.layers[0].layer.kind == "4x1"
    assert (result.layers[0].kept_blocks, result.flops) == ((0, 3), (64, 2 * 12))
    prune.l1_unstructured(dense[0], "weight", amount=31)
    assert compare(dense, pruned).layers[0].dense_zeros == 31


def test_block_that_does_not_divide_is_left_out(linears):
    (change,) = compare(*linears, block=(3, 1)).layers
    assert (change.kept_blocks, change.blocks_in_a_row, change.empty_blocks) == ((), 0, 0)


def test_outputs_by_hand(linears):
    """Rows of the dense model give 5, the first 4; the pruned ones 1, but 4, 3 and 4 in rows 4 to 6."""
    result = compare(*linears, inputs={"input": torch.ones(2, 4)}).outputs
    dense, pruned = torch.tensor([4.0, 5, 5, 5, 5, 5, 5, 5]), torch.tensor([1.0, 1, 1, 1, 4, 3, 4, 1])
    assert result.output == pytest.approx(float(torch.cosine_similarity(dense, pruned, dim=0)))
    assert (result.hidden, result.largest) == ((), pytest.approx(4 / 5))


def test_as_dict_is_json_and_str_a_table(linears):
    result = compare(*linears, inputs={"input": torch.ones(2, 4)}, block=(4, 1), metrics={"accuracy": (0.85, 0.83)})
    data = json.loads(json.dumps(result.as_dict()))
    assert data["layers"][0]["empty_rows"] == [0, 1, 2, 3, 7]
    assert data["layers"][0]["removed"] == 23
    assert (data["bytes"], data["seconds"], data["metrics"]) == ([160, 160], None, {"accuracy": [0.85, 0.83]})
    lines = str(result).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert lines[1].split() == ["0", "8x4", "dense", "75.0%", "5", "1", "5", "0.508"]
    assert "sparsity: 3.1% -> 75.0%" in lines
    assert "accuracy: 0.85 -> 0.83" in lines


def test_models_are_left_alone(linears):
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in linears]
    for model in linears:
        model.train()
    compare(*linears, inputs={"input": torch.ones(2, 4)})
    for model, state in zip(linears, before, strict=True):
        assert model.training
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_errors(linears):
    dense, pruned = linears
    with pytest.raises(ValueError, match="expected tokens and block of at least 1, got 0 and"):
        compare(dense, pruned, tokens=0)
    with pytest.raises(ValueError, match="expected the dense model's linear layers in the pruned one, got '1' too"):
        compare(dense, nn.Sequential(*pruned, nn.Linear(8, 2)))
    with pytest.raises(ValueError, match=r"expected outputs of shape \(2, 8\), the dense model's, got \(2, 4\)"):
        output_similarity(dense, nn.Linear(4, 4), {"input": torch.ones(2, 4)})


@pytest.fixture
def make_bert():
    transformers = pytest.importorskip("transformers", reason="the layers are those of a transformers model")

    def make():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **sizes)
        return transformers.BertForSequenceClassification(config).eval()

    return make


INPUTS = {
    "input_ids": torch.arange(12).view(2, 6),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
}


def test_idle_heads_and_neurons(make_bert):
    """Head 1 of layer 0 is not read and head 3 has no values; neurons 5 and 6 of layer 1 likewise."""
    dense, pruned = make_bert(), make_bert()
    first, second = layer_stack(pruned).layers
    with torch.no_grad():
        first.output.weight[:, 8:16] = 0
        first.inputs[2].weight[24:32] = 0
        first.inputs[0].weight[0:8] = 0  # attention of head 0 becomes uniform, and still counts
        second.ffn_output.weight[:, 5] = 0
        second.ffn_inputs[0].weight[6] = 0
    changes = compare(dense, pruned).structures
    assert [(c.heads, c.idle_heads) for c in changes] == [((4, 4), (1, 3)), ((4, 4), ())]
    assert [(c.neurons, c.idle_neurons) for c in changes] == [((64, 64), ()), ((64, 64), (5, 6))]
    assert changes[0].name == "bert.encoder.layer.0"


def test_structures_removed_for_good(make_bert):
    dense = make_bert()
    pruned = remove_neurons_(remove_heads_(make_bert(), {0: [2]}), {0: range(16)})
    result = compare(dense, pruned)
    assert [(c.heads, c.neurons) for c in result.structures] == [((3, 4), (48, 64)), ((4, 4), (64, 64))]
    changes = {change.layer.name: change for change in result.layers}
    query = changes["bert.encoder.layer.0.attention.self.query"]
    assert (query.layer.shape, query.dense_shape, query.cosine, query.removed) == ((24, 32), (32, 32), None, 8 * 32)
    assert changes["bert.encoder.layer.1.output.dense"].cosine == pytest.approx(1)
    gone = 4 * 8 * 32 + 2 * 16 * 32
    assert result.removed == pytest.approx(gone / sum(layer.nonzeros for layer in result.dense.layers))
    shorter = compare(dense, remove_layers_(make_bert(), [1]), INPUTS)
    assert len(shorter.missing) == 6
    assert all(name.startswith("bert.encoder.layer.1.") for name in shorter.missing)
    assert (len(shorter.structures), shorter.outputs.hidden) == (1, ())
    assert "gone: bert.encoder.layer.1.output.dense" in str(shorter)


def test_hidden_states_without_padding(make_bert):
    """Padding tokens do not count, and a model that is the same but for its last layer differs only there."""
    dense, pruned = make_bert(), make_bert()
    assert compare(dense, pruned, INPUTS).outputs.hidden == (pytest.approx(1),) * 3
    with torch.no_grad():
        pruned.bert.embeddings.word_embeddings.weight[9:12].normal_()
    assert compare(dense, pruned, INPUTS).outputs.hidden == (pytest.approx(1),) * 3
    assert compare(dense, pruned, {"input_ids": INPUTS["input_ids"]}).outputs.hidden[0] < 0.99
    with torch.no_grad():
        layer_stack(pruned).layers[1].ffn_output.bias.normal_()
    hidden = compare(dense, pruned, INPUTS).outputs.hidden
    assert hidden[:2] == (pytest.approx(1),) * 2
    assert hidden[2] < 0.999


@pytest.mark.parametrize("fuse", [False, True])
def test_converted_model(make_bert, fuse):
    dense, pruned = make_bert(), make_bert()
    prune_(pruned, Block(8, 1), 0.75)
    masked = compare(dense, pruned, INPUTS)
    sparsify_(finalize_(pruned), SparsifyConfig(measure="off", fuse=fuse))
    converted = compare(dense, pruned, INPUTS)
    assert [c.kept_blocks for c in converted.layers] == [c.kept_blocks for c in masked.layers]
    assert [c.cosine for c in converted.layers] == pytest.approx([c.cosine for c in masked.layers])
    assert converted.outputs.output == pytest.approx(masked.outputs.output, abs=1e-5)
    assert converted.structures == masked.structures
    assert converted.flops[1] < masked.flops[1]
