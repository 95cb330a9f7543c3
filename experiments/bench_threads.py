"""Training beside another busy program: python -m experiments.bench_threads

Trains the CPU preset for some steps with `--threads auto` and with one thread for each core, in turn, beside a process that keeps
one core busy, and alone. Takes the median speed of the log after the first part of each run; prints the ratios and writes
experiments/results/threads.json. Nothing else should be running.
"""
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from data.messages import one_line
from experiments.command import parser, save

HERE = Path(__file__).resolve().parent


def speed(threads, steps):
    """Tokens per second of a run, and what it said about threads."""
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--preset", "cpu", "--device", "cpu", "--threads", threads, "--out", folder,
                   "--max_steps", str(steps), "--log_every", "5", "--eval_tokens", "2048", "--sample_tokens", "0",
                   "--eval_every", "100000", "--overwrite"]
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, env=env)
        if done.returncode:
            raise RuntimeError(one_line(done.stderr.strip() or done.stdout.strip()))
        with open(Path(folder) / "log.csv", newline="", encoding="utf-8") as f:
            speeds = [float(row["tokens_per_second"]) for row in csv.DictReader(f) if row["tokens_per_second"]]
    said = [line for line in done.stdout.splitlines() if line.startswith("threads ")]
    return statistics.median(speeds[len(speeds) // 3:]), said


def main(argv=None):
    p = parser("bench_threads", "Training beside another busy program.")
    p.add_argument("--steps", type=int, default=45, help="of each run (default: 45)")
    p.add_argument("--rounds", type=int, default=3, help="of all runs in turn (default: 3)")
    p.add_argument("--out", type=Path, default=HERE / "results/threads.json")
    a = p.parse_args(argv)
    cores, found = str(os.cpu_count()), {"cores": os.cpu_count(), "beside": {}, "alone": {}}
    for place in ("beside", "alone"):
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if place == "beside" else None
        try:
            for i in range(a.rounds):
                for threads in (("auto", cores), (cores, "auto"))[i % 2]:
                    tokens, said = speed(threads, a.steps)
                    found[place].setdefault("auto" if threads == "auto" else "all", []).append(round(tokens))
                    print(f"{place:7} --threads {threads:5} {tokens:8,.0f} tokens/s  {'; '.join(said)}", flush=True)
        finally:
            if busy:
                busy.kill()
        ratios = [x / y for x, y in zip(found[place]["auto"], found[place]["all"], strict=True)]
        found[place]["ratio"] = round(statistics.median(ratios), 2)
        print(f"{place}: auto is {found[place]['ratio']} times as fast", flush=True)
    save("bench_threads", a.out, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
