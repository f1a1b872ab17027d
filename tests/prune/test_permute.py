from __future__ import annotations

import copy

import pytest
import torch
from structured_cases import FAMILIES, assert_unchanged, model_of, output_of, snapshot
from tiny_encoders import TEXT, build, torch_encoder
from torch import nn

from sparsenlp.models.encoders import fuse_encoders_
from sparsenlp.models.structure import is_conv1d, layer_stack
from sparsenlp.prune import NM, Block, Unstructured, local_masks, permute_, prune_, remove_heads_

PATTERNS = [Block(8, 1), Block(4, 2), Block(1, 8), Block(4, 4)]


def squares(model):
    return {
        name: (module.weight.t() if is_conv1d(module) else module.weight).detach().square()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_conv1d(module)
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_function_stays(family, pattern):
    model = model_of(family).double()
    if "vit" in family or "deit" in family:
        model.forward = lambda pixel_values, forward=model.forward: forward(pixel_values.double())
    expected, before = output_of(model), copy.deepcopy(model.state_dict())
    parameters = {name: id(p) for name, p in model.named_parameters()}
    report = permute_(model, squares(model), pattern, 0.8)
    torch.testing.assert_close(output_of(model), expected, rtol=1e-6, atol=1e-9)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert report.after > report.before
    assert all(row.after >= row.before for row in report.rows)


def test_kinds_of_channels():
    kinds = {family: {row.kind for row in permuted(model_of(family)).rows} for family in ("bert", "llama", "gpt2")}
    everything = {"neurons", "values", "queries"}
    assert kinds == {"bert": everything, "llama": {"neurons", "values"}, "gpt2": everything}
    assert {row.kind for row in permuted(nn.Sequential(torch_encoder())).rows} == {"neurons"}


def permuted(model, **options):
    return permute_(model, squares(model), Block(8, 1), 0.75, **options)


def test_the_report_is_what_local_masks_keep():
    model = build(TEXT["bert"])
    scores = squares(model)
    projections = [name for name in scores if name.startswith("encoder.layer") and "output" not in name]

    def share(scores):
        masks = local_masks({name: scores[name] for name in projections}, Block(8, 1), 0.75)
        total = sum(scores[name].sum() for name in projections)
        return float(sum((scores[name] * mask).sum() for name, mask in masks.items()) / total)

    before = share(scores)
    report = permute_(model, scores, Block(8, 1), 0.75)
    assert report.before == pytest.approx(before, abs=1e-5)
    assert report.after == pytest.approx(share(squares(model)), abs=1e-5)
    assert str(report).splitlines()[-1].endswith(f"{report.before:.3f} -> {report.after:.3f} of the scores kept")


def test_scores_are_taken_along():
    for family in ("llama", "gpt2", "mpnet"):
        model = model_of(family)
        scores = squares(model)
        moved = permuted(model).reorder(scores)
        torch.testing.assert_close(moved, squares(model), rtol=0, atol=0)


def planted(model):
    """Scores whose important columns are the same for eight neurons each, which stand far apart."""
    scores = {name: torch.zeros_like(s) for name, s in squares(model).items()}
    generator = torch.Generator().manual_seed(0)
    for parts in layer_stack(model).layers:
        groups = torch.randperm(64, generator=generator).view(8, 8)
        name = next(name for name, module in model.named_modules() if module is parts.ffn_inputs[0])
        for number, neurons in enumerate(groups):
            scores[name][neurons[:, None], torch.arange(4 * number, 4 * number + 4)] = 1.0
    return scores


def test_planted_groups_are_found():
    model = build(TEXT["bert"])
    report = permute_(model, planted(model), Block(8, 1), 1 - 1 / 8, kinds=["neurons"])
    assert report.before <= 0.5
    assert report.after == 1.0
    assert len(report.rows) == 2


def test_heads_stay_together():
    model = build(TEXT["minilm"])
    report = permuted(model)
    for name, (rows, columns) in report.orders.items():
        for order in (rows, columns):
            if order is not None and "attention" in name:
                assert torch.equal(order // 12, torch.arange(48) // 12)
    twelve = [row for row in report.rows if row.kind != "neurons"]
    assert all(row.before == row.after for row in twelve)  # 8 does not divide 12
    report = permute_(model, squares(model), Block(4, 1), 0.75)
    assert all(row.before < row.after for row in report.rows)


def test_the_same_again():
    orders = [permuted(model_of("llama")).orders for _ in range(2)]
    torch.testing.assert_close(orders[0], orders[1], rtol=0, atol=0)


def test_a_second_call_gains_nothing_or_more():
    model = build(TEXT["bert"])
    first = permuted(model)
    second = permuted(model)
    assert second.before == pytest.approx(first.after)
    assert second.after >= second.before


def test_layers_of_unequal_heads():
    model = remove_heads_(build(TEXT["bert"]), {0: [1]})
    expected = output_of(model)
    permuted(model)
    torch.testing.assert_close(output_of(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": NM(2, 4)}, "permute_: expected a Block pattern, got 2:4"),
        ({"sparsity": 1.0}, r"sparsity: expected a fraction of zeros in \[0, 1\), got 1.0"),
        ({"kinds": ["tails"]}, "kinds: expected one of neurons, values, queries, got tails"),
        ({"pattern": Block(3, 1)}, "permute_: encoder.layer.0.intermediate.dense: 3x1: expected a shape divisible"),
        ({"scores": {}}, r"expected scores \(64, 32\) of encoder.layer.0.intermediate.dense, got none"),
        ({"scores": "nan"}, "expected finite scores >= 0 for encoder.layer.0.intermediate.dense, got NaN"),
    ],
)
def test_errors_leave_the_model_untouched(arguments, message):
    model = build(TEXT["bert"])
    before = snapshot(model)
    scores = squares(model)
    if arguments.get("scores") == "nan":
        scores["encoder.layer.0.intermediate.dense"][0, 0] = float("nan")
        arguments = {}
    with pytest.raises(ValueError, match=message):
        permute_(**({"model": model, "scores": scores, "pattern": Block(8, 1), "sparsity": 0.5} | arguments))
    assert_unchanged(model, before)


def test_models_that_cannot_be_permuted(needs_native):
    model = build(TEXT["bert"])
    scores = squares(model)
    prune_(model, Unstructured(), 0.5)
    with pytest.raises(ValueError, match=r"permute_: expected masks burned in \(finalize_\), got a mask on encoder"):
        permute_(model, scores, Block(8, 1), 0.5)
    model = build(TEXT["bert"])
    model.encoder.layer[1].output.dense.weight = model.encoder.layer[0].output.dense.weight
    with pytest.raises(ValueError, match=r"expected weights of its own in encoder.layer.[01].output.dense"):
        permute_(model, scores, Block(8, 1), 0.5)
    model = build(TEXT["bert"])
    fuse_encoders_(model)
    with pytest.raises(ValueError, match="permute_: expected a model that is not fused"):
        permute_(model, scores, Block(8, 1), 0.5)
    with pytest.raises(ValueError, match="permute_: expected a model with one stack of layers"):
        permute_(nn.Sequential(nn.Linear(8, 8)), {}, Block(8, 1), 0.5)
