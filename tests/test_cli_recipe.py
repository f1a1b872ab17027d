"""`sparsenlp prune --recipe`: tiny models and texts, whole commands."""

import json
from dataclasses import dataclass
from math import prod

import pytest
import torch
from tiny_bert import save_tiny_bert, write_table
from typer.testing import CliRunner

import sparsenlp
from sparsenlp import convert
from sparsenlp.allocation import Allocation, Option
from sparsenlp.cli import app
from sparsenlp.cli.prune import PLACES
from sparsenlp.prune import Block, LayerTarget
from sparsenlp.recipe import Recipe

pytest.importorskip("pydantic", reason="recipes need pydantic")
yaml = pytest.importorskip("yaml", reason="recipes need PyYAML")

QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(autouse=True)
def settings():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("recipes")
    save_tiny_bert(directory / "model")
    save_tiny_bert(directory / "encoder", head=False)
    write_table(directory / "train.csv")
    write_table(directory / "test.csv", 32, seed=1)
    return directory


@pytest.fixture
def make(files, tmp_path):
    """Writes a recipe for the tiny model: everything measured is off, one epoch."""

    def write(model="model", **sections):
        data = {"train": str(files / "train.csv"), "test": str(files / "test.csv")}
        content = {"model": str(files / model), "convert": {"measure": "off"}, "data": data}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content | sections), encoding="utf-8")
        return path

    return write


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def failure(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0].removeprefix("sparsenlp: ")


def record_of(directory):
    return json.loads((directory / "sparsenlp.json").read_text())


ONE_EPOCH = {"epochs": 1, "batch_size": 8, "update_every": 1}


def test_a_recipe_runs_and_travels_with_the_checkpoint(make, tmp_path):
    path = make("encoder", finetune={"epochs": 1, "batch_size": 8}, recover=ONE_EPOCH, target="sparsity 0.5")
    result = succeed("prune", "--recipe", path, tmp_path / "out")
    assert "fine-tuning the dense model first: the model has no trained classification head" in result.stderr
    content = yaml.safe_load(path.read_text())
    record = record_of(tmp_path / "out")
    assert record["recipe"] == content
    digest = Recipe.of(content).sha256
    assert record["recipe_sha256"] == digest
    assert json.loads((tmp_path / "out" / "config.json").read_text())["recipe_sha256"] == digest
    model = sparsenlp.from_pretrained(tmp_path / "out")
    assert model.config.recipe_sha256 == digest
    sparse = [row["name"] for row in record["plan"]["rows"] if row["chosen"] != "dense"]
    assert [name for name, layer in model.named_modules() if isinstance(layer, sparsenlp.SparseLinear)] == sparse
    assert sparse


def test_a_recipe_in_json_of_the_checkpoint_repeats_the_run(make, tmp_path):
    succeed("prune", "--recipe", make(recover=ONE_EPOCH, target="sparsity 0.5"), tmp_path / "out")
    again = tmp_path / "again.yaml"
    again.write_text(json.dumps(record_of(tmp_path / "out")["recipe"]))
    succeed("prune", "--recipe", again, tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert files[0] == files[1]


def test_options_are_a_recipe_too(files, tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Unmeasured(convert.SparsifyConfig):
        measure: str = "off"

    monkeypatch.setattr(convert, "SparsifyConfig", Unmeasured)
    options = ("--data", files / "train.csv", "--sparsity", "0.5", "--epochs", "1", "--batch-size", "8")
    succeed("prune", files / "model", tmp_path / "out", *options, "--tokens", "4", "--finetune-epochs", "1")
    assert record_of(tmp_path / "out")["recipe"] == {
        "model": str(files / "model"),
        "data": {"train": str(files / "train.csv")},
        "prune": {"sparsity": 0.5},
        "recover": {"epochs": 1, "batch_size": 8},
        "finetune": {"epochs": 1, "batch_size": 8, "when": "always"},
        "convert": {"token_counts": [4]},
    }


def test_the_help_shows_the_defaults_of_the_code():
    from typer.main import get_command

    shown = {parameter.name: parameter.default for parameter in get_command(app).commands["prune"].params}
    recipe = Recipe.of({"model": "m", "data": {"train": "t.csv"}})
    for option, (place, *_) in PLACES.items():
        section, _, name = place.rpartition(".")
        if shown[option] is None:
            continue
        of = {"prune": recipe.recovery(), "recover": recipe.recovery(), "": recipe, "data": recipe.data}[section]
        value = getattr(of, name)
        if value is not None:
            assert str(value) == str(shown[option]), option


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "0.5"], "recipe: expected no other options of pruning, got --sparsity"),
        (["--finetune-epochs", "1"], "recipe: expected no other options of pruning, got --finetune-epochs"),
        (["more"], "recipe: expected OUTPUT alone, as the recipe says the model, got "),
    ],
)
def test_a_recipe_stands_alone(make, tmp_path, arguments, message):
    assert failure("prune", "--recipe", make(), tmp_path / "out", *arguments).startswith(message)


def test_a_recipe_is_changed_by_the_command_line(make, files, tmp_path):
    path = make(recover=ONE_EPOCH, target="sparsity 0.5")
    succeed("prune", "--recipe", path, "--set", "target=sparsity 0.25", "--set", "seed=1", tmp_path / "out")
    record = record_of(tmp_path / "out")
    assert record["recipe"] == yaml.safe_load(path.read_text()) | {"target": "sparsity 0.25", "seed": 1}
    rows = [row for row in record["plan"]["rows"] if ".encoder." in row["name"]]
    sizes = [prod(row["shape"]) for row in rows]
    zeros = sum(size * row["sparsity"] for size, row in zip(sizes, rows, strict=True))
    assert zeros / sum(sizes) == pytest.approx(0.25, abs=0.01)
    message = failure("prune", files / "model", tmp_path / "out", "--set", "seed=1")
    assert message == "set: expected --recipe beside it, got none"


def test_a_recipe_needs_an_output(make):
    assert failure("prune", "--recipe", make()).startswith("recipe: expected OUTPUT alone")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"prune": {"pattern": "5x1"}},
            f"prune_: {QUERY}: 5x1: expected a shape divisible by blocks of 5x1, got 32x32",
        ),
        (
            {"prune": {"layers": ["h.*.mlp"]}},
            "prune.layers: expected layers of BertForSequenceClassification, as bert.",
        ),
        (
            {"prune": {"layer_targets": {"h.0": {"pattern": "8x1", "sparsity": 0.5}}}},
            "prune_layers_: expected h.0 to be an nn.Linear, got no such module",
        ),
        (
            {"structured": [{"kind": "layers", "layers": [7]}], "recover": {"hidden_weight": 0}},
            "remove_layers_: expected layers from 0 to 1, got 7",
        ),
        ({"finetune": {"when": "never"}, "model": "encoder"}, "finetune.when: expected needed or always, as the model"),
        ({"recover": {"epochs": 0}}, "{recipe}: recover.epochs: expected at least 1, got 0"),
    ],
)
def test_a_recipe_for_another_architecture_is_refused_before_training(make, files, tmp_path, sections, message):
    path = make(sections.pop("model", "model"), **sections)
    assert failure("prune", "--recipe", path, tmp_path / "out").startswith(message.replace("{recipe}", str(path)))
    assert not (tmp_path / "out").exists()


def test_structures_go_before_weights(make, tmp_path):
    structured = [{"kind": "layers", "layers": [0]}, {"kind": "neurons", "fraction": 0.5, "criterion": "taylor"}]
    recover = ONE_EPOCH | {"hidden_weight": 0}
    path = make(structured=structured, recover=recover, target="sparsity 0.5")
    result = succeed("prune", "--recipe", path, tmp_path / "out")
    assert "removed 1 of 2 layers" in result.stderr
    assert "removed 32 of 64 neurons" in result.stderr
    model = sparsenlp.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 1
    assert model.config.intermediate_size == 32
    assert [removal["kind"] for removal in record_of(tmp_path / "out")["removals"]] == ["layers", "neurons"]


def test_structures_alone(make, tmp_path):
    structured = [{"kind": "neurons", "fraction": 0.5}]
    path = make(structured=structured, prune={"sparsity": 0}, recover=ONE_EPOCH)
    result = succeed("prune", "--recipe", path, tmp_path / "out")
    assert "are zero" not in result.stdout
    model = sparsenlp.from_pretrained(tmp_path / "out")
    assert model.config.intermediate_size == 32
    assert not any(isinstance(module, sparsenlp.SparseLinear) for module in model.modules())


def test_only_the_named_layers_are_pruned(make, tmp_path):
    path = make(prune={"layers": ["*.attention.self.*"], "sparsity": 0.5}, recover=ONE_EPOCH)
    succeed("prune", "--recipe", path, tmp_path / "out")
    rows = record_of(tmp_path / "out")["plan"]["rows"]
    assert {".attention.self." in row["name"] for row in rows if row["sparsity"] > 0} == {True}


@pytest.mark.parametrize("solver", ["prune", "sparsegpt", "exact_obs", "wanda"])
def test_one_shot_of_a_classifier(make, tmp_path, solver):
    path = make(one_shot={"solver": solver}, target="sparsity 0.5")
    succeed("prune", "--recipe", path, tmp_path / "out")
    record = record_of(tmp_path / "out")
    assert record["quality"]["sparse"]["examples"] == 32
    zeros = [row["sparsity"] for row in record["plan"]["rows"] if row["sparsity"] > 0]
    assert sum(zeros) / len(zeros) == pytest.approx(0.5, abs=0.05)


def test_one_shot_of_a_language_model(files, tmp_path, make, monkeypatch):
    import transformers
    from tiny_bert import BAD, GOOD, make_tokenizer

    tokenizer = make_tokenizer(transformers)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    sides = ([" ".join(GOOD + BAD)] * 40, [" ".join(BAD)] * 40)
    monkeypatch.setattr("sparsenlp.data.news_articles", lambda seed: sides)
    path = make(
        str(tmp_path / "llama"),
        data={"task": "news_articles"},
        one_shot={"solver": "sparsegpt", "windows": 8, "test_windows": 5, "length": 16},
        target="sparsity 0.5",
    )
    result = succeed("prune", "--recipe", path, tmp_path / "out")
    dense = record_of(tmp_path / "out")["quality"]["dense"]
    assert f"{dense['perplexity']:.1f}" in result.stdout
    assert dense["tokens"] == 5 * 15
    assert record_of(tmp_path / "out")["quality"]["sparse"]["perplexity"] > 1


def test_rounds_until_the_accuracy_drops(make, tmp_path):
    rounds = {"sparsities": [0.5, 0.75], "growing": ONE_EPOCH, "recovering": ONE_EPOCH}
    path = make(rounds=rounds, target="accuracy drop <= 100 points")
    result = succeed("prune", "--recipe", path, tmp_path / "out")
    assert "rounds ended: all sparsities reached" in result.stderr
    rounds = record_of(tmp_path / "out")["rounds"]
    assert [round(r["sparsity"], 2) for r in rounds["rounds"]] == [0.5, 0.75]


def test_a_drop_that_cannot_be_kept(make, tmp_path, monkeypatch):
    values = iter([0.9, 0.9, 0.5])
    monkeypatch.setattr("sparsenlp.train.accuracy", lambda *_: next(values))
    rounds = {"sparsities": [0.5], "growing": ONE_EPOCH, "recovering": ONE_EPOCH}
    path = make(rounds=rounds, target="accuracy drop <= 1 point")
    result = invoke("prune", "--recipe", path, tmp_path / "out")
    assert result.exit_code == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last == (
        "sparsenlp: target: expected a round that keeps 89.0%, of 90.0% before, got none; "
        "the best was 50.0% at 50.0% zeros"
    )


def test_a_target_of_time_gives_each_layer_its_sparsity(files, make, tmp_path, monkeypatch):
    asked = []

    def allocate(model, target, inputs, criterion, statistics, loss, patterns, filter_fn=None):
        asked.append((target.kind, tuple(inputs["input_ids"].shape), criterion, sorted(statistics), loss, patterns))
        return Allocation({QUERY: Option(LayerTarget(Block(8, 1), 0.75), 0.0, 0.0)})

    monkeypatch.setattr("sparsenlp.recipe.calibrate.allocate_to_target", allocate)
    path = make(recover=ONE_EPOCH, target="2x faster", convert={"measure": "off", "token_counts": [64]})
    result = succeed("prune", "--recipe", path, tmp_path / "out")
    ((kind, shape, criterion, layers, loss, patterns),) = asked
    assert (kind, shape, criterion, loss, patterns) == ("speedup", (2, 32), "taylor", None, (Block(8, 1),))
    assert len(layers) == 12
    record = record_of(tmp_path / "out")
    assert record["layer_targets"] == {QUERY: {"pattern": "8x1", "sparsity": 0.75}}
    assert {row["name"]: row["sparsity"] for row in record["plan"]["rows"]}[QUERY] == 0.75
    assert "times as fast as the dense model, for 2x faster" in result.stdout


def test_a_target_of_time_is_not_measured_again_when_a_run_goes_on(make, tmp_path, monkeypatch):
    """Other sparsities would make another run, whose recovery could not go on from the state of the first."""
    asked = []

    def allocate(*_, **options):
        asked.append(options)
        return Allocation({QUERY: Option(LayerTarget(Block(8, 1), 0.75), 0.0, 0.0)})

    def stop(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsenlp.recipe.calibrate.allocate_to_target", allocate)
    path = make(recover=ONE_EPOCH, target="2x faster")
    with monkeypatch.context() as patch:
        patch.setattr("sparsenlp.train.recover", stop)
        result = invoke("prune", "--recipe", path, tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr.strip().splitlines()[-1].endswith("run the same command again to go on from there")
    kept = tmp_path / "out" / "work" / "layer_targets.json"
    whole = kept.read_bytes()
    for broken in (b"{", b"[]", b"{}", b"[" * 100_000, whole.replace(b"0.75", b"0.95")):
        kept.write_bytes(broken)
        with monkeypatch.context() as patch:
            patch.setattr("sparsenlp.train.recover", stop)
            result = invoke("prune", "--recipe", path, tmp_path / "out")
        assert result.exit_code == 130
        assert "layer_targets.json is not used, choosing again" in " ".join(result.stderr.split())
        assert kept.read_bytes() == whole
    asked.clear()
    succeed("prune", "--recipe", path, tmp_path / "out")
    assert not asked
    assert record_of(tmp_path / "out")["layer_targets"] == {QUERY: {"pattern": "8x1", "sparsity": 0.75}}
    assert not (tmp_path / "out" / "work").exists()


def test_the_target_is_an_option_too(files, tmp_path):
    options = ("--data", files / "train.csv", "--test", files / "test.csv", "--target")
    message = failure("prune", files / "model", tmp_path / "out", *options, "fast")
    assert message.startswith('target: expected "2x faster"')
    message = failure("prune", files / "model", tmp_path / "out", *options, "2x faster", "--sparsity", "0.5")
    assert message == "sparsity: expected none beside target, got one"
    message = failure("prune", files / "model", tmp_path / "out", "--target", "2x faster")
    assert message.startswith("target: expected a sparsity with one_shot, got 2x faster")
