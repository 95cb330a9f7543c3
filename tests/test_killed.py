"""Kills, full disks, vanished folders: nothing saved is lost, and the same command resumes."""
import os
import re
import shutil
import subprocess
import sys

import pytest

import train as train_py
from data import prepare
from tests.helpers import ROOT, SLOW, contents, finished, limited, log_rows, same, settings, survived, zoo
from training.checkpoint import load_checkpoint

PREPARE_KILLS = 30 if SLOW else 4


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
def test_prepare_killed_at_any_moment(tmp_path, monkeypatch):
    """SIGKILL at random moments: the same command resumes, and ends with the bytes of a run that was never killed."""
    zoo(tmp_path / "in", documents=40 * PREPARE_KILLS)
    command = ["--input", str(tmp_path / "in"), "--vocab_size", "300", "--shard_tokens", "4000"]
    code = f"""
import os, random, signal, time
from data import prepare
prepare.JOB, g, kills = 3000, random.Random(1), 0
encode = prepare.encode
prepare.encode = lambda *a: time.sleep(0.03) or encode(*a)     # spreads the work over the time of the kills
while True:
    child = os.fork()
    if child == 0:
        os.dup2(os.open({str(tmp_path / "said")!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        prepare.main({command!r} + ["--out", {str(tmp_path / "killed")!r}, "--workers", str(1 + kills % 3)])
        os._exit(0)
    if kills < {PREPARE_KILLS}:
        time.sleep(g.uniform(0.05, 0.9))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status != signal.SIGKILL:
        break
    kills += 1
print(status, kills)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr
    status, kills = map(int, done.stdout.split())
    resumed = (tmp_path / "said").read_text().count("data: resumes")
    assert status == 0 and kills >= PREPARE_KILLS // 2 and resumed >= 1, done.stdout
    survived("prepare_killed", kills=kills, resumed=resumed)
    monkeypatch.setattr(prepare, "JOB", 3000)
    prepare.main([*command, "--out", str(tmp_path / "whole")])
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


KILLS = 100 if SLOW else 4


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
def test_killed_at_any_moment(corpus, tmp_path):
    """SIGKILL at random moments, a checkpoint after every step, so that many hit one half-written: each life continues where
    the last one ended, and the weights at the end are those of a run that was never killed."""
    given = settings(corpus, tmp_path / "killed", eval_every=1, max_steps=30 * KILLS, eval_tokens=30)
    code = f"""
import os, random, signal, sys, time
import train
given, g, kills, half = {given!r}, random.Random(1), 0, 0
out = train.Path(given["out"])
while True:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        begun = (out / "last.pt").is_file()
        train.train(dict(given, resume=True) if begun else dict(given, overwrite=True))
        os._exit(0)
    if kills < {KILLS}:
        time.sleep(g.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status == signal.SIGKILL:
        kills += 1
        half += any(path.stat().st_size for path in out.glob(".*.pt.tmp"))
    else:
        print(status, kills, half)
        break
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace",
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    status, kills, half = map(int, done.stdout.split())
    survived("killed", kills=kills, half=half)
    assert status == 0 and (kills == KILLS or (not SLOW and kills >= KILLS // 2)), done.stderr
    whole = train_py.train({**given, "out": str(tmp_path / "whole")})
    last = load_checkpoint(tmp_path / "killed/last.pt")
    for part in ("model", "optimizer", "step", "best", "random"):
        assert same(last[part], whole[part]), part
    left = sorted(path.name for path in (tmp_path / "killed").iterdir() if path.suffix != ".png")
    assert left == ["best.pt", "last.pt", "log.csv"]
    for column in ("train_loss", "val_loss"):
        assert log_rows(tmp_path / "killed", column) == log_rows(tmp_path / "whole", column)


def test_a_full_disk_and_a_vanished_folder(run20, tmp_path):
    """A limit on the size of files stands for the disk: in the middle of a checkpoint, and of the log."""
    pytest.importorskip("resource", reason="limits on files are for Unix")
    before, vanishes = (run20[0] / "last.pt").read_bytes(), tmp_path / "vanishes"
    limits = len(before) // 2, (run20[0] / "log.csv").stat().st_size + 30
    started = {}
    for limit in limits:
        run = tmp_path / str(limit)
        shutil.copytree(run20[0], run)
        started[run] = limited(run, limit=limit)
    shutil.copytree(run20[0], vanishes)
    vanishing = limited(vanishes, during=f"shutil.rmtree({str(vanishes)!r})")
    for run, process in started.items():
        code, _, errors = finished(process)
        assert code == 1 and re.fullmatch("train.py: error: .*\n", errors), errors
        assert (run / "last.pt").read_bytes() == before and not list(run.glob(".*.tmp"))
        assert train_py.train({"out": str(run), "resume": True, "max_steps": 22})["step"] == 22      # with room it continues
    code, _, errors = finished(vanishing)
    assert code == 1 and re.fullmatch("train.py: error: .*vanishes.*\n", errors), errors
