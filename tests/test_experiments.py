"""experiments/: runs that are run once and resumed, benchmarks on tiny shapes."""
import json
import re
import subprocess
import threading
import time

import numpy as np
import pytest

import train as train_py
from data.recall import ASK, Recall
from experiments import bench_host, bench_models, bench_scan, builds, estimate, gpu, report, sections_changes
from experiments import run as experiments
from tests.helpers import ROOT, kernel, log_rows, needs_triton
from training.checkpoint import load_checkpoint, save_checkpoint
from training.options import parse


def test_experiments_are_run_once_and_resumed(corpus, tmp_path, monkeypatch, capsys):
    size = "--n_layer 1 --d_model 16 --n_rows 8 --k_rows 2 --context 24 --batch_size 4 --eval_every 2 --log_every 1"
    train_one = f"python train.py --data {corpus} {size} --max_steps 6 --device cpu --sample_tokens 0"
    commands = {"a/one": train_one, "b/wrong": "python train.py --nonsense 1",
                "c/one": f"python -m experiments.evaluate {tmp_path}/a/one/last.pt --loss"}
    monkeypatch.setattr(experiments, "experiments", lambda: commands)
    monkeypatch.setattr(experiments, "OUT", tmp_path)
    monkeypatch.setattr(experiments, "LINES", tmp_path / "lines.jsonl")
    # a run that was stopped after two steps
    half = [*train_one.split()[2:], "--out", str(tmp_path / "a/one"), "--max_steps", "2"]
    train_py.train(parse(half))
    done = load_checkpoint(tmp_path / "a/one/last.pt")
    done["settings"]["max_steps"] = 6
    save_checkpoint(done, tmp_path / "a/one/last.pt")
    (tmp_path / "a/one.command").write_text(train_one)
    log = tmp_path / "a/one/log.csv"
    log.write_text(re.sub("^1,96,[^,]*", "1,96,1234.5", log.read_text(), flags=re.M))    # a mark on the first step
    with pytest.raises(SystemExit, match="1 failed: b/wrong"):
        experiments.main(["--jobs", "1"])
    said = capsys.readouterr().out
    assert "3 to run" in said and "--nonsense" in said
    lines = experiments.results()
    assert list(lines) == ["a/one", "c/one"] and lines["a/one"]["command"] == train_one
    curve = dict(lines["a/one"]["result"]["curve"])
    assert list(curve) == [2, 4, 6] and curve[6] < curve[2]
    assert lines["c/one"]["result"]["loss"]["nats"] == pytest.approx(lines["a/one"]["result"]["nats"], rel=1e-5)
    assert "1234.5" in log.read_text()
    del commands["b/wrong"]
    experiments.main([])
    assert capsys.readouterr().out.startswith("0 to run")
    commands["a/one"] += " --lr 0.001"                                  # another command is another experiment
    experiments.main(["a"])
    assert capsys.readouterr().out.startswith("1 to run")
    assert "1234.5" not in log.read_text() and len(log_rows(tmp_path / "a/one", "train_loss")) == 6     # from the start


def test_what_reads_a_checkpoint_waits_for_its_run(tmp_path, monkeypatch, capsys):
    """Five workers: an evaluation begins when the run that it reads has ended, and not at all if that failed or was stopped."""
    order, lock = [], threading.Lock()
    known = {"a/x": "train", "b/x": "train", "eval/a": "evaluate out/a/x/last.pt", "eval/b": "evaluate out/b/x/last.pt"}

    def run_one(name, command):
        time.sleep(0.1 if name == "a/x" else 0.3 if name == "b/x" else 0)
        with lock:
            order.append(name)
        if name == "b/x":
            raise RuntimeError("b/x: broken")
        return {"name": name, "command": command, "seconds": 0, "result": {}}

    monkeypatch.setattr(experiments, "experiments", lambda: known)
    monkeypatch.setattr(experiments, "run_one", run_one)
    monkeypatch.setattr(experiments, "LINES", tmp_path / "lines.jsonl")
    with pytest.raises(SystemExit, match="2 failed: b/x, eval/b"):
        experiments.run([], 5)
    assert order == ["a/x", "eval/a", "b/x"] and set(experiments.results()) == {"a/x", "eval/a"}
    with pytest.raises(SystemExit, match="1 failed: eval/b"):
        experiments.run(["eval/"], 1)
    assert "reads the checkpoint of b/x, which must be run to its end first" in capsys.readouterr().out


def test_a_run_that_was_stopped_is_no_result(tmp_path, monkeypatch):
    """train.py that gets Ctrl-C saves and exits with 0; its figures are not those of the command."""
    monkeypatch.setattr(experiments, "OUT", tmp_path)
    said = "model     1,000 parameters\nstopped   after step 2, saved; python train.py --resume --out x continues\n"
    monkeypatch.setattr(experiments.subprocess, "run", lambda words, **more: subprocess.CompletedProcess(words, 0, said, ""))
    with pytest.raises(RuntimeError, match="a/one: stopped   after step 2"):
        experiments.run_one("a/one", "python train.py --max_steps 6")


def test_a_long_run_leaves_no_long_line():
    points = [[step, 1 / step] for step in range(1, 4001)]
    kept = experiments.thinned(points)
    assert len(kept) == 45 and kept[0] == points[0] and kept[-5:] == points[-5:] and kept == sorted(kept)
    assert all(experiments.thinned(points[:n]) == points[:n] for n in (0, 1, 5, 40))
    assert experiments.short("0.123456789") == 0.12345679


def test_bench(tmp_path, capsys):
    """Every table, on tiny shapes; the figures are in the file that it names."""
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    command = re.search(r"^python -m experiments\.bench_scan(.*)$", page, flags=re.M)[1].split()
    bench_scan.main([*command, "--quick", "--out", str(tmp_path / "b.json")])
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert {row["table"] for row in rows} >= {"forms", "growth", "step", "context"}
    assert all(low <= median <= high for row in rows for median, low, high in row.get("seconds", {}).values())
    assert all(row["share_of_roofline"] > 0 for row in rows if row["table"] == "forms")
    assert "b.json" in capsys.readouterr().out
    bench_models.main(["--quick", "--table", "changes", "--out", str(tmp_path / "m.json")])
    (row,) = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert {"sparse", "mamba2", *bench_models.CHANGED} < row["seconds"].keys() <= experiments.TEN.keys()


@needs_triton
def test_the_first_half_hour_on_a_gpu(tmp_path, capsys):
    """All parts in the interpreter: complete tables, of which experiments.report makes a page."""
    gpu.main(["--out", str(tmp_path)])
    found = [json.loads((tmp_path / f"part-{n}.json").read_text()) for n in gpu.PARTS]
    rows = {part["title"]: part["rows"] for part in found}
    assert not [row for some in rows.values() for row in some if "failed" in row or "left_out" in row]
    assert all(row["right"] for row in rows["right"]) and not any(row["different"] for row in rows["races"])
    assert {f"{name} ms" for name in kernel.launches(16, 32, gpu.DTYPE)} <= {key for row in rows["kernel_times"] for key in row}
    assert {row["name"] for row in rows["tile_sweep"]} > set(kernel.launches(16, 32, gpu.DTYPE))
    assert all(row["same"] and row["faster tokens/s"] > 0 for row in rows["steps"])
    assert all(row["tokens/s"] > 0 for row in rows["training"]) and "absent" in rows["peers"][-1]
    page = report.gpu(tmp_path)
    assert page.count("\n| --- |") == len(gpu.PARTS) and "B 1, temperature 0" in page and not report.gpu(tmp_path / "none")


@needs_triton
def test_what_fails_there_is_a_row(tmp_path, monkeypatch, capsys):
    """A wrong kernel, a kernel that cannot start, a part that cannot begin, no time left: the rest runs."""
    scan = kernel.scan_triton
    monkeypatch.setattr(kernel, "scan_triton", lambda *a: tuple(1.5 * v for v in scan(*a)))
    gpu.main(["--out", str(tmp_path), "--part", "1"])
    rows = json.loads((tmp_path / "part-1.json").read_text())["rows"]
    assert rows and not any(row["right"] for row in rows) and rows[0]["error"] == pytest.approx(0.5, rel=0.1)
    monkeypatch.setattr(kernel, "scan_triton", None)
    monkeypatch.setattr(gpu, "inputs", None)
    gpu.main(["--out", str(tmp_path)])
    found = {n: json.loads((tmp_path / f"part-{n}.json").read_text())["rows"] for n in gpu.PARTS}
    assert all("TypeError" in row["failed"] for n in (1, 2, 3) for row in found[n]) and "failed" in found[4][0]
    assert all(row["same"] for row in found[5])
    gpu.main(["--out", str(tmp_path), "--part", "5", "--minutes", "1e-9"])
    assert {row["left_out"] for row in json.loads((tmp_path / "part-5.json").read_text())["rows"]} == {"no time left"}
    for wrong in (["--out", str(tmp_path), "--minutes", "0"], ["--out", str(tmp_path), "--minutes", "nan"], ["--part", "9"],
                  ["--out", str(tmp_path / "part-1.json")]):
        with pytest.raises(SystemExit) as e:
            gpu.main(wrong)
        said = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("experiments.gpu: error: ")


@needs_triton
def test_estimates_are_counted_from_the_launches():
    """As committed; and the counts are those that were made by hand for chunks of 64."""
    committed = json.loads((ROOT / "experiments/results/estimates.json").read_text(encoding="utf-8"))
    again = json.loads(json.dumps(estimate.estimates()))
    assert estimate.tables(again) == estimate.tables(committed)
    forward, backward = estimate.launched(**estimate.SHAPE)
    tokens, m, d, C, N, B = 8 * 4096, 64, 1024, 64, 4096 // 64, 8
    # states, S and K, y; then Y and M, L twice, Z, dx
    assert sum(flops for _, _, flops, _ in forward) == 2 * tokens * d * (m + (m + C) + (m + C))
    assert sum(flops for _, _, flops, _ in backward) == 2 * tokens * d * ((m + C) + 2 * m + m + 2 * (m + C))
    moved = {name: moved for name, moved, *_ in forward}
    # theta, write, near; keep and what a row keeps over each of four sub-chunks
    assert moved["decays"] == tokens * m * (4 + 2 + 4) + 5 * B * N * m * 4
    # wF, states, A of two groups of rows; x and y
    assert moved["read"] == 2 * (tokens * m + B * N * m * d + 2 * tokens * C + 2 * tokens * d)
    assert {programs for name, _, _, programs in forward + backward} == {B * N * 2}
    for B, T, few in ((8, 4096, ""), (1, 4096, "few_"), (2, 32768, "few_"), (3, 32768, ""), (1, 256, "")):
        forward, backward = estimate.launched(B, T, 1024, 64)
        assert [name for name, *_ in forward] == ["decays", f"{few}states", "products", "mix", "read"]
        assert len(backward) == 7 and f"{few}states_back" in {name for name, *_ in backward}
    # a program that needs all registers of a multiprocessor runs alone: 8 of them one after the other, each 4 cycles a step
    code = {name: {"warps": 1, "registers": 2**16, "executed": 1e6} for name in builds.SERIAL}
    seconds = {row["kernel"]: row["seconds"] for row in estimate.scan_seconds("H100", code, **estimate.SHAPE)[0]}
    assert seconds["mix"] == pytest.approx(1e6 * 4 * 8 / 1.755e9, rel=0.01)
    assert kernel.Launcher.__call__.__name__ == "__call__" and kernel.tiles(64, 1024, gpu.DTYPE)["C"] == 32    # as before


@needs_triton
def test_what_a_warp_executes_is_counted_by_its_loops():
    """A loop over sub-chunks, one over those before and one over tokens in it; one over all tokens, four at once; its rest; one
    over the chunks behind."""
    code = ["FADD"] * 2 + ["HMMA"] * 3 + ["FMUL"] * 5 + ["BRA"] + ["STG"] * 4 + ["FADD", "STG", "FADD", "FADD", "FMUL", "FADD"]
    loops = [range(1, 11), range(2, 5), range(5, 9), range(11, 15), range(16, 18), range(19, 20)]
    executed = 1 * 1 + 4 * (1 + 1.5 * 3 + 16 * 4 + 2) + 16 * 4 + 1 + 0 * 2 + 1 + 2.5 * 1 + 1
    assert builds.executed(code, loops, 64) == round(executed)


@needs_triton
def test_the_time_of_the_host_is_measured_without_launches(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    bench_host.main(["--repeats", "2", "--json", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found) == {"function", "operator"} and "us per layer" in capsys.readouterr().out
    assert kernel.Launcher.__call__.__name__ == "__call__"
    with pytest.raises(SystemExit):
        bench_host.main(["--repeats", "0"])
    for program in (bench_host, estimate):
        with pytest.raises(SystemExit, match=r"error: .*No such file"):
            program.main(["--json", str(tmp_path / "none/a.json"), *(["--repeats", "1"] if program is bench_host else [])])
    committed = json.loads((ROOT / "experiments/results/host.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    assert f"takes {1e6 * committed['function']:.0f} us" in page and f"({1e6 * committed['operator']:.0f} as an operator" in page


def test_the_front_page_says_what_was_measured_on_a_gpu(tmp_path):
    assert report.gpu_line(tmp_path).startswith("**Not measured yet**")
    for part, rows in ((1, [{"name": "a", "right": True}, {"name": "b", "right": False}, {"name": "c", "failed": "x"}]),
                       (6, [{"name": "memory, form kernel", "tokens/s": 123456.7}, {"name": "mamba2", "failed": "x"}])):
        (tmp_path / f"part-{part}.json").write_text(json.dumps({"device": "NVIDIA Test", "rows": rows}))
    line = report.gpu_line(tmp_path)
    assert line == ("**Measured** on NVIDIA Test: 1 of 3 configurations of the kernels right; tokens/s of training at width 512: "
                    "memory, form kernel 123,457.")


def test_what_choosing_among_the_values_left_would_get():
    """In windows as they are generated; the room is five standard errors."""
    task, rng = Recall("mqar", 64), np.random.default_rng(0)
    windows = task.make(rng, 3000)
    chances = []
    for window, wanted in zip(windows.tolist(), task.targets(windows).tolist(), strict=True):
        values, left = window[1:window.index(ASK):2], []
        for answer in (v for v in wanted if v >= 0):
            left = left or list(values)
            chances.append(left.count(answer) / len(left))
            left.remove(answer)
    assert sections_changes.by_elimination() == pytest.approx(np.mean(chances), abs=5 * np.std(chances) / len(chances)**0.5)


def test_tables_of_runs_that_take_long():
    """Where they were run: more parameters at ten million tokens, and the Transformer's recall with more tokens."""
    assert not sections_changes.large_table({}) and not sections_changes.solve_table({})
    curves = {"curve": [[1, 3.5], [2, 3.2], [3, 3.3]], "train": [[2, 2.0], [3, 2.2]]}
    done = {"large/mamba2": {"result": {"parameters": 3601152, "nats": 3.25, **curves}},
            "ten/mamba2_1": {"result": {"nats": 3.3}}}
    assert "| Mamba-2 | 3,601,152 | 3.250 | 3.300 | 3.200 | 0.100 | 2.100 |" in sections_changes.large_table(done)
    line = {"result": {"parameters": 7, "tokens": 8000000, "right": 0.995, "curve": [[2, 1.0], [3, 0.09], [4, 0.01]]}}
    name = next(iter(experiments.SOLVE))
    assert "| 7 | 8.0 | 99.5 | 6.0 |" in sections_changes.solve_table({f"solve/{name}": line})
