import copy

import pytest
import torch
import torch.nn.functional as F

from sparsenlp import SparsifyConfig, sparsify_
from sparsenlp.data.batches import TokenizedDataset
from sparsenlp.data.token_labels import predicted_windows
from sparsenlp.layers import SparseLinear
from sparsenlp.prune import Block, finalize_, prune_, sparsity_of
from sparsenlp.train import FinetuneConfig
from sparsenlp.train.sequences import SequenceRecoveryConfig, recover_sequences, token_logits, train_sequences

pytest.importorskip("transformers")

from sparsenlp.models.lstm_lm import LstmForCausalLM, LstmLmConfig
from sparsenlp.models.rnn_seq2seq import RnnForConditionalGeneration, RnnSeq2SeqConfig

FAST = {"epochs": 12, "batch_size": 8, "learning_rate": 2e-2, "bf16": False}


def reversals():
    """Sources of 2 to 4 tokens; targets are the same backwards, with an end token."""
    torch.manual_seed(1)
    sources = [torch.randint(3, 8, (length,)).tolist() for length in [2, 3, 4] * 16]
    columns = {"input_ids": sources, "labels": [[*source[::-1], 2] for source in sources]}
    return TokenizedDataset(columns, torch.full((48,), -100), {"input_ids": 0, "labels": -100})


def seq2seq(cell="gru", targets=8):
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "decoder_vocab_size": targets, "embedding_size": 16, "hidden_size": 16, "dropout": 0.0}
    return RnnForConditionalGeneration(RnnSeq2SeqConfig(cell=cell, **sizes)).eval()


def language_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "embedding_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "dropout": 0.0}
    return LstmForCausalLM(LstmLmConfig(**sizes)).eval()


def counting():
    """Windows in which each token is the one before plus one."""
    return predicted_windows((torch.arange(48)[:, None] + torch.arange(6)) % 8)


CASES = [(seq2seq, reversals), (language_model, counting)]


@pytest.mark.parametrize(("make", "texts"), CASES, ids=["seq2seq", "language model"])
def test_tokens_are_learnt_and_survive_pruning(make, texts):
    """Trained, pruned while the dense model teaches, converted: sparse layers give what the masked ones give."""
    model, data = make(), texts()
    batch = data.batch(range(len(data)))
    log = train_sequences(model, data, FinetuneConfig(**FAST, dropout=False), quiet=True)
    assert log.losses[-1] < 0.5 * log.losses[0]
    student = copy.deepcopy(model)
    config = SequenceRecoveryConfig(pattern=Block(4, 1), sparsity=0.6, update_every=4, **FAST)
    recovered = recover_sequences(student, model, data, config, quiet=True)
    assert len(recovered.losses) == len(log.losses)
    finalize_(student)
    one_shot = copy.deepcopy(model)
    prune_(one_shot, Block(4, 1), 0.6)
    losses = [F.cross_entropy(*token_logits(one, batch)) for one in (student, one_shot)]
    assert losses[0] < 0.5 * losses[1]
    assert sparsity_of(student) == pytest.approx(0.6, abs=0.03)
    before = token_logits(student, batch)[0]
    sparsify_(student, SparsifyConfig(blocks=((4, 1),), min_sparsity=0.0, measure="off"))
    assert any(isinstance(module, SparseLinear) for module in student.modules())
    torch.testing.assert_close(token_logits(student, batch)[0], before, rtol=1e-4, atol=1e-4)
    inputs = batch["input_ids"][1:3, :2]
    sparse = student.generate(inputs, max_new_tokens=4, num_beams=2)
    assert torch.equal(sparse, student.generate(inputs, max_new_tokens=4, num_beams=2, use_cache=False))


@pytest.mark.parametrize(("make", "texts"), CASES, ids=["seq2seq", "language model"])
def test_logits_are_of_labelled_tokens(make, texts):
    model, batch = make(), texts().batch([0, 1])
    logits, labels = token_logits(model, batch)
    output = model(**batch)
    torch.testing.assert_close(F.cross_entropy(logits, labels), output.loss)
    assert len(labels) == (7 if make is seq2seq else 10)


def test_the_loss_weighs_labels_and_teacher():
    student, teacher, data = seq2seq(), seq2seq("lstm"), reversals()
    (logits, labels), (target, _) = (token_logits(model, data.batch([0, 1])) for model in (student, teacher))
    weights = {"label_weight": 0.3, "distill_weight": 2.0, "temperature": 2.0}
    divergence = (target / 2).softmax(-1) * ((target / 2).log_softmax(-1) - (logits / 2).log_softmax(-1))
    expected = 0.3 * F.cross_entropy(logits, labels) + 2 * divergence.sum(-1).mean()
    pair = TokenizedDataset({name: rows[:2] for name, rows in data.columns.items()}, data.labels[:2], data.pad_values)
    config = SequenceRecoveryConfig(**weights, pattern=Block(4, 1), epochs=2, update_every=10)
    log = recover_sequences(student, teacher, pair, config, quiet=True)
    assert log.losses[0] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("make", "texts"), CASES, ids=["seq2seq", "language model"])
def test_a_criterion_that_looks_at_inputs(make, texts):
    """Those of an encoder-decoder have two lengths, and padding in one batch of two."""
    model, data = make(), texts()
    columns = {name: rows[:6] for name, rows in data.columns.items()}
    few = TokenizedDataset(columns, data.labels[:6], data.pad_values)
    config = SequenceRecoveryConfig(
        pattern=Block(4, 1), sparsity=0.5, criterion="wanda", scope="local", update_every=1, epochs=2, batch_size=3
    )
    recover_sequences(model, copy.deepcopy(model), few, config, quiet=True)
    assert sparsity_of(model) == pytest.approx(0.5, abs=0.03)


def test_errors():
    data = reversals()
    bare = TokenizedDataset({"input_ids": data.columns["input_ids"]}, data.labels, {"input_ids": 0})
    with pytest.raises(ValueError, match="data: expected a column labels, got input_ids"):
        train_sequences(seq2seq(), bare)
    with pytest.raises(ValueError, match=r"teacher: expected logits of shape \(3, 8\), got \(3, 9\)"):
        recover_sequences(seq2seq(), seq2seq(targets=9), data)
    with pytest.raises(ValueError, match="loss weights: expected none negative and one positive"):
        SequenceRecoveryConfig(label_weight=0, distill_weight=0)
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        SequenceRecoveryConfig(temperature=0)
