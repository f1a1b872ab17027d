import pytest
import torch

from sparsenlp.prune import NM, Block, LayerTarget, layer_sparsity, masked_layers, prune_, sparsity_of
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


def targets_of(model):
    names = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".layer." in name
    ]
    chosen = {name: LayerTarget(Block(8, 1), 0.5 + 0.1 * (i % 3)) for i, name in enumerate(names[1:])}
    return chosen | {names[0]: LayerTarget(NM(2, 4), 0.5)}


def test_each_layer_goes_to_its_own_target(make_model):
    model = make_model()
    targets = targets_of(model)
    config = PruningConfig(criterion="magnitude", update_every=2, layer_targets=targets)
    pruner = GradualPruner(model, config, 20)
    rising = []
    for step in range(20):
        pruner.before_step(step)
        rising.append(layer_sparsity(model)[next(iter(targets))])
    assert rising == sorted(rising)
    assert 0 < rising[3] < rising[-1]
    reached = layer_sparsity(model)
    for name, target in targets.items():
        assert reached[name] == pytest.approx(target.sparsity, abs=0.01)


def test_it_goes_on_from_masks_that_are_there(make_model):
    model = make_model()
    prune_(model, Block(8, 1), 0.5)
    pruner = GradualPruner(model, MAGNITUDE, 20)
    assert pruner.sparsity == pytest.approx(0.5, abs=1e-3)
    for step in range(4):
        pruner.before_step(step)
    assert pruner.sparsity > 0.55


def test_targets_of_no_layer_are_refused(make_model):
    with pytest.raises(ValueError, match="layer_targets: expected some or None"):
        PruningConfig(layer_targets={})
    model = make_model()
    config = PruningConfig(layer_targets={"bert.nowhere": LayerTarget(Block(8, 1), 0.5)})
    with pytest.raises(ValueError, match=r"expected bert.nowhere to be an nn.Linear, got no such module"):
        GradualPruner(model, config, 20)
    assert not masked_layers(model)
