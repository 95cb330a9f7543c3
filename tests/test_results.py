"""lab/experiments.py, lab/results.py, lab/bench.py: what is run, what is kept of it and shown."""

import json
import re
from pathlib import Path

import pytest
import torch

from lab import bench, experiments, results

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "python -m lab.train --sample_tokens 0 --data mqar --n_layer 1 --d_model 16 --n_rows 4 "
    "--k_rows 2 --context 16 --batch_size 2 --log_every 1 --eval_every 2 --eval_tokens 64"
)


@pytest.fixture(autouse=True)
def results_of_the_tests(monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, "OUT", str(tmp_path / "out"))


def test_missing_runs_are_run_once(monkeypatch, tmp_path, capsys):
    """With the best rate of the sweep, which is waited for; a failed one leaves no line."""
    file = tmp_path / "runs.jsonl"
    sweep = experiments.Group(TINY, {"paper": "", "b": "--n_rows 8"}, ("1e-3", "2e-3"), ("1",))
    best = sweep._replace(rates="rates", seeds=("1", "2"))
    ran = []

    def run(name, command):
        ran.append(name)
        if "broken" in name:
            raise RuntimeError("it\nis \x1b[1m broken")
        nats = 1.0 if "2e-3" in command else 2.0
        return {"name": name, "command": command, "seconds": 1, "result": {"nats": nats}}

    monkeypatch.setattr(experiments, "RUNS", file)
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
    command = experiments.read_runs()["pairs/b_2e-3_2"]["command"]
    assert command == f"python -m lab.evaluate {tmp_path}/out/recall/b_2e-3_2/last.pt --recall"
    before = file.read_bytes()
    experiments.GROUPS["broken"] = experiments.Group(TINY, {"broken": ""}, ("1e-3",), ("1",))
    with pytest.raises(SystemExit, match="1 failed"):
        experiments.main([])
    assert file.read_bytes() == before
    capsys.readouterr()
    experiments.main(["--list"])
    stand = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert stand == ["done"] * 8 + ["missing"] + ["done"] * 4


def test_run_and_its_evaluation(tmp_path):
    """What a line has of a training run, and of an evaluation of its last checkpoint."""
    command = f"{TINY} --lr 1e-3 --seed 1 --max_steps 3"
    line = experiments.run("recall/a", command)
    assert line["command"] == command and line["versions"]["torch"] == torch.__version__
    result = line["result"]
    assert result["tokens"] == 3 * 2 * 16 and [step for step, _ in result["train"]] == [1, 2, 3]
    assert result["nats"] > 0 and 0 <= result["right"] <= 1 and result["parameters"] > 1000
    evaluate = f"python -m lab.evaluate {tmp_path}/out/recall/a/last.pt --recall"
    assert experiments.run("pairs/a", evaluate)["results"][0]["pairs"] == 4
    with pytest.raises(RuntimeError, match="n_rows"):
        experiments.run("recall/b", f"{command} --n_rows 0")


@pytest.mark.slow
def test_stopped_run_is_resumed(tmp_path):
    """Not begun anew; but only if its folder is of the same command."""
    command = f"{TINY} --lr 1e-3 --seed 1"
    experiments.run("rates/a", f"{command} --max_steps 2")
    folder = tmp_path / "out/rates/a"
    (folder.parent / "a.command").write_text(f"{command} --max_steps 4")  # as if it had stopped
    first = (folder / "log.csv").read_text().splitlines()[1]
    line = experiments.run("rates/a", f"{command} --max_steps 4")
    assert [step for step, _ in line["result"]["train"]] == [1, 2, 3, 4]
    assert (folder / "log.csv").read_text().splitlines()[1] == first
    line = experiments.run("rates/a", f"{command} --max_steps 5 --seed 2")
    assert [step for step, _ in line["result"]["train"]] == [1, 2, 3, 4, 5]
    assert (folder / "log.csv").read_text().splitlines()[1] != first  # the other seed's first step


def test_curves_are_thinned():
    points = [[i, 0.0] for i in range(1000)]
    thin = experiments.thinned(points)
    assert len(thin) == 50 and thin[0] == points[0] and thin[-1] == points[-1]
    assert experiments.thinned(points[:7]) == points[:7]


def test_page_is_what_the_raw_lines_say(tmp_path, monkeypatch):
    """Every table of docs/results.md; and a table without lines is empty."""
    monkeypatch.setattr(results, "figure", lambda name, text, *_: f"![{text}](results-{name}.png)")
    page = results.PAGE.read_text(encoding="utf-8")
    assert results.fill(page, experiments.read_runs()) == page
    empty = results.fill(page, {})
    assert "| " not in empty and empty.count("<!-- end -->") == page.count("<!-- end -->")
    with pytest.raises(ValueError, match="no table 'nonsense'"):
        results.fill("<!-- nonsense -->\n<!-- end -->", {})


@pytest.mark.parametrize("name", ["README.md", "docs/memory.md"])
def test_results_in_the_text_are_on_the_page(name):
    """A loss or bits per byte, a number with three decimals, is one that results.md has."""
    page = results.PAGE.read_text(encoding="utf-8")
    text = (ROOT / name).read_text(encoding="utf-8")
    losses = re.findall(r"(?<![\d.])[234]\.\d{3}(?!\d)", text)
    assert [number for number in losses if number not in page] == []


def test_kept_lines_are_whole():
    """Every line has its command; what ran before says what was run then, and at which commit."""
    for name, line in experiments.read_runs().items():
        group, _, rest = name.partition("/")
        assert group in {*experiments.GROUPS, *experiments.EVALUATIONS} and rest.count("_") == 2
        assert line["command"].startswith("python ") and ("result" in line) != ("results" in line)
        assert ("recorded" in line) == ("versions" not in line)
        assert "commit" in line or "versions" in line
        curves = line.get("result", {})
        assert all(len(curves.get(curve, [])) <= 50 for curve in ("train", "validation"))


@pytest.mark.parametrize("what", bench.BENCHES)
def test_bench_writes_a_line_for_each_shape(what, tmp_path):
    out = tmp_path / "bench.jsonl"
    bench.main([what, "--quick", "--out", str(out)])
    for line in map(json.loads, out.read_text().splitlines()):
        assert line["bench"] == what and min(line["seconds"].values()) > 0
        if what == "generate":
            sizes = line["state_bytes"]
            assert sizes["paper"] == 16 * 64 * 4  # m d numbers
            assert sizes["transformer"] == 2 * 64 * line["context"] * 4  # keys and values


def test_bench_times_nothing_that_is_wrong(tmp_path, monkeypatch):
    right = bench.fmem.scan_chunked
    monkeypatch.setattr(bench.fmem, "scan_chunked", lambda *a: (1.001 * right(*a)[0], None))
    with pytest.raises(SystemExit, match="wrong by"):
        bench.main(["train", "--quick", "--out", str(tmp_path / "bench.jsonl")])
    assert not list(tmp_path.iterdir())
