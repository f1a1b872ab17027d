from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsenlp.train import masked_perplexity, perplexity


class Bigram(nn.Module):
    """The logits of the next token depend on this one alone; or, masked, those of a token on what is there."""

    def __init__(self, logits):
        super().__init__()
        self.table = nn.Parameter(logits)

    def forward(self, input_ids, output_hidden_states=False):
        assert not self.training
        return SimpleNamespace(logits=self.table[input_ids])


def windows(count=6, length=10):
    return torch.randint(0, 5, (count, length), generator=torch.Generator().manual_seed(0))


def test_perplexity_by_hand():
    """Token 0 is followed by 0 with probability 3/4, and here by 0, 0 and 1."""
    model = Bigram(torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log())
    expected = (4 / 3 * 4 / 3 * 4) ** (1 / 3)
    assert perplexity(model, torch.tensor([[0, 0, 0, 1]])) == pytest.approx(expected, rel=1e-6)
    assert model.training, "the mode is as before"


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model = Bigram(torch.zeros(5, 5))
    assert perplexity(model, windows()) == pytest.approx(5, rel=1e-5)
    assert masked_perplexity(model, windows(), mask_token_id=4) == pytest.approx(5, rel=1e-5)


def test_batches_do_not_matter():
    model = Bigram(torch.randn(5, 5))
    assert perplexity(model, windows(), batch_size=1) == pytest.approx(perplexity(model, windows(), batch_size=4))
    assert perplexity(model, windows(), bf16=True) == pytest.approx(perplexity(model, windows()), rel=0.05)


def test_masked_perplexity_by_hand():
    """Behind the mask (token 3) the model bets 8/10 on token 1, which all of them are; elsewhere it knows nothing."""
    logits = torch.zeros(4, 4)
    logits[3] = torch.tensor([1.0, 8.0, 0.5, 0.5]).log()
    ids = torch.ones(3, 10, dtype=torch.int64)
    assert masked_perplexity(Bigram(logits), ids, mask_token_id=3) == pytest.approx(10 / 8, rel=1e-5)


def test_what_is_masked_depends_on_the_seed_alone():
    model = Bigram(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))
    first = masked_perplexity(model, windows(), 4)
    assert first == pytest.approx(masked_perplexity(model, windows(), 4, batch_size=1))
    assert first != masked_perplexity(model, windows(), 4, seed=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: perplexity(m, torch.zeros(3, 1).long()), r"perplexity: expected windows \(W, L\) of at least 2"),
        (lambda m: perplexity(m, torch.zeros(3).long()), r"got shape \(3,\)"),
        (lambda m: perplexity(Bigram(m.table / 0), windows()), "perplexity: expected finite logits, got a loss of nan"),
        (lambda m: masked_perplexity(m, windows(), 4, fraction=0.0), r"expected a fraction in \(0, 1\], got 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(Bigram(torch.zeros(5, 5)))
