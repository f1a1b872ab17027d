import pytest
import torch

from sparsenlp.prune import masked_layers, sparsity_of
from sparsenlp.train import PruningConfig
from sparsenlp.train.gradual import GradualPruner

MAGNITUDE = PruningConfig(criterion="magnitude", scope="local", update_every=3, sparsity=0.75)


@pytest.mark.parametrize("ramp_fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [2, 3, 20])
def test_the_last_step_trains_with_the_final_masks(make_model, ramp_fraction, steps):
    model = make_model()
    config = PruningConfig(criterion="magnitude", scope="local", ramp_fraction=ramp_fraction, sparsity=0.75)
    pruner = GradualPruner(model, config, steps)
    for step in range(steps):
        pruner.before_step(step)
    assert sparsity_of(model) == pruner.sparsity == pytest.approx(0.75, abs=1e-3)


def test_a_step_can_be_undone(make_model):
    model = make_model()
    pruner = GradualPruner(model, MAGNITUDE, 20)
    for step in range(6):
        pruner.before_step(step)
    masks = {name: layer.weight != 0 for name, layer in masked_layers(model).items()}
    sparsity = pruner.sparsity
    pruner.before_step(6)
    assert pruner.sparsity > sparsity
    pruner.undo_step()
    assert pruner.sparsity == sparsity
    assert all(torch.equal(layer.weight != 0, masks[name]) for name, layer in masked_layers(model).items())
    pruner.before_step(7)
    pruner.undo_step()
    assert pruner.sparsity == sparsity, "nothing was due, so there is nothing to undo"


def test_one_step_is_too_few(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="gradual pruning: expected at least 2 training steps, got 1"):
        GradualPruner(model, MAGNITUDE, 1)
    assert not masked_layers(model)
