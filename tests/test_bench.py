"""The benchmarks run, and their numbers agree with each other. How fast anything is, is not tested."""

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

BENCH = Path(__file__).parent.parent / "bench"


def run(output, *options):
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(BENCH / "bsr_linear.py"), "--quick", "--output", str(output), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return result, json.loads((output / "bsr_linear.json").read_text("utf-8")) if not result.returncode else None


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench")
    result, record = run(output)
    assert result.returncode == 0, result.stderr
    assert "reached" in result.stdout
    for name in ("speedup", "break_even", "scaling"):
        assert (output / f"bsr_linear_{name}.png").stat().st_size > 10_000
    return record


@pytest.fixture
def bench_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def sparse(record, part):
    return [row for row in record["results"] if row["part"] == part and row["dtype"]]


def test_record_says_what_it_was_measured_on(record):
    assert {"cpu", "isa", "cores", "torch", "sparsenlp"} <= record["machine"].keys()
    assert all(row["limits"]["read_bytes"] > 0 for row in record["results"])


def test_every_cell_has_its_baselines_and_every_dtype(record):
    cells = {(row["tokens"], row["sparsity"]) for row in sparse(record, "targets")}
    assert cells == {(m, sparsity) for m in (1, 128) for sparsity in (0.5, 0.9)}
    for cell in cells:
        rows = [row for row in sparse(record, "targets") if (row["tokens"], row["sparsity"]) == cell]
        assert {row["name"] for row in rows} == {"f32 8x1", "bf16 8x2", "int8 8x4"}
        assert all({"torch fp32", "torch bf16"} <= row["speedup"].keys() for row in rows)
    names = {row["name"] for row in sparse(record, "blocks")}
    assert {"f32 1x1", "f32 4x1", "f32 16x16", "f32 32x32", "bf16 8x1"} <= names


def test_rates_follow_from_times(record):
    for row in record["results"]:
        seconds = row["seconds"]
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
        group = ("part", "shape", "tokens", "threads")
        dense = {
            r["name"]: r["seconds"]["median"]
            for r in record["results"]
            if not r["dtype"] and [r[key] for key in group] == [row[key] for key in group]
        }
        assert row["best_dense"] == min(dense, key=lambda name: dense[name])
        if row["dtype"]:
            rows, columns = row["shape"]
            stored = row["flops"] * seconds["median"] / (2 * row["tokens"])
            assert stored / (rows * columns) == pytest.approx(1 - row["sparsity"], rel=0.1)
            if (row["block"], row["isa_cap"]) == ({"f32": "8x1", "bf16": "8x2", "int8": "8x4"}[row["dtype"]], ""):
                assert row["time_over_default_block"] == 1


def test_targets_follow_from_the_cells(record):
    assert {target["title"].split()[0] for target in record["targets"]} == {"f32", "bf16", "int8"}
    for target in record["targets"]:
        worst = target["min"] if target["at_least"] else -target["max"]
        bound = target["target"] if target["at_least"] else -target["target"]
        assert target["min"] <= target["max"]
        assert target["reached"] == (worst >= bound)
    title = "f32 8x1, M >= 128, x torch fp32"
    found = {(t["sparsity"], t["cells"], t["min"]) for t in record["targets"] if t["title"] == title}
    expected = {
        (r["sparsity"], 1, r["speedup"]["torch fp32"])
        for r in sparse(record, "targets")
        if (r["name"], r["tokens"]) == ("f32 8x1", 128)
    }
    assert found == expected


def test_scaling_and_real_layers(record):
    points = {(row["axis"], row["dtype"], row["tokens"]) for row in record["scaling"]}
    few = {("few tokens", "int8", m) for m in (1, 8, 9)}
    assert {("tokens", "f32", 64), ("nonzeros", "bf16", 128)} | few <= points
    assert len(record["real"]) == 2
    for row in record["real"]:
        low, high = row["row_density"]["min"], row["row_density"]["max"]
        assert low < row["density"] < high, "magnitude leaves rows uneven"
        assert row["time_over_uniform"] > 0


def test_exponents_of_known_growth(bench_modules):
    from scaling import exponents

    def point(tokens, seconds):
        about = {"axis": "tokens", "dtype": "f32", "threads": 1, "tokens": tokens}
        return about | {"seconds": {"median": seconds}}

    (fit,) = exponents([point(m, 3e-6 * m**2) for m in (16, 100, 512)])
    assert fit["exponent"] == pytest.approx(2)
    (fit,) = exponents([point(m, 4.0 + m) for m in (1, 4)])
    assert fit["worst"] == pytest.approx(5 / 2)


def test_model_directory(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(save_tiny_bert(tmp_path / "dense", head=False))
    prune_(model, Block(8, 1), 0.8)
    sparsify_(finalize_(model), SparsifyConfig(measure="off"))
    save_pretrained(model, tmp_path / "sparse")
    result, record = run(tmp_path, "--only", "real", "--model", str(tmp_path / "sparse"))
    assert result.returncode == 0, result.stderr
    assert [row["layer"] for row in record["real"]] == [f"encoder.layer.0.attention.self.{x}" for x in ("query", "key")]
    assert all(row["density"] == pytest.approx(0.2, abs=0.01) for row in record["real"])
    result, _ = run(tmp_path, "--only", "real", "--model", str(tmp_path / "dense"))
    assert result.returncode == 1
    assert "bench: --model: expected a model with sparse layers, got none" in result.stderr


def test_peers_are_checked(bench_modules):
    import peers

    x, weight, bias = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
    right = torch.nn.functional.linear(x, weight, bias)
    peers.check({"some fp32": lambda: [right.numpy()], "some int8": lambda: {"y": 1.01 * right}}, weight, bias, x)
    with pytest.raises(AssertionError, match="some fp32: expected an error of at most 1e-05"):
        peers.check({"some fp32": lambda: [1.01 * right.numpy()]}, weight, bias, x)


def test_each_step_is_warmed_by_itself(bench_modules):
    from harness import warmed

    calls = []
    steps = warmed({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, pause=1e-4)
    for step in steps.values():
        step()
    assert (list(steps), calls) == (["warm: a", "a", "warm: b", "b"], ["a", "a", "b", "b"])


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "zentorch", "deepsparse"])
def test_peer(engine, bench_modules):
    import peers

    if engine in (missing := peers.missing()):
        pytest.skip(missing[engine])
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((16, 64), (32, 64), (32,)))
    build = peers.sparse_peers if engine == "deepsparse" else peers.dense_peers
    steps = build(weight, bias, x, 1)
    assert f"{engine} fp32" in steps
    y = steps[f"{engine} fp32"]()
    y = y.numpy() if isinstance(y, torch.Tensor) else next(iter(y.values() if hasattr(y, "values") else y))
    np.testing.assert_allclose(y, torch.nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_records_keep_five_digits(bench_modules, tmp_path):
    from harness import write_record

    write_record(tmp_path / "record.json", rows=[{"a": 0.000123456789, "b": [1 / 3, 0.0, -2.0]}, {"n": 1234567}])
    record = json.loads((tmp_path / "record.json").read_text("utf-8"))
    assert record["rows"] == [{"a": 0.00012346, "b": [0.33333, 0.0, -2.0]}, {"n": 1234567}]


@pytest.fixture(scope="module")
def nm_record(tmp_path_factory):
    pytest.importorskip("matplotlib")
    output = tmp_path_factory.mktemp("nm_bench")
    command = [sys.executable, str(BENCH / "nm_linear.py"), "--quick", "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (output / "nm_linear.png").stat().st_size > 10_000
    return json.loads((output / "nm_linear.json").read_text(encoding="utf-8"))


def test_nm_cells_have_their_baselines(nm_record):
    for tokens in (1, 128):
        names = {r["name"] for r in nm_record["results"] if r["tokens"] == tokens}
        assert {"torch fp32", "torch bf16", "2:4 fp32", "2:4 bf16"} <= names
        assert ("own dense bf16" in names) == (tokens == 1)


def test_nm_rates_follow_from_times(nm_record):
    for result in nm_record["results"]:
        seconds = result["seconds"]
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
        cell = [r for r in nm_record["results"] if all(r[key] == result[key] for key in ("tokens", "threads", "shape"))]
        medians = {r["name"]: r["seconds"]["median"] for r in cell if r["name"] in result["speedup"]}
        assert result["best_dense"] == min(medians, key=lambda name: medians[name])
        if "flops" in result:
            rows, columns = result["shape"]
            stored = result["flops"] * seconds["median"] / (2 * result["tokens"])
            assert stored / (rows * columns) == pytest.approx(0.5, rel=1e-3)
            bits = 8 * result["bytes_per_second"] * seconds["median"] / stored
            assert bits == pytest.approx({"2:4 fp32": 34, "2:4 bf16": 18}[result["name"]], rel=1e-3)


@pytest.mark.parametrize("op", ["add_layer_norm", "embed_layer_norm"])
def test_bench_of_norms(op, tmp_path):
    command = [sys.executable, str(BENCH / f"{op}.py"), "--quick", "--threads", "1", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / f"{op}.json").read_text("utf-8"))["results"]
    assert [row["dtype"] for row in rows] == ["fp32", "bf16"]
    for row in rows:
        moved = row["bytes_per_second"] * row["seconds"][op]["median"]
        assert moved == pytest.approx(3 * 32 * 384 * (4 if row["dtype"] == "fp32" else 2), rel=1e-3)
        assert row["speedup"]["p20"] <= row["speedup"]["median"] <= row["speedup"]["p80"]


@pytest.mark.parametrize(
    ("op", "dtypes", "baselines", "expected", "within"),
    [
        ("sparse_ffn", ["f32", "bf16", "int8"], {"torch", "two bsr_linear"}, 0.1 * 2 * 32 * 2 * 384 * 1536, 0.1),
        ("dense_attention", ["f32", "bf16"], {"torch", "compiled"}, 4 * 12 * 32 * 32 * 32, 1e-3),
        (
            "block_sparse_attention",
            ["f32", "bf16"],
            {"torch", "torch, mask", "FlexAttention"},
            15 * 4 * 12 * 64 * 64 * 64,
            1e-3,
        ),
    ],
)
def test_bench_of_layer_parts(op, dtypes, baselines, expected, within, tmp_path):
    command = [sys.executable, str(BENCH / f"{op}.py"), "--quick", "--threads", "1", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / f"{op}.json").read_text("utf-8"))["results"]
    assert [row["dtype"] for row in rows] == dtypes
    for row in rows:
        operations = row["flops"] * row["seconds"][op]["median"]
        assert operations == pytest.approx(expected, rel=within)
        assert row["speedup"].keys() == baselines
        assert all(r["p20"] <= r["median"] <= r["p80"] for r in row["speedup"].values())


def test_decode(tmp_path):
    pytest.importorskip("transformers", reason="the model comes from transformers")
    command = [sys.executable, str(BENCH / "decode.py"), "--quick", "--random", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "decode.json").read_text(encoding="utf-8"))
    assert record["model"] == "SmolLM2-135M, random weights"
    rows = {row["name"]: row for row in record["results"]}
    assert list(rows) == ["dense", "dense, fused", "80%", "80%, sparse head"]
    dense = rows["dense"]
    assert dense["bytes"] == {"layers": 212405760, "head": 56623104}
    for row in rows.values():
        seconds = row["seconds"]
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
        moved = sum(row["bytes"].values()) / seconds["median"]
        assert row["share_of_bandwidth"] == pytest.approx(moved / row["limits"]["read_bytes"], rel=1e-3)
    indexed = 1 + 1 / 16  # four bytes of index to a block of 64
    assert rows["80%"]["bytes"]["layers"] == pytest.approx(0.2 * indexed * dense["bytes"]["layers"], rel=0.01)
    assert rows["80%"]["bytes"]["head"] == dense["bytes"]["head"] > 4 * rows["80%, sparse head"]["bytes"]["head"]
    assert [t["got"] for t in record["targets"]] == [rows[n]["time_over_dense"]["median"] for n in [*rows][2:]]


def test_perplexity(tmp_path):
    pytest.importorskip("transformers")
    command = [sys.executable, str(BENCH / "perplexity.py"), "--quick", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "perplexity.json").read_text(encoding="utf-8"))
    cells = {(row["method"], row["pattern"]): row for row in record["results"]}
    methods, patterns = ("sparsegpt", "wanda", "magnitude"), ("unstructured", "2:4", "8x1")
    rest = {("dense", ""), ("exact_obs", "8x1"), ("exact_obs, first MLP dense", "8x1")}
    assert cells.keys() == rest | {(m, p) for m in methods for p in patterns}
    for row in record["results"]:
        assert row["sparsity"] == pytest.approx(0.0 if row["method"] == "dense" else 0.5, abs=0.002)
        assert 90 < row["perplexity"] < 115, "a random model of 100 tokens"
    for row in record["targets"]:
        assert row["reached"] == (row["value"] <= row["target"])
    assert "sparsegpt 2:4, perplexity" in {row["title"] for row in record["targets"]}


def test_own_models_are_trained_pruned_and_timed(tmp_path):
    pytest.importorskip("transformers", reason="the models are models of transformers")
    command = [
        sys.executable,
        str(BENCH / "own_models.py"),
        "--quick",
        "--only",
        "textcnn",
        "seq2seq",
        "--seconds",
        "0",
    ]
    command += ["--output", str(tmp_path), "--records", str(tmp_path / "runs")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "own_models.json").read_text("utf-8"))
    assert [row["model"] for row in record["results"]] == ["textcnn", "seq2seq"]
    for row in record["results"]:
        assert row["sparsity"] == pytest.approx(0.8, abs=0.02)
        assert row["converted"] == pytest.approx(row["pruned"], abs=1e-4), "conversion changes nothing"
        assert [(cell["batch"], cell["tokens"]) for cell in row["latency"]] == [(1, 8), (32, 8)]
        for cell in row["latency"]:
            assert cell["sparse_layers"]
            assert cell["seconds"].keys() == {"eager fp32", "eager bf16", "dynamic int8", "sparse"}
    assert record["results"][0]["dense"]["accuracy"] == 1
    assert len(record["targets"]) == 4
    assert {path.parent.name for path in (tmp_path / "runs").glob("*/result.json")} == {"textcnn", "seq2seq"}
