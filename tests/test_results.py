"""lab/experiments.py, lab/results.py, lab/bench.py: runs, their records, the results page."""

import json
import re

import pytest
import torch

from lab import bench, experiments, results

TINY = (
    "python -m lab.train --data mqar --n_layer 1 --d_model 16 --n_rows 4 "
    "--k_rows 2 --context 16 --batch_size 2 --eval_every 2 --eval_tokens 64"
)


def test_missing_runs_are_run_once(monkeypatch, tmp_path):
    """They wait for the sweep and use its best rate. A failed run leaves no line."""
    sweep = experiments.Group(TINY, {"paper": "", "b": "--n_rows 8"}, ("1e-3", "2e-3"), ("1",))
    best = sweep._replace(rates="rates", seeds=("1", "2"))
    ran = []

    def run(name, command):
        ran.append(name)
        if "broken" in name:
            raise RuntimeError("it is broken")
        nats = 1.0 if "2e-3" in command else 2.0
        return {"name": name, "command": command, "seconds": 1, "result": {"nats": nats}}

    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs.jsonl")
    monkeypatch.setattr(experiments, "GROUPS", {"rates": sweep, "recall": best})
    monkeypatch.setattr(experiments, "EVALUATIONS", {"pairs": ("recall", "--recall")})
    monkeypatch.setattr(experiments, "run", run)
    experiments.main(["recall", "pairs"])
    assert ran == []  # they wait for the sweep
    experiments.main([])
    swept = [f"rates/{model}_{rate}_1" for model in ("paper", "b") for rate in sweep.rates]
    rest = [f"{model}_2e-3_{seed}" for model in ("paper", "b") for seed in "12"]
    assert ran == [*swept, *(f"recall/{run}" for run in rest), *(f"pairs/{run}" for run in rest)]
    assert list(experiments.read_runs()) == ran
    experiments.GROUPS["broken"] = experiments.Group(TINY, {"broken": ""}, ("1e-3",), ("1",))
    with pytest.raises(SystemExit, match="1 failed"):
        experiments.main([])
    assert list(experiments.read_runs()) == ran[:-1]


def test_run_and_its_evaluation(monkeypatch, tmp_path):
    """The line of a training run, and of an evaluation of its last checkpoint."""
    monkeypatch.setattr(experiments, "OUT", str(tmp_path / "out"))
    command = f"{TINY} --lr 1e-3 --seed 1 --max_steps 3"
    line = experiments.run("recall/a", command)
    assert line["command"] == command and line["versions"]["torch"] == torch.__version__
    result = line["result"]
    assert result["tokens"] == 3 * 2 * 16 and result["parameters"] > 1000
    assert result["nats"] > 0 and [step for step, _ in result["validation"]] == [2, 3]
    evaluate = f"python -m lab.evaluate {tmp_path}/out/recall/a/last.pt --recall"
    assert experiments.run("pairs/a", evaluate)["results"][0]["pairs"] == 4
    with pytest.raises(RuntimeError, match="n_rows"):
        experiments.run("recall/b", f"{command} --n_rows 0")


def test_page_matches_the_raw_results():
    """A loss quoted elsewhere (2.345) must be on it, and every result from a run of the list."""
    page = results.PAGE.read_text(encoding="utf-8")
    done = experiments.read_runs()
    assert results.fill(page, done) == page
    assert "| " not in results.fill(page, {})
    assert "mamba2" not in str(experiments.runs_of("routing", done))  # it has no rows
    groups = [*experiments.GROUPS, *experiments.EVALUATIONS]
    commands = [c for group in groups for c in experiments.runs_of(group, done).values()]
    assert [name for name, line in done.items() if line["command"] not in commands] == []
    for name in ("README.md", "docs/memory.md"):
        text = (experiments.ROOT / name).read_text(encoding="utf-8")
        losses = re.findall(r"(?<![\d.])[234]\.\d{3}(?!\d)", text)
        assert [loss for loss in losses if loss not in page] == []


@pytest.mark.parametrize("name", bench.BENCHES)
def test_bench_writes_a_line_for_each_shape(name, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SCANS", [(2, 64, 8, 32)])
    monkeypatch.setattr(bench, "SHAPE", {"d_model": 64, "n_layer": 1, "n_rows": 16, "k_rows": 4})
    monkeypatch.setattr(bench, "TOKENS", 64)
    monkeypatch.setattr(bench, "TRAIN_CONTEXTS", (64,))
    monkeypatch.setattr(bench, "GENERATE_CONTEXTS", (64, 128))
    monkeypatch.setattr(bench, "TURNS", {name: 1})
    out = tmp_path / "bench.jsonl"
    bench.main([name, "--out", str(out)])
    for line in map(json.loads, out.read_text().splitlines()):
        assert line["bench"] == name and min(line["seconds"].values()) > 0
        if name == "generate":
            sizes = line["state_bytes"]
            assert sizes["paper"] == 16 * 64 * 4  # m d numbers
            assert sizes["transformer"] == 2 * 64 * line["context"] * 4  # keys and values


def test_bench_refuses_to_time_a_wrong_scan(tmp_path, monkeypatch):
    right = bench.fmem.scan_chunked
    monkeypatch.setattr(bench.fmem, "scan_chunked", lambda *a: (1.001 * right(*a)[0], None))
    with pytest.raises(SystemExit, match="wrong by"):
        bench.main(["train", "--out", str(tmp_path / "bench.jsonl")])
    assert not list(tmp_path.iterdir())
