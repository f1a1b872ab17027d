import itertools

import pytest
import torch

pytest.importorskip("transformers")

from sparsenlp.models.rnn_seq2seq import RnnForConditionalGeneration, RnnSeq2SeqConfig

SOURCE = torch.tensor([[3, 1, 4, 1, 5], [6, 5, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
TARGET = torch.tensor([[3, 4, 3, 2], [4, 2, -100, -100]])


def tiny(**kwargs):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "decoder_vocab_size": 5, "embedding_size": 6, "hidden_size": 8, "num_hidden_layers": 2}
    return RnnForConditionalGeneration(RnnSeq2SeqConfig(**{**sizes, **kwargs})).eval()


@pytest.fixture(params=[("gru", None), ("gru", "luong"), ("lstm", "bahdanau")], ids=str)
def model(request):
    cell, attention = request.param
    return tiny(cell=cell, attention=attention)


def test_padding_changes_nothing(model):
    both = model(SOURCE, MASK, decoder_input_ids=TARGET.relu())
    alone = model(SOURCE[1:, :3], decoder_input_ids=TARGET.relu()[1:])
    torch.testing.assert_close(both.logits[1:], alone.logits)
    other = SOURCE.masked_fill(MASK == 0, 9)
    assert torch.equal(model(other, MASK, decoder_input_ids=TARGET.relu()).logits, both.logits)


def test_labels_are_shifted_behind_the_start():
    model = tiny()
    output = model(SOURCE, MASK, labels=TARGET)
    fed = torch.tensor([[1, 3, 4, 3], [1, 4, 2, 0]])
    torch.testing.assert_close(output.logits, model(SOURCE, MASK, decoder_input_ids=fed).logits)
    log_p = output.logits.log_softmax(-1)
    kept = [log_p[i, j, TARGET[i, j]] for i, j in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]]
    torch.testing.assert_close(output.loss, -torch.stack(kept).mean())


@pytest.mark.parametrize("attention", ["luong", "bahdanau"])
def test_attention_by_hand(attention):
    model = tiny(attention=attention)
    output = model(SOURCE, MASK, labels=TARGET, output_attentions=True, output_hidden_states=True)
    part, h = model.decoder.attention, output.encoder_last_hidden_state[1]
    s = output.decoder_hidden_states[-1][1, 2]
    if attention == "luong":
        scores = [s @ part.query.weight.T @ h[j] for j in range(3)]
    else:
        scores = [part.score @ (part.query.weight @ s + part.key.weight @ h[j]).tanh() for j in range(3)]
    weights = torch.stack(scores).softmax(dim=0)
    torch.testing.assert_close(output.cross_attentions[1, 2], torch.cat([weights, torch.zeros(2)]))
    read = (part.output.weight @ torch.cat([weights @ h[:3], s])).tanh()
    torch.testing.assert_close(output.logits[1, 2], model.lm_head(read))


def test_greedy_decoding(model):
    generated = model.generate(SOURCE, attention_mask=MASK, max_new_tokens=6)
    for i, length in enumerate((5, 3)):
        ids = [1]
        while len(ids) < 7 and ids[-1] != 2:
            ids.append(
                int(model(SOURCE[i : i + 1, :length], decoder_input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            )
        assert generated[i, : len(ids)].tolist() == ids


@pytest.mark.parametrize("length_penalty", [0.0, 2.0])
def test_beam_search_finds_the_best_of_all(length_penalty):
    """With as many beams as there are prefixes; scores are log-probabilities over length ** length_penalty."""
    model, steps = tiny(), 2
    targets = torch.tensor([*itertools.product(range(5), repeat=steps)])
    fed = torch.cat([torch.ones(len(targets), 1, dtype=torch.long), targets[:, :-1]], dim=1)
    log_p = model(SOURCE[:1].expand(len(targets), -1), decoder_input_ids=fed).logits.log_softmax(-1)
    log_p = log_p.gather(2, targets[..., None])[..., 0]
    scores = {}
    for ids, row in zip(targets.tolist(), log_p, strict=True):
        length = ids.index(2) + 1 if 2 in ids else steps
        scores[(*ids[:length],)] = row[:length].sum().item() / length**length_penalty
    found = model.generate(
        SOURCE[:1], max_new_tokens=steps, num_beams=5, length_penalty=length_penalty, early_stopping=False
    )
    ids = found[0, 1:].tolist()
    assert tuple(ids[: ids.index(2) + 1] if 2 in ids else ids) == max(scores, key=scores.get)


def test_saved_and_loaded(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded = RnnForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(SOURCE, MASK, labels=TARGET).loss, model(SOURCE, MASK, labels=TARGET).loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected input_ids or encoder_outputs, got neither"),
        ({"input_ids": SOURCE}, "expected decoder_input_ids or labels, got neither"),
        ({"input_ids": SOURCE[0], "labels": TARGET}, r"input_ids: expected ids \(B, T\) .*, got shape \(5,\)"),
        ({"input_ids": SOURCE, "attention_mask": MASK.flip(1)}, "attention_mask: expected padding on the right"),
        ({"input_ids": SOURCE, "attention_mask": 0 * MASK}, "attention_mask: expected padding on the right"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny()(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cell": "rnn"}, "cell: expected one of gru, lstm, got rnn"),
        ({"attention": "dot"}, "attention: expected None or one of luong, bahdanau, got dot"),
        ({"hidden_size": 7}, "hidden_size: expected an even number for two directions, got 7"),
    ],
)
def test_configurations_that_make_no_model(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)
