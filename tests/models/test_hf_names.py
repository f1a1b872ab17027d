"""Models whose tensors have other names in files of transformers, or are computed from others."""

import pytest
import torch
from tiny_encoders import IMAGE, PIXELS, build, transformers

from sparsenlp import SparsifyConfig, from_pretrained, save_pretrained, sparsify_
from sparsenlp.prune import Block, finalize_, prune_


def sparsified(model):
    prune_(model, Block(8, 1), 0.8)
    sparsify_(finalize_(model), SparsifyConfig(measure="off"))
    return model.eval()


@pytest.mark.parametrize("dense_before", [False, True], ids=["built", "loaded"])
def test_tensors_keep_the_names_that_the_description_has(dense_before, tmp_path):
    model = build(IMAGE["vit"])
    if dense_before:  # transformers then knows which names its file had
        model.save_pretrained(tmp_path / "dense")
        model = type(model).from_pretrained(tmp_path / "dense")
    model = sparsified(model)
    expected = model(PIXELS).last_hidden_state
    model.save_pretrained(tmp_path / "sparse")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "sparse").eval()
    torch.testing.assert_close(loaded(PIXELS).last_hidden_state, expected)


@pytest.mark.parametrize("door", ["ours", "transformers"])
def test_a_weight_norm_is_no_mask(door, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"conv_dim": (16,), "conv_kernel": (10,), "conv_stride": (5,), "num_feat_extract_layers": 1}
    sizes |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    model = sparsified(transformers.HubertModel(transformers.HubertConfig(**sizes)).eval())
    x = torch.randn(2, 400)
    expected = model(x).last_hidden_state
    if door == "ours":
        save_pretrained(model, tmp_path)
        loaded = from_pretrained(tmp_path)
    else:
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.eval()(x).last_hidden_state, expected)
