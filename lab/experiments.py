"""The runs behind docs/results.md, as data: python -m lab.experiments [GROUP ...]

    python -m lab.experiments --list    # every run, and whether its result is there
    python -m lab.experiments short     # runs what is missing of this group; without names, of all

A run is a command that can be typed by hand; it gets one thread. Its result becomes a line of
lab/results/runs.jsonl, its checkpoints are in out-experiments/. A run that was stopped starts over.
"""

import argparse
import csv
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from data.tokenizer import printable
from lab.bench import processor

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "lab/results/runs.jsonl"
OUT = "out-experiments"  # in ROOT


class Group(NamedTuple):
    """Training runs that differ in model, learning rate and seed."""

    command: str
    models: dict
    rates: tuple | str  # or the group of which each model takes its best rate
    seeds: tuple


# A million parameters; LARGE has 3.6, SMALL 0.5, RECALL 0.1 million. A step has 2,048 tokens.
TRAIN = "python -m lab.train"
LANGUAGE = f"{TRAIN} --n_layer 5 --d_model 128 --n_rows 32 --k_rows 8 --context 256 --batch_size 8"
SWEEP = f"{LANGUAGE} --max_steps 300 --eval_every 100"
SHORT = f"{LANGUAGE} --max_steps 500 --eval_every 100"
LARGE = (
    f"{TRAIN} --n_layer 9 --d_model 192 --n_rows 48 --k_rows 12 --context 512 --batch_size 4 "
    "--max_steps 5000 --eval_every 500"
)
SMALL = f"{TRAIN} --n_layer 4 --d_model 96 --context 256 --batch_size 8 --max_steps 200"
RECALL = f"{TRAIN} --n_layer 2 --d_model 64 --n_rows 64 --k_rows 16"
MQAR = f"{RECALL} --data mqar --context 64 --batch_size 32 --eval_every 400 --max_steps 1600"
MQAR256 = f"{RECALL} --data mqar --context 256 --batch_size 8 --eval_every 400 --max_steps 1600"
PASSKEY = f"{RECALL} --data passkey --context 256 --batch_size 8 --max_steps 1600"
TINY = "python train.py --preset cpu --data data/tinyshakespeare --max_steps 5000 --eval_every 100"
CHARACTERS = (  # the shape of nanoGPT's run on a laptop
    "python train.py --preset cpu --data data/characters --n_layer 4 --d_model 128 --context 64 "
    "--batch_size 12 --max_steps 2000"
)

CHANGES = {"shared": "--shared_row", "conv": "--conv 4", "gate": "--gate"}
MODELS = {
    "paper": "",
    "dense": "--k_rows none",
    "ours": "--shared_row --shift --conv 4 --gate",
    "transformer": "--layer attention",
    "transformer+conv": "--layer attention --conv 4",
    "mamba2": "--layer mamba2",
}
RECALL_MODELS = {
    **MODELS,
    "paper+shift": "--shift",
    "paper+conv": "--conv 4",
    "transformer": "--layer attention --n_head 4",
    "transformer+conv": "--layer attention --n_head 4 --conv 4",
}
HEADS = {
    "transformer-1-head": "--layer attention --n_head 1",
    "transformer-2-heads": "--layer attention --n_head 2",
    "transformer-1-head,-learned-positions": "--layer attention --n_head 1 --positions 64",
}
COMBINATIONS = ("shared", "gate", "shared+conv", "conv+gate")
EXTENSIONS = {names: " ".join(CHANGES[name] for name in names.split("+")) for names in COMBINATIONS}
WIDE = {"conv+gate,wide": "--conv 4 --gate --d_memory 256 --d_mlp 184"}
TEN = {**MODELS, **{name: EXTENSIONS[name] for name in ("shared", "conv+gate")}}
CONV = {"conv": "--conv 4", "transformer+conv+gate": "--layer attention --conv 4 --gate"}
EDGE = {"transformer+conv": MODELS["transformer+conv"], **CONV}  # best at 16e-3
SHAPES = [(4, 1), (16, 4), (32, 8), (64, 16), (256, 64)]
ROWS = {f"m={m},k={k}": f"--n_rows {m} --k_rows {k}" for m, k in SHAPES}
SHARED = {f"shared,m={m},k={k}": f"--shared_row --n_rows {m + 1} --k_rows {k}" for m, k in SHAPES}
LIMITS = {f"{n}-seconds": f"--seconds {n}" for n in (100, 300, 900)}
LIMITS["900-seconds,dropout"] = "--seconds 900 --dropout 0.1"
RATES = ("2e-3", "4e-3", "8e-3", "16e-3")
SEEDS = ("1337", "1", "2")

GROUPS = {
    "rates": Group(SWEEP, {**MODELS, **CONV, **WIDE}, RATES, SEEDS[:1]),
    "edge": Group(SWEEP, EDGE, ("32e-3",), SEEDS[:1]),
    "short": Group(SHORT, {**MODELS, **CONV}, "rates", SEEDS),
    "short-8e-3": Group(SHORT, EDGE, ("8e-3",), SEEDS),  # level with 16e-3 after 300 steps
    "ten": Group(f"{LANGUAGE} --max_steps 5000 --eval_every 500", TEN, "rates", SEEDS[:2]),
    "large": Group(LARGE, MODELS, "rates", SEEDS[:1]),
    "extensions": Group(SHORT, EXTENSIONS, ("8e-3",), SEEDS),
    "wide": Group(SHORT, WIDE, ("8e-3",), SEEDS),
    "rows": Group(SMALL, {**ROWS, **SHARED}, ("8e-3",), SEEDS),
    "recall-rates": Group(MQAR, RECALL_MODELS, ("1e-3", *RATES), SEEDS[:1]),
    "recall-heads": Group(MQAR, HEADS, RATES[:3], SEEDS[:1]),
    "recall": Group(MQAR, RECALL_MODELS, "recall-rates", SEEDS[1:]),
    "recall256": Group(MQAR256, RECALL_MODELS, "recall-rates", SEEDS),
    "passkey": Group(PASSKEY, RECALL_MODELS, "recall-rates", SEEDS),
    "default": Group("python train.py --preset cpu", {"default": ""}, ("4e-3",), (*SEEDS, "3")),
    # after python data/prepare.py --input tinyshakespeare.txt --out data/tinyshakespeare
    "tinyshakespeare": Group(TINY, LIMITS, ("4e-3",), SEEDS),
    # after the same with --vocab_size 256 and --out data/characters
    "character-rates": Group(CHARACTERS, {"memory": ""}, RATES, SEEDS[:1]),
    "characters": Group(CHARACTERS, {"memory": ""}, "character-rates", SEEDS),
}

# The group whose last checkpoints are evaluated, and the options of lab.evaluate.
EVALUATIONS = {
    "long": ("short", "--long --times 128 --tokens 65536"),
    "long-wide": ("wide", "--long --times 128 --tokens 65536"),
    "routing": ("short", "--routing --tokens 65536"),
    "routing-wide": ("wide", "--routing --tokens 65536"),
    "recall256-pairs": ("recall256", "--recall"),
    "passkey-distances": ("passkey", "--recall --times 128"),
}


def read_runs():
    """{name: line} of the file of results."""
    lines = RUNS.read_text(encoding="utf-8").splitlines() if RUNS.is_file() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def best_rate(done, sweep, model):
    """The best rate in the sweep, or 8e-3 without one, as a tuple: empty while runs are missing."""
    group = GROUPS[sweep]
    if model not in group.models:
        return ("8e-3",)
    names = {rate: f"{sweep}/{model}_{rate}_{group.seeds[0]}" for rate in group.rates}
    if not all(name in done for name in names.values()):
        return ()
    return (min(names, key=lambda rate: done[names[rate]]["result"]["nats"]),)


def runs_of(name, done):
    """{name of a run: command} of a group, without the models whose best rate is not known yet."""
    runs = {}
    if name in EVALUATIONS:
        trained, options = EVALUATIONS[name]
        for run_name, training in runs_of(trained, done).items():
            if name != "routing" or "--layer" not in training:  # other layers have no rows
                command = f"python -m lab.evaluate {OUT}/{run_name}/last.pt {options}"
                runs[run_name.replace(trained, name, 1)] = command
        return runs
    group = GROUPS[name]
    for model, options in group.models.items():
        rates = group.rates
        if isinstance(rates, str):
            rates = best_rate(done, rates, model)
        for rate, seed in itertools.product(rates, group.seeds):
            command = f"{group.command} {options} --lr {rate} --seed {seed}"
            runs[f"{name}/{model}_{rate}_{seed}"] = " ".join(command.split())
    return runs


def read_log(folder, printed):
    """The result of a training run: from its log.csv, and the number of parameters as printed."""
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    validation = [[int(row["step"]), float(row["val_loss"])] for row in rows if row["val_loss"]]
    parameters = next(line for line in printed.splitlines() if line.startswith("model "))
    result = {
        "parameters": int(parameters.split()[1].replace(",", "")),
        "tokens": int(rows[-1]["tokens"]),
        "validation": validation[:-1],  # of a part of the text
        "nats": validation[-1][1],  # of all of it
    }
    if rows[-1].get("val_bpb"):
        result["bits_per_byte"] = float(rows[-1]["val_bpb"])
    if rows[-1].get("val_accuracy"):
        result["percent_right"] = 100 * float(rows[-1]["val_accuracy"])
    return result


def run(name, command):
    """Run a command -> its line of runs.jsonl. Raises RuntimeError with the last line printed."""
    words = [sys.executable, *command.split()[1:]]
    folder = ROOT / OUT / name
    trains = "lab.evaluate" not in words
    if trains:
        words += ["--out", str(folder), "--overwrite"]
    elif not (ROOT / words[3]).is_file():  # its training has a result, but no checkpoint any more
        group, _, rest = name.partition("/")
        trained = f"{EVALUATIONS[group][0]}/{rest}"
        run(trained, runs_of(EVALUATIONS[group][0], read_runs())[trained])
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if ran.returncode or "\nstopped " in ran.stdout:
        raise RuntimeError((ran.stderr.strip() or ran.stdout.strip()).split("\n")[-1])
    line = {"name": name, "command": command, "seconds": round(time.perf_counter() - start)}
    line |= {"processor": processor(), "date": time.strftime("%Y-%m-%d")}
    line |= {"versions": {"python": platform.python_version(), "torch": torch.__version__}}
    if trains:
        return {**line, "result": read_log(folder, ran.stdout)}
    return {**line, "results": [json.loads(text) for text in ran.stdout.splitlines()]}


def main(argv=None):
    names = [*GROUPS, *EVALUATIONS]
    parser = argparse.ArgumentParser(prog="lab.experiments", description="Run experiments.")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(names))
    parser.add_argument("--list", action="store_true", help="print the runs, done or missing")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.groups if name not in names]:
        parser.error(f"there is no group {unknown[0]!r}; --help lists them")
    failed = 0
    for group in args.groups or names:
        done = read_runs()
        for name, command in runs_of(group, done).items():
            there = done.get(name, {}).get("command") == command
            if args.list:
                print(f"{'done' if there else 'missing':8}{name:40}{command}")
            elif not there:
                try:
                    line = run(name, command)
                except RuntimeError as error:
                    failed += 1
                    print(printable(f"FAILED {name}: {error}"), flush=True)
                    continue
                with open(RUNS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{line['seconds']:7} s  {name}", flush=True)
    if failed:
        sys.exit(f"lab.experiments: {failed} failed; the same command runs them again")


if __name__ == "__main__":
    main()
