import math

import pytest
import torch

from sparsenlp.train import accuracy, agreement, cosine_similarity, kl_divergence, predict


def test_metrics_on_known_logits():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [3.0, 1.0], [0.0, 1.0]])
    reference = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert accuracy(logits, torch.tensor([0, 1, 1, 1])) == 0.75
    assert agreement(logits, reference) == 0.75
    assert cosine_similarity(2 * reference, reference) == pytest.approx(1.0)
    assert cosine_similarity(-reference, reference) == pytest.approx(-1.0)
    assert kl_divergence(logits, logits + 5) == pytest.approx(0.0, abs=1e-6)
    certain, even = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert kl_divergence(even, certain) == pytest.approx(math.log(2))


def test_predict_keeps_the_order_and_the_mode(make_model, make_data):
    model, data = make_model().train(), make_data(20)
    logits = predict(model, data, batch_size=6)
    assert model.training
    model.eval()
    with torch.no_grad():
        alone = torch.cat([model(**data.batch([i])).logits for i in range(20)])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


def test_predict_in_bfloat16_is_close_and_returns_float32(make_model, make_data):
    model, data = make_model(), make_data(20)
    low = predict(model, data, dtype=torch.bfloat16)
    assert low.dtype == torch.float32
    assert not torch.equal(low, predict(model, data))
    torch.testing.assert_close(low, predict(model, data), atol=0.02, rtol=0.02)


def test_predict_refuses_other_dtypes(make_model, make_data):
    with pytest.raises(ValueError, match=r"expected dtype float32 or bfloat16, got torch.int8"):
        predict(make_model(), make_data(2), dtype=torch.int8)
