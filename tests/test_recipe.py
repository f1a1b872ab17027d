import json
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from torch import nn

from sparsenlp import SparsifyConfig
from sparsenlp.models.own import TOKEN_PRUNING
from sparsenlp.prune import NM, Block, LayerTarget, prunable
from sparsenlp.recipe import Recipe, load_recipe
from sparsenlp.recipe.config import PRUNING, hidden
from sparsenlp.train import FinetuneConfig, IncrementalConfig, PruningConfig, RecoveryConfig

yaml = pytest.importorskip("yaml", reason="recipes need PyYAML")
schema = pytest.importorskip("sparsenlp.recipe.schema", reason="recipes need pydantic")

EXAMPLES = sorted(Path(__file__).parent.parent.glob("examples/*.yaml"))
SMALLEST = {"model": "some", "data": {"train": "train.csv"}}
DEFAULT = IncrementalConfig()
PHASES = {name: replace(getattr(DEFAULT, name), sparsity=DEFAULT.sparsities[-1]) for name in ("growing", "recovering")}
ROUNDS = replace(DEFAULT, **PHASES)
"""What rounds are by default; the sparsity of a phase is that of its round."""

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def refused(content):
    with pytest.raises(ValueError, match=r".") as error:
        schema.validate(content)
    assert "\n" not in str(error.value)
    return str(error.value)


def with_section(name, section):
    return SMALLEST | {name: section}


# defaults


def test_what_is_left_out_has_the_default_of_the_configuration():
    recipe = Recipe.of(SMALLEST)
    schema.validate(SMALLEST)
    assert recipe.recovery() == RecoveryConfig()
    assert recipe.incremental() == ROUNDS
    assert recipe.convert == SparsifyConfig()
    for field in fields(FinetuneConfig):
        assert getattr(recipe.finetune, field.name) == getattr(FinetuneConfig(), field.name)


def test_an_empty_section_has_the_defaults_too():
    sections = ("finetune", "prune", "recover", "convert")
    assert Recipe.of(SMALLEST | {name: {} for name in sections}).recovery() == RecoveryConfig()
    rounds = Recipe.of(with_section("rounds", {"growing": {}, "recovering": {}}))
    assert rounds.incremental() == ROUNDS
    partly = Recipe.of(with_section("rounds", {"growing": {"epochs": 2}})).incremental()
    assert partly.growing.epochs == 2
    assert partly.growing.learning_rate == IncrementalConfig().growing.learning_rate


@pytest.mark.parametrize(
    ("section", "cls"),
    [
        ("finetune", FinetuneConfig),
        ("recover", RecoveryConfig),
        ("rounds", IncrementalConfig),
        ("convert", SparsifyConfig),
    ],
)
def test_a_section_has_the_fields_of_its_configuration(section, cls):
    names = {field.name for field in fields(cls)} - hidden(cls)
    defaults = {
        name: value
        for name in names
        if isinstance(value := getattr(cls(), name), int | float | str) and not isinstance(value, bool)
    }
    schema.validate(with_section(section, defaults))
    assert "nonsense" in refused(with_section(section, {"nonsense": 1}))


def test_every_field_of_pruning_is_in_the_section_prune():
    assert set(PRUNING) <= {field.name for field in fields(PruningConfig)}
    assert set(PRUNING) <= set(schema.model_of(type(Recipe.of(SMALLEST).prune)).model_fields)


def test_values_reach_the_configurations():
    content = {
        "model": "some",
        "data": {"train": "train.csv"},
        "seed": 3,
        "prune": {"pattern": "2:4", "sparsity": 0.5, "criterion": "wanda"},
        "recover": {"epochs": 7, "betas": [0.8, 0.9], "relations": ["keys"]},
        "convert": {"token_counts": [1, 2], "blocks": [[8, 1]], "precisions": ["int8"]},
    }
    schema.validate(content)
    recipe = Recipe.of(content)
    recovery = recipe.recovery()
    assert (recovery.pattern, recovery.sparsity, recovery.criterion) == (NM(2, 4), 0.5, "wanda")
    assert (recovery.epochs, recovery.betas, recovery.relations, recovery.seed) == (7, (0.8, 0.9), ("keys",), 3)
    assert recovery.scope == "row", "without a scope that of the criterion"
    assert recipe.convert == SparsifyConfig(token_counts=(1, 2), blocks=((8, 1),), precisions=("int8",))


def test_a_head_is_pruned_where_it_is_named():
    model = nn.ModuleDict({"lstm": nn.LSTM(8, 8), "dense": nn.Linear(8, 8), "lm_head": nn.Linear(8, 8)})

    def chosen(*layers):
        rule = Recipe.of(with_section("prune", {"layers": layers})).prune
        return list(prunable(model, rule.filter_fn(model)))

    assert chosen("*") == ["lstm.ih_l0", "lstm.hh_l0", "dense"]
    assert chosen("lstm.*", "lm_head") == ["lstm.ih_l0", "lstm.hh_l0", "lm_head"]
    with pytest.raises(ValueError, match=r"prune.layers: expected layers of ModuleDict, as lstm.ih_l0, got lm_\*"):
        chosen("lm_*")


def test_recovery_of_models_that_predict_tokens():
    recover = dict(TOKEN_PRUNING["recover"])
    config = Recipe.of(
        SMALLEST | {"prune": {"sparsity": 0.7}, "recover": recover | {"label_weight": 0.3}}
    ).token_recovery
    assert (config.sparsity, config.label_weight, config.learning_rate) == (0.7, 0.3, recover["learning_rate"])
    for name, value in (("hidden_weight", 1.0), ("spliced", 0.5), ("rewind", True), ("int8_fraction", 0.1)):
        recipe = Recipe.of(with_section("recover", recover | {name: value}))
        with pytest.raises(
            ValueError, match=rf"recover.{name}: expected .* for a model that predicts tokens, got {value}"
        ):
            recipe.token_recovery  # noqa: B018


def test_layers_may_have_targets_of_their_own():
    targets = {"a.b": {"pattern": "4x1", "sparsity": 0.5}}
    content = with_section("prune", {"layer_targets": targets})
    schema.validate(content)
    assert Recipe.of(content).recovery().layer_targets == {"a.b": LayerTarget(Block(4, 1), 0.5)}


def test_a_model_may_have_defaults_of_its_own():
    own = {"prune": {"sparsity": 0.8, "pattern": "4x1"}, "recover": {"epochs": 7, "learning_rate": 1e-2}}
    said = SMALLEST | {"prune": {"pattern": "8x1"}, "recover": {"epochs": 2}}
    recipe = Recipe.of(said).with_defaults(own)
    recovery = recipe.recovery()
    assert (recovery.sparsity, recovery.pattern) == (0.8, Block(8, 1))
    assert (recovery.epochs, recovery.learning_rate) == (2, 1e-2)
    assert recipe.sha256 == Recipe.of(said).sha256
    for other in ({"target": "2x faster"}, {"rounds": {}}, {"one_shot": {}}):
        Recipe.of(SMALLEST | other).with_defaults(own)


def test_targets():
    assert Recipe.of(SMALLEST | {"target": "sparsity 0.8"}).recovery().sparsity == 0.8
    assert Recipe.of(SMALLEST | {"target": "2x faster"}).allocates
    dropping = Recipe.of(SMALLEST | {"target": "accuracy drop <= 1 point"})
    assert dropping.in_rounds
    assert dropping.incremental(0.8).least_metric == 0.8


# what is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": {"train": "x"}}, "model: expected a value, got none"),
        (SMALLEST | {"model": 3}, "model: expected text, got 3"),
        (with_section("recover", {"epochs": "three"}), 'recover.epochs: expected an integer, got "three"'),
        (with_section("recover", {"epochs": 2.5}), "recover.epochs: expected an integer, got 2.5"),
        (with_section("recover", {"epochs": None}), "recover.epochs: expected an integer, got null"),
        (with_section("recover", {"rewind": 1}), "recover.rewind: expected true or false, got 1"),
        (with_section("recover", {"learning_rate": "fast"}), 'recover.learning_rate: expected a number, got "fast"'),
        (with_section("recover", [1]), "recover: expected a mapping, got [1]"),
        (with_section("convert", {"token_counts": 5}), "convert.token_counts: expected a list, got 5"),
        (with_section("recover", {"epochs": 0}), "recover.epochs: expected at least 1, got 0"),
        (with_section("prune", {"sparsity": 1.0}), "prune.sparsity: expected a fraction from 0 to below 1, got 1.0"),
        (with_section("prune", {"sparsity": 0}), "prune.sparsity: expected more than 0 where nothing is removed"),
        (with_section("prune", {"pattern": "8by1"}), 'prune.pattern: expected "unstructured", "8x1"'),
        (with_section("prune", {"criterion": "luck"}), "prune.criterion: expected one of magnitude,"),
        (with_section("convert", {"token_counts": []}), "convert: expected token_counts of at least 1, got ()"),
        (with_section("finetune", {"when": "now"}), "finetune.when: expected 'needed', 'always' or 'never', got"),
        (with_section("data", {"task": "imdb"}), "data.task: expected 'rotten_tomatoes', 'supersense', 'word_def"),
        (with_section("data", {}), "data: expected either task or train, got neither"),
        (with_section("data", {"task": "supersense", "train": "x"}), "data: expected either task or train, got both"),
        (with_section("data", {"train": "x", "count": 5}), "data.count: expected none beside train, got one"),
        (with_section("data", {"task": "rotten_tomatoes", "path": "x"}), "data.path: expected none beside task"),
        (
            SMALLEST | {"structured": [{"kind": "heads"}]},
            "structured.0: expected either fraction or layers, got neither",
        ),
        (SMALLEST | {"structured": [{"kind": "rows", "fraction": 0.5}]}, "structured.0.kind: expected 'heads',"),
        (SMALLEST | {"target": "fast"}, 'target: expected "2x faster", "latency <= 8 ms"'),
        (SMALLEST | {"target": "2x", "prune": {"sparsity": 0.5}}, "prune.sparsity: expected none beside target"),
        (SMALLEST | {"target": "drop <= 1 point", "recover": {}}, "target: expected a drop with rounds alone"),
        (SMALLEST | {"recover": {}, "rounds": {}}, "recover: expected one of recover, rounds and one_shot, got"),
        ({"model": "some"}, "data: expected some for recover, got none"),
        ({"model": "some", "one_shot": {}, "prune": {"criterion": "taylor"}}, "prune.criterion: expected labelled"),
        (SMALLEST | {"prune": {"pattern": "2:4"}}, "sparsity: expected at most 0.5 for 2:4, got 0.9"),
        (SMALLEST | {"rounds": {}, "prune": {"pattern": "2:4"}}, "sparsity: expected at most 0.5 for 2:4, got 0.95"),
        (SMALLEST | {"structured": [{"kind": "layers", "layers": [1]}]}, "recover: expected hidden_weight 0 where"),
        ({"model": "some", "data": {"task": "news_articles"}}, "one_shot: expected it for a language model"),
        ({"model": "some", "one_shot": {"solver": "sparsegpt"}}, "data: expected some for sparsegpt, got none"),
        (
            SMALLEST | {"one_shot": {"solver": "exact_obs"}, "prune": {"pattern": "2:4", "sparsity": 0.5}},
            "prune.pattern: expected blocks such as 8x1 for exact_obs, got 2:4",
        ),
        (
            SMALLEST | {"one_shot": {"solver": "exact_obs", "block_size": 64}},
            "one_shot.block_size: expected none beside solver exact_obs, got one",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(content, message):
    assert refused(content).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SMALLEST | {"modle": "x"}, "modle: expected a known key such as model, got modle"),
        (with_section("recover", {"epoch": 1}), "recover.epoch: expected a known key such as epochs, got epoch"),
        (with_section("recover", {"pattern": "8x1"}), "recover.pattern: expected a known key such as prune.pattern,"),
        (with_section("prune", {"xyzzy": 1}), "prune.xyzzy: expected one of pattern, sparsity, criterion, scope,"),
        (
            SMALLEST | {"rounds": {"growing": {"epohcs": 1}}},
            "rounds.growing.epohcs: expected a known key such as epochs",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known(content, message):
    assert refused(content).startswith(message)


def test_several_problems_are_counted():
    assert refused(with_section("recover", {"epochs": "x", "seed": 1})).endswith("(and 1 more)")


# YAML


def test_plain_text_is_read_as_yaml_1_2():
    content = schema.parse("a: 2:4\nb: 3e-4\nc: no\nd: [true, null, 08, -1.5, ~]\ne: 1x\nf:\ng: '5'\nh: 2x faster")
    assert content == {
        "a": "2:4",
        "b": 3e-4,
        "c": "no",
        "d": [True, None, 8, -1.5, None],
        "e": "1x",
        "f": None,
        "g": "5",
        "h": "2x faster",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "expected YAML, got "),
        ("- model", "expected a mapping with the key model, got "),
        ("", "expected a mapping with the key model, got null"),
        ("model: a\nmodel: b", "the key model twice"),
        ("1: a", "the key 1, no text"),
        ("model: !!python/name:os.system", "expected YAML, got "),
        ("model: !!set {a, b}", "expected YAML, got could not determine a constructor"),
        ("model: !!timestamp x", "expected YAML, got could not determine a constructor"),
        ("model: &a [*a]", "expected text, numbers, lists and mappings, got an alias of what it stands in, in line 1"),
        ("&a model: {b: *a, c: *d}", "found undefined alias"),
        (BOMB, "got more than 16,384 values or 32 levels of them in line 5"),
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 99)), "32 levels of them in line 31"),
        ("[" * 3000, "32 levels of them in line 1"),
        ("\n".join(" " * i + "a:" for i in range(99)), "32 levels of them in line 32"),
        ("- " * 3000, "32 levels of them in line 1"),
        ("a: [" + "b," * 20_000 + "]", "more than 16,384 values"),
        ("seed: " + "9" * 5000, "got an integer of more than 64 bits, 99999999999999999999..."),
        ("seed: 9223372036854775808", "got an integer of more than 64 bits, 9223372036854775808..."),
        ("a: 1e999", "got a number that is not finite, 1e999"),
        ("a: !!bool ''", "got '' tagged as bool"),
        ("a: !!bool maybe", "got 'maybe' tagged as bool"),
    ],
)
def test_text_that_is_no_recipe(text, message):
    with pytest.raises(ValueError, match=r".") as error:
        schema.parse(text)
    assert message in str(error.value)


def test_an_alias_repeats_what_it_names():
    text = "model: m\nprune:\n  layer_targets:\n    a: &a {pattern: 4x1, sparsity: 0.5}\n    b: *a\n"
    targets = {"pattern": "4x1", "sparsity": 0.5}
    assert schema.parse(text)["prune"] == {"layer_targets": {"a": targets, "b": targets}}
    assert schema.parse("a: [-9223372036854775808, 9223372036854775807]") == {"a": [-(2**63), 2**63 - 1]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            with_section("convert", {"token_counts": [16, 10**12]}),
            "convert.token_counts: expected at most 1,000,000, got",
        ),
        (with_section("convert", {"blocks": [[2**62, 1]]}), "convert.blocks: expected at most 1,000,000, got"),
        (with_section("recover", {"spliced": 1e9}), "recover.spliced: expected at most 100, got 1000000000.0"),
        (with_section("rounds", {"growing": {"epochs": 10**9}}), "rounds.growing.epochs: expected at most 10,000, got"),
        (with_section("prune", {"pattern": "9" * 99 + "x1"}), 'prune.pattern: expected "unstructured", "8x1"'),
        (with_section("prune", {"layers": ["*a" * 9999]}), "prune.layers: expected text of at most 4,096 characters"),
        (SMALLEST | {"\ud800": 1}, "expected Unicode text, got a lone surrogate"),
        (SMALLEST | {"model": "a\ud800"}, "model: expected Unicode text, got a lone surrogate"),
    ],
)
def test_absurd_sizes_are_refused(content, message):
    assert refused(content).startswith(message)


def test_a_file_that_is_no_recipe_is_refused_before_it_is_read(tmp_path):
    long = write(tmp_path / "long.yaml", "model: m\n" + "#" * 2**17)
    with pytest.raises(ValueError, match=r"long\.yaml: expected at most 131,072 bytes, got 131,081"):
        load_recipe(long)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ValueError, match=r"pipe\.yaml: expected a regular file, got a pipe"):
        load_recipe(tmp_path / "pipe.yaml")
    with pytest.raises(IsADirectoryError, match="recipe: cannot read"):
        load_recipe(tmp_path)


def test_a_file_is_named_in_errors(tmp_path):
    path = write(tmp_path / "r.yaml", "model: a\ndata: {train: t.csv}\nrecover: {epochs: 0}\n")
    with pytest.raises(ValueError, match="expected") as error:
        load_recipe(path)
    assert str(error.value) == f"{path}: recover.epochs: expected at least 1, got 0"
    with pytest.raises(FileNotFoundError, match=r"recipe: cannot read .*absent\.yaml"):
        load_recipe(tmp_path / "absent.yaml")


def test_changes_take_the_place_of_what_the_file_says(tmp_path):
    text = "model: m\ndata: {train: t.csv}\ntarget: sparsity 0.9\nrecover: {epochs: 2, batch_size: 8}\n"
    path = write(tmp_path / "r.yaml", text)
    changes = ["target=sparsity 0.8", "seed=1", "recover.epochs=5", "prune.pattern=2:4", "convert.token_counts=[1, 2]"]
    with pytest.raises(ValueError, match=r"sparsity: expected at most 0.5 for 2:4, got 0.8"):
        load_recipe(path, changes)
    changed = load_recipe(path, [*changes, "prune.pattern=4x1", "data.text_column= title = x"])
    recovery = changed.recovery()
    assert (recovery.sparsity, recovery.seed, recovery.epochs, recovery.batch_size) == (0.8, 1, 5, 8)
    assert (recovery.pattern, changed.convert.token_counts) == (Block(4, 1), (1, 2))
    assert changed.data.text_column == "title = x"
    plain = write(tmp_path / "plain.yaml", yaml.safe_dump(dict(changed.content)))
    assert load_recipe(plain).sha256 == changed.sha256 != load_recipe(path).sha256


def test_a_change_fills_an_empty_section(tmp_path):
    path = write(tmp_path / "r.yaml", "model: m\ndata: {train: t.csv}\nrecover:\n")
    assert load_recipe(path, ["recover.epochs=5"]).recovery().epochs == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed", "expected a change such as recover.epochs=5, got seed"),
        ("=1", "expected a change such as recover.epochs=5, got =1"),
        ("recover.=1", "expected a change such as recover.epochs=5, got recover.=1"),
        ("model.size=1", 'model: expected a mapping to change, got "m"'),
        ("recover.epochs=many", 'recover.epochs: expected an integer, got "many"'),
        ("recover.epoch=1", "recover.epoch: expected a known key such as epochs, got epoch"),
        ("seed=[", "expected YAML, got "),
        ("a." * 2000 + "a=1", "expected a change such as recover.epochs=5, got a.a."),
    ],
)
def test_changes_that_are_refused(tmp_path, change, message):
    path = write(tmp_path / "r.yaml", "model: m\ndata: {train: t.csv}\n")
    with pytest.raises(ValueError, match="expected") as error:
        load_recipe(path, [change])
    assert str(error.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("package", ["pydantic", "yaml"])
def test_a_missing_package_takes_one_line(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "sparsenlp.recipe.schema")
    with pytest.raises(ModuleNotFoundError, match=rf"package {package}, got none; pip install 'sparsenlp\[recipes\]'"):
        load_recipe(tmp_path / "r.yaml")


# round trip and hash


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid_and_make_the_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    again = load_recipe(write(tmp_path / "again.yaml", yaml.safe_dump(dict(recipe.content))))
    from_json = Recipe.of(json.loads(json.dumps(recipe.content)))
    assert recipe == again == from_json
    assert recipe.sha256 == again.sha256 == from_json.sha256
    assert recipe.recovery().sparsity == 0.9


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} >= {"rotten_tomatoes", "supersense"}


def test_the_hash_is_of_the_content_alone(tmp_path):
    first = "model: m\ndata: {train: t.csv}\nrecover: {epochs: 2, batch_size: 8}\n"
    same = "# a comment\nrecover:\n  batch_size: 8  # another\n  epochs: 2\n\ndata:\n  train: 't.csv'\nmodel: m\n"
    other = first.replace("epochs: 2", "epochs: 3")
    spelt_out = first + "seed: 0\n"
    digests = [load_recipe(write(tmp_path / "r.yaml", text)).sha256 for text in (first, same, other, spelt_out)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert all(len(digest) == 64 for digest in digests)
