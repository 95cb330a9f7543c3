"""training/threads.py with a clock and a machine of our own: when it tries, what it keeps, what it says."""
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import ROOT, settings
from training import threads
from training.threads import Load, Threads


class Machine:
    """Steps take speeds[threads] seconds; others: cores that other programs keep busy."""

    def __init__(self, speeds, others=0.0, cores=2):
        self.speeds, self.others, self.cores, self.time, self.said, self.used = speeds, others, cores, 0.0, [], cores
        self.seen = []

    def controller(self, monkeypatch, setting="auto", device="cpu"):
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.cores)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        return Threads(setting, SimpleNamespace(type=device), self.said.append, lambda: self.others, lambda: self.time,
                       lambda n: setattr(self, "used", n))

    def run(self, controller, steps):
        for _ in range(steps):
            controller.begin()
            self.time += self.speeds[self.used]
            controller.end()
            self.seen.append(self.used)


def test_a_free_machine_is_left_alone(monkeypatch):
    machine = Machine({2: 0.1, 1: 0.15})
    controller = machine.controller(monkeypatch)
    machine.run(controller, 500)
    assert set(machine.seen) == {2} and not machine.said


def test_a_busy_machine_is_tried_at_the_start(monkeypatch):
    """The faster is kept and said; a trial is four steps with each number."""
    machine = Machine({2: 0.4, 1: 0.2}, others=1.0)
    machine.run(machine.controller(monkeypatch), 60)
    assert machine.seen == [2] * 3 + [1] * 57                # what is in use after each step
    assert machine.said == ["threads   1 of 2 (other programs are busy; 2.0 times as fast as with 2)"]
    machine = Machine({2: 0.1, 1: 0.15}, others=1.0)         # the other program is a polite one
    machine.run(machine.controller(monkeypatch), 60)
    assert machine.seen[-1] == 2 and not machine.said


def test_a_run_that_has_become_slow(monkeypatch):
    machine = Machine({2: 0.1, 1: 0.15})
    controller = machine.controller(monkeypatch)
    machine.run(controller, 50)
    machine.speeds, machine.others = {2: 0.45, 1: 0.2}, 1.0
    machine.run(controller, 50)
    assert machine.seen[-1] == 1 and len(machine.said) == 1 and "twice as long as before; 2." in machine.said[0]
    machine.run(controller, 500)                            # the other one still runs: nothing is tried
    assert set(machine.seen[-500:]) == {1} and len(machine.said) == 1
    machine.speeds, machine.others = {2: 0.1, 1: 0.15}, 0.0
    machine.run(controller, 300)                            # more than PAUSE seconds later
    assert machine.seen[-1] == 2 and "the other programs are done; 1.5 times as fast as with 1" in machine.said[1]
    machine.speeds = {2: 0.21, 1: 0.3}                      # slower for another reason, as a laptop on its battery
    machine.run(controller, 50)
    assert machine.seen[-1] == 2 and len(machine.said) == 2


def test_one_slow_step_is_no_reason(monkeypatch):
    machine = Machine({2: 0.1, 1: 0.15})
    controller = machine.controller(monkeypatch)
    for i in range(100):
        machine.speeds[2] = 5.0 if i % 10 in (3, 4) else 0.1
        machine.run(controller, 1)
    assert set(machine.seen) == {2}


def test_many_cores(monkeypatch):
    machine = Machine({16: 0.5, 8: 0.12, 4: 0.1, 2: 0.15, 1: 0.3}, others=6.0, cores=16)
    machine.run(machine.controller(monkeypatch), 40)
    assert machine.seen[-1] == 4 and machine.said == ["threads   4 of 16 (other programs are busy; 5.0 times as fast as with 16)"]


def test_what_is_fixed_stays(monkeypatch):
    machine = Machine({2: 0.4, 1: 0.2, 5: 0.1}, others=1.0)
    controller = machine.controller(monkeypatch, "5")
    machine.run(controller, 50)
    assert set(machine.seen) == {5} and controller.why == "as asked"
    machine.used = 2
    machine.run(machine.controller(monkeypatch, device="cuda"), 50)
    machine.cores = 1
    machine.run(machine.controller(monkeypatch), 50)
    assert set(machine.seen[50:]) == {2} and not machine.said
    for wrong in ("0", "-1", "two", "", "1.5", "٣", "9" * 50, "none"):
        with pytest.raises(ValueError, match="--threads must be auto or a number"):
            machine.controller(monkeypatch, wrong)
    machine.cores = 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert not Threads("auto", SimpleNamespace(type="cpu"), print).auto


def test_the_load_is_that_of_others():
    times, used = iter([0.0, 10.0, 20.0, 20.0, 30.0]), iter([(100.0, 5.0), (125.0, 15.0), None, (200.0, 20.0), (199.0, 25.0)])
    load = Load(lambda: next(times), lambda: next(used))
    assert [load() for _ in range(4)] == [1.5, None, None, 0.0]


@pytest.mark.skipif(threads.used() is None, reason="the load of the machine is read from /proc")
def test_a_busy_process_is_seen():
    load = Load()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        own = torch.randn(400, 400)
        for _ in range(100):
            own = torch.nn.functional.normalize(own @ own)
        try:
            busy.wait(1.0)
        except subprocess.TimeoutExpired:
            others = load()
        busy.kill()
    assert others > 0.2                                     # a whole core, where no others compete with it


def test_threads_of_a_run(corpus, tmp_path):
    """What is taken is said; what cannot be taken too."""
    def train(asked, **env):
        given = settings(corpus, tmp_path / "out", threads=asked, max_steps=2)
        command = [sys.executable, "train.py", "--overwrite", *(f"--{k}={v}" for k, v in given.items())]
        env = {k: v for k, v in {**os.environ, **env}.items() if v}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)

    for asked, env, said in (("2", {}, "2 (as asked)"), ("auto", {"OMP_NUM_THREADS": "1"}, "1 (as OMP_NUM_THREADS says)")):
        done = train(asked, **env)
        assert done.returncode == 0 and f"\nthreads   {said}\n" in done.stdout, done.stderr
    done = train("auto", OMP_NUM_THREADS="")
    assert done.returncode == 0 and re.search(r"^threads   \d+ \((one for each core|other programs are busy)", done.stdout, re.M)
    done = train("many")
    assert done.returncode and done.stderr == "train.py: error: --threads must be auto or a number from 1 to 1024, not many\n"
