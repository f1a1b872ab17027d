import pytest
import torch

from sparsenlp.train import perplexity

pytest.importorskip("transformers")

from sparsenlp.models.lstm_lm import LstmForCausalLM, LstmLmConfig, causal_average

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def tiny(**kwargs):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "embedding_size": 6, "hidden_size": 6, "num_hidden_layers": 2, "dropout": 0.0}
    return LstmForCausalLM(LstmLmConfig(**{**sizes, **kwargs})).eval()


@pytest.fixture(params=[False, True], ids=["last layer", "attention average"])
def model(request):
    return tiny(attention_average=request.param)


def test_logits_are_those_of_torchs_lstm():
    model = tiny()
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(6, 6, 2, batch_first=True)
    for i, layer in enumerate(model.lstm.layers):
        for name, parameter in layer.named_parameters():
            getattr(lstm, name.replace("l0", f"l{i}")).data.copy_(parameter)
    expected = model.lm_head(lstm(model.embeddings(IDS))[0])
    output = model(IDS, labels=IDS, output_hidden_states=True)
    torch.testing.assert_close(output.logits, expected)
    assert [state.shape for state in output.hidden_states] == [(2, 7, 6)] * 3
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(output.loss, loss)
    assert perplexity(model, IDS) == pytest.approx(loss.exp().item())


def test_a_token_does_not_see_later_ones(model):
    changed = IDS.clone()
    changed[:, 4:] = 0
    torch.testing.assert_close(model(changed).logits[:, :4], model(IDS).logits[:, :4])
    assert not torch.allclose(model(changed).logits[:, 4:], model(IDS).logits[:, 4:])


def test_the_state_goes_on(model):
    state, parts = None, []
    for ids in IDS.split([3, 1, 3], dim=1):
        output = model(ids, state=state, use_cache=True)
        state, parts = output.state, [*parts, output.logits]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(IDS).logits)
    assert model(IDS).state is None


def test_averages_are_softmax_weighted():
    x, vector = torch.randn(1, 5, 3), torch.randn(3)
    averages, (total, last) = causal_average(x, vector)
    for t in range(5):
        weights = (x[0, : t + 1] @ vector).softmax(dim=0)
        torch.testing.assert_close(averages[0, t], weights @ x[0, : t + 1])
    torch.testing.assert_close(total, (x @ vector).logsumexp(dim=1, keepdim=True))
    torch.testing.assert_close(last, averages[:, -1])


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_streams_the_state(model, beams, monkeypatch):
    """As if all tokens were read again in each step; what the model is given is one token."""
    whole = model.generate(IDS, max_new_tokens=6, num_beams=beams, use_cache=False, do_sample=False)
    lengths, forward = [], model.forward

    def counting(input_ids, **kwargs):
        lengths.append(input_ids.shape[1])
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, num_beams=beams, do_sample=False), whole)
    assert lengths == [7, 1, 1, 1, 1, 1]


def test_sampling_follows_the_seed():
    model = tiny()
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(model.generate(IDS, max_new_tokens=6, do_sample=True, temperature=2.0))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_a_tied_model_is_saved_and_loaded(tmp_path):
    model = tiny(tie_word_embeddings=True)
    assert model.lm_head.weight is model.embeddings.weight
    model.save_pretrained(tmp_path)
    loaded = LstmForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.embeddings.weight
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_errors():
    with pytest.raises(ValueError, match="tie_word_embeddings: expected an embedding_size of 6, got 5"):
        tiny(tie_word_embeddings=True, embedding_size=5)
    with pytest.raises(ValueError, match=r"input_ids: expected ids \(B, T\) of at least one token, got shape \(2, 0\)"):
        tiny()(IDS[:, :0])
    mask = torch.ones_like(IDS)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="attention_mask: expected no padding where the state is kept"):
        tiny().generate(IDS, attention_mask=mask, max_new_tokens=2)
