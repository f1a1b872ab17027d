import pytest
import torch

from sparsenlp.train import CachedTeacher
from sparsenlp.train.distill import LiveTeacher, hidden_state_loss, make_teacher, soft_target_loss


def test_the_cache_holds_what_the_model_gives(make_model, make_data):
    model, data = make_model(), make_data(20)
    cached, live = CachedTeacher(model, data), LiveTeacher(model, data, hidden=True)
    indices = [7, 0, 13]
    inside = data.batch(indices)["attention_mask"].bool()
    expected_logits, expected_states = live.outputs(indices)
    logits, states = cached.outputs(indices)
    torch.testing.assert_close(logits, expected_logits, atol=0.02, rtol=0.02)
    assert len(states) == len(expected_states) == 2
    for state, expected in zip(states, expected_states, strict=True):
        assert state.dtype == torch.bfloat16
        torch.testing.assert_close(state[inside].float(), expected[inside].float(), atol=0.05, rtol=0.05)


def test_too_large_a_cache_is_not_made(make_model, make_data):
    model, data = make_model(), make_data(8)
    needed = sum(data.lengths) * 2 * 32 * 2 / 2**30
    assert isinstance(make_teacher(model, data, True, cache_gib=needed * 1.01), CachedTeacher)
    assert isinstance(make_teacher(model, data, True, cache_gib=needed * 0.99), LiveTeacher)
    assert make_teacher(model, data, False, cache_gib=1.0).outputs([0])[1] == []


def test_hidden_states_that_are_not_one_per_token_are_refused(make_model, make_data):
    """As those of Canine, which reads characters and thinks in groups of four."""
    model, data = make_model(), make_data(8)
    forward = model.forward

    def grouped(**inputs):
        output = forward(**inputs)
        output.hidden_states = tuple(state[:, ::4] for state in output.hidden_states or ())
        return output

    model.forward = grouped
    with pytest.raises(ValueError, match=r"hidden_weight: expected 0 for BertFor.*states that are not one per token"):
        LiveTeacher(model, data, hidden=True).outputs([0, 1])
    assert LiveTeacher(model, data, hidden=False).outputs([0])[1] == []


def test_hidden_state_loss_is_relative_and_skips_padding():
    teacher = [torch.full((1, 3, 2), 2.0), torch.full((1, 3, 2), 100.0)]
    states = [torch.full((1, 3, 2), 1.0), torch.full((1, 3, 2), 100.0)]
    states[0][:, 2] = 1e6
    mask = torch.tensor([[1, 1, 0]])
    assert hidden_state_loss(states, teacher, mask).item() == pytest.approx((0.25 + 0.0) / 2)


def test_hidden_state_loss_refuses_other_layers():
    state = torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match="hidden_state_loss: expected states like the teacher's"):
        hidden_state_loss([state], [state, state], torch.ones(1, 3))


def test_soft_target_loss_is_the_divergence_at_a_temperature():
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    assert soft_target_loss(student, teacher, 2.0).item() == pytest.approx((p * (p / q).log()).sum().item())
    assert soft_target_loss(teacher, teacher, 2.0).item() == pytest.approx(0.0, abs=1e-7)
