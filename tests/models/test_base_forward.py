from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
from tiny_encoders import IDS, MASK, SIZES, TEXT, assert_same_tokens, build, hidden

from sparsenlp.models.base_forward import BaseForward
from sparsenlp.models.encoders import fuse_encoders_, unfuse_encoders_

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


@pytest.fixture
def class_calls(monkeypatch):
    """Names of the models whose class's forward ran."""
    seen = []
    original = BaseForward.original.fget

    def counted(self):
        seen.append(type(self.model).__name__)
        return original(self)

    monkeypatch.setattr(BaseForward, "original", property(counted))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked", [True, False])
def test_same_output_without_the_class_forward(family, masked, class_calls):
    model = build(TEXT[family])
    inputs = {"input_ids": IDS} | ({"attention_mask": MASK} if masked else {})
    with torch.no_grad():
        expected = model(**inputs)
        fuse_encoders_(model)
        got = model(**inputs)
    assert not class_calls
    assert type(got) is type(expected)
    assert list(got) == list(expected)
    real = MASK.bool() if masked else torch.ones_like(MASK, dtype=torch.bool)
    torch.testing.assert_close(got.last_hidden_state[real], expected.last_hidden_state[real], rtol=2e-5, atol=2e-5)
    if "pooler_output" in expected:
        torch.testing.assert_close(got.pooler_output, expected.pooler_output, rtol=2e-5, atol=2e-5)


def test_under_a_head(class_calls):
    model = build(TEXT["bert"], "AutoModelForSequenceClassification")
    types = torch.ones_like(IDS)
    with torch.no_grad():
        expected = model(IDS, MASK, types).logits
        fuse_encoders_(model)
        torch.testing.assert_close(model(IDS, MASK, types).logits, expected, rtol=2e-5, atol=2e-5)
    assert not class_calls


def test_the_class_forward_runs_whatever_else_is_asked(class_calls):
    model = build(TEXT["bert"])
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    positions = torch.arange(12).flip(0)[None]
    with torch.no_grad():
        flipped = model(**inputs, position_ids=positions)
        fuse_encoders_(model)
        embedded = model(inputs_embeds=model.get_input_embeddings()(IDS), attention_mask=MASK)
        assert_same_tokens(model(**inputs, position_ids=positions).last_hidden_state, flipped.last_hidden_state)
        assert isinstance(model(**inputs, return_dict=False), tuple)
        assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3
        assert len(class_calls) == 4
        model.config.output_hidden_states = True
        assert len(model(**inputs).hidden_states) == 3
        model.config.output_hidden_states = False
        seen = []
        handle = model.encoder.register_forward_hook(lambda *a: seen.append(a))
        model(**inputs)
        handle.remove()
        assert len(seen) == 1
        assert len(class_calls) == 6
        assert_same_tokens(model(**inputs).last_hidden_state, embedded.last_hidden_state)
        assert len(class_calls) == 6
    model(**inputs).last_hidden_state.sum().backward()
    assert len(class_calls) == 7


def test_copies_pickles_and_undoing():
    model = build(TEXT["bert"])
    expected = hidden(model)
    signature = inspect.signature(model.forward)
    fuse_encoders_(model)
    assert inspect.signature(model.forward) == signature
    copied = copy.deepcopy(model)
    assert copied.forward.model is copied
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.forward.model is loaded
    for other in (copied, loaded):
        assert_same_tokens(hidden(other), expected)
    unfuse_encoders_(model)
    assert "forward" not in vars(model)
    torch.testing.assert_close(hidden(model), expected)


def test_a_forward_that_somebody_replaced_stays():
    model = build(("BertConfig", SIZES))
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    mine = model.forward
    fuse_encoders_(model)
    assert model.forward is mine
    unfuse_encoders_(model)
    assert model.forward is mine
