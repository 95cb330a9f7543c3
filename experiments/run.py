"""Every experiment of the results page: python -m experiments.run

    python -m experiments.run --list            # the names, with their commands
    python -m experiments.run                   # all of them, without those already in results/experiments.jsonl
    python -m experiments.run lr short          # those whose names begin so; --jobs N at a time, one thread each
    python -m experiments.report                # the page, its figures, and the results section of README.md

Everything goes through train.py and experiments.evaluate, as commands that can be run by hand. A run that was stopped is
resumed; its checkpoints are in out-experiments/NAME, and its figures are one line of results/experiments.jsonl:
{"name", "command", "seconds", "result"}. No number on the results page is typed by hand.
"""
import csv
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from experiments.command import parser

HERE = Path(__file__).resolve().parent
ROOT, LINES, OUT = HERE.parent, HERE / "results/experiments.jsonl", Path("out-experiments")

SEEDS = 1337, 1, 2
SIZE = "--n_layer 5 --d_model 128 --n_rows 32 --k_rows 8 --context 256 --batch_size 8 --eval_every 100 --sample_tokens 0"
MODELS = {"sparse": "", "dense": "--k_rows none", "transformer": "--mixer attention", "mamba2": "--mixer mamba2",
          "extended": "--conv 4 --gate --d_memory 256 --d_mlp 184"}
# the best of the sweep below, which was run first
LR = {"sparse": "8e-3", "dense": "8e-3", "transformer": "4e-3", "mamba2": "8e-3", "extended": "8e-3"}

# one change each to the sparse memory
ABLATIONS = {"base": "", "tau=1": "--tau 1", "tau=0.125": "--tau 0.125", "alpha_std=0.25": "--alpha_std 0.25",
             "alpha_std=4": "--alpha_std 4", "router_lr=0.1": "--router_lr 0.1", "router_lr=3": "--router_lr 3",
             **{name: f"--ablation {name}" for name in (
                 "eta=1", "eta=0.8", "mu=1", "mu=0.8", "norm_after", "untied", "no_renorm", "balance=0.01")},
             "conv": "--conv 4", "gate": "--gate", "conv+gate": "--conv 4 --gate"}

# those that change how sharply the tokens are routed, looked at with --routing
SPREAD = "base", "tau=1", "router_lr=0.1", "balance=0.01"

# the memory scaling: rows, and how many of them a token takes
ROWS = [(m, k) for m in (4, 16, 64, 128) for k in dict.fromkeys((None, 4, m // 4)) if k != m]
TAUS = "0.25", "1", "0.5", "0.125"
SMALL = "--n_layer 4 --d_model 96 --context 256 --batch_size 8 --lr 8e-3 --max_steps 200 --eval_every 200 --sample_tokens 0"

# recall: two layers of width 64
RECALL = "--n_layer 2 --d_model 64 --n_rows 64 --k_rows 16 --lr 4e-3 --sample_tokens 0"
TASKS = {"mqar": "--context 64 --batch_size 32 --max_steps 1200 --eval_every 200",
         "passkey": "--context 256 --batch_size 8 --max_steps 600 --eval_every 200"}
RECALL_MODELS = {"m=16": "--n_rows 16 --k_rows 4", "m=64": "", "m=64, untied": "--ablation untied",
                 "m=64, conv, gate": "--conv 4 --gate", "m=64, conv, gate, untied": "--conv 4 --gate --ablation untied",
                 "transformer": "--mixer attention --n_head 4", "mamba2": "--mixer mamba2",
                 # the rate above is one for all; what four times of it changes
                 "m=64, lr=16e-3": "--lr 16e-3", "transformer, lr=16e-3": "--mixer attention --n_head 4 --lr 16e-3",
                 "mamba2, lr=16e-3": "--mixer mamba2 --lr 16e-3"}
MQAR_ONLY = "untied", "lr="              # parts of the names of models that are not trained on the passkey


# the changes of variants/extended.py, alone and together
CHANGES = {"shared": "--shared_row", "shift": "--shift", "conv": "--conv 4", "gate": "--gate"}
SEEDED = ("shared", "shared+shift", "shared+gate", "shared+shift+gate", "conv+gate", "shared+conv",
          "shared+shift+conv+gate")                  # those of all three seeds
# why a convolution and a shared row get in each other's way: without the SiLU, without the row's norm, at half the rate
IN_THE_WAY = {"linear": "--conv 4 --ablation conv=linear", "shared-linear": "--shared_row --conv 4 --ablation conv=linear",
              "average": "--conv 4 --ablation average", "shared-4e-3": "--shared_row --conv 4 --lr 4e-3"}
BEFORE = "conv", "conv+gate"                     # with which the shift is tried ahead of the convolution, too
# ten million tokens
TEN = {"sparse": "", "shared+shift": "--shared_row --shift", "shared+shift+gate": "--shared_row --shift --gate",
       "mamba2": "--mixer mamba2", "transformer": "--mixer attention", "conv+gate": "--conv 4 --gate", "shared": "--shared_row",
       "all": "--shared_row --shift --conv 4 --gate", "dense": "--k_rows none", "extended": MODELS["extended"]}
TEN_SEEDED = "all", "mamba2", "transformer"     # those of more seeds
# the same with 3.6 million parameters and a context of 512
LARGE = "--n_layer 9 --d_model 192 --n_rows 48 --k_rows 12 --context 512 --batch_size 4 --eval_every 500 --sample_tokens 0"
# recall again, with the rate swept for every model, four times as long
RATES = "4e-3", "16e-3", "8e-3", "2e-3", "1e-3"
RATED = {"shift": "--shift", "shared+shift": "--shared_row --shift", "paper": "", "shared": "--shared_row",
         "transformer": "--mixer attention --n_head 4", "mamba2": "--mixer mamba2", "conv+gate": "--conv 4 --gate",
         "conv+gate+shift": "--conv 4 --gate --shift", "read_rank": "--read_rank 8",
         "transformer-one-head": "--mixer attention --n_head 1",
         "conv+gate+shift-before": "--conv 4 --gate --ablation shift=before"}
RATED_SEEDED = {(model, "16e-3") for model in ("shift", "shared+shift", "paper", "conv+gate", "mamba2")}    # all three seeds
# the Transformer with five times as many tokens, with twice the width, with eight times the batch, with four layers
SOLVE = {"transformer_4e-3": (24000, "--mixer attention --n_head 4 --lr 4e-3"),
         "transformer-128_2e-3": (12000, "--d_model 128 --mixer attention --n_head 4 --lr 2e-3"),
         "transformer-batch_4e-3": (3000, "--batch_size 256 --mixer attention --n_head 4 --lr 4e-3"),
         "transformer-4-layers_2e-3": (12000, "--n_layer 4 --mixer attention --n_head 4 --lr 2e-3"),
         # where nothing can be eliminated, with 400 million tokens
         "transformer-any_2e-3": (200000, "--data mqar-any --mixer attention --n_head 4 --lr 2e-3")}
# why the shared row helps: one part of it at a time, and what might do the same without it
WHY = {"written": "--ablation shared=write", "read": "--ablation shared=read", "bias": "--ablation shared=bias",
       "two": "--ablation shared=2", "average": "--ablation average", "gumbel": "--ablation gumbel",
       "learned_rows": "--ablation learned_rows"}
OVER = {"paper": "", "shared": "--shared_row", "shared+shift": "--shared_row --shift"}     # with --routing every 100 steps
SEATED = [(m, k) for m in (4, 16, 64, 256) for k in dict.fromkeys((m // 4, 4)) if k <= m]    # m rows beside the shared one
# more tasks of recall, the rates of sections 1 and 8; mqar256: 4 to 64 pairs
MORE_TASKS = {**dict.fromkeys(("copy", "repeat"), "--context 64 --batch_size 32 --max_steps 2400 --eval_every 400"),
              "mqar256": "--context 256 --batch_size 8 --max_steps 4800 --eval_every 800",
              "mqar-any": "--context 64 --batch_size 32 --max_steps 4800 --eval_every 400"}
MORE_RECALL = {"paper": "--lr 16e-3", "shift": "--shift --lr 16e-3", "shared+shift": "--shared_row --shift --lr 16e-3",
               "conv+gate": "--conv 4 --gate --lr 16e-3", "mamba2": "--mixer mamba2 --lr 16e-3",
               "transformer": "--mixer attention --n_head 4 --lr 4e-3"}
PASSKEY = {"shift": "--shift", "shared": "--shared_row", "shared+shift": "--shared_row --shift"}
# source code, and a longer context; after `python data/prepare.py --corpus stdlib`
CODE = {**{model: TEN[model] for model in ("sparse", "shared+shift+gate", "mamba2", "transformer")},
        "shared+shift+gate+carry": TEN["shared+shift+gate"] + " --carry_state"}
# the learning rate again, at a fifth of ten million tokens
FIFTH = {"transformer": ("2e-3", "4e-3", "8e-3"), **dict.fromkeys(
    ("shared+shift+gate", "mamba2", "all", "conv+gate", "shared+shift", "sparse"), ("4e-3", "8e-3", "16e-3"))}


SHOWN = f"routing/sparse_{SEEDS[0]}"     # whose rows and sentence the page shows


def experiments():
    """{name: command}, in the order in which they are run; the first part of a name is its experiment."""
    runs = {}
    for lr in ("4e-3", "2e-3", "8e-3", "16e-3"):
        for model, options in MODELS.items():
            runs[f"lr/{model}_{lr}"] = f"python train.py {SIZE} {options} --lr {lr} --max_steps 300"
    for seed in SEEDS:
        for model, options in MODELS.items():
            runs[f"short/{model}_{seed}"] = f"python train.py {SIZE} {options} --lr {LR[model]} --max_steps 500 --seed {seed}" + (
                " --keep_every 100" if model in ("sparse", "extended") and seed == SEEDS[0] else "")
    for seed in SEEDS:
        for model in MODELS:
            last = f"{OUT}/short/{model}_{seed}/last.pt"
            runs[f"long/{model}_{seed}"] = f"python -m experiments.evaluate {last} --long 128 --tokens 65536 --recall"
            if model not in ("transformer", "mamba2"):
                runs[f"routing/{model}_{seed}"] = f"python -m experiments.evaluate {last} --routing --tokens 65536"
    for model in ("sparse", "extended"):
        for step in range(0, 500, 100):
            runs[f"routing/{model}_{SEEDS[0]}_{step}"] = (
                f"python -m experiments.evaluate {OUT}/short/{model}_{SEEDS[0]}/step-{step}.pt --routing --tokens 16384")
    for task, options in TASKS.items():
        names = {f"{task}/{model}_{seed}".replace(", ", "+"): f"{more} --seed {seed}" for seed in SEEDS
                 for model, more in RECALL_MODELS.items() if task == "mqar" or not any(part in model for part in MQAR_ONLY)}
        for name, more in names.items():
            runs[name] = f"python train.py --data {task} {RECALL} {options} {more}"
        for name in names:
            runs[f"recall-{name}"] = f"python -m experiments.evaluate {OUT}/{name}/last.pt --recall"
    for seed in SEEDS:
        for name, options in ABLATIONS.items():
            runs[f"ablation/{name}_{seed}"] = f"python train.py {SIZE} --lr 8e-3 {options} --max_steps 200 --seed {seed}"
    for name in SPREAD:
        runs[f"ablation-routing/{name}"] = (
            f"python -m experiments.evaluate {OUT}/ablation/{name}_{SEEDS[0]}/last.pt --routing --tokens 16384")
    runs |= changed() | more_recall()
    for m, k in ROWS:
        for tau in TAUS:
            runs[f"rows/{m}_{k}_{tau}_{SEEDS[0]}"] = rows_command(m, k, tau, SEEDS[0])
        tau = best_tau(m, k)                            # the other seeds, with the tau that was best
        for seed in SEEDS[1:] if tau else ():
            runs[f"rows/{m}_{k}_{tau}_{seed}"] = rows_command(m, k, tau, seed)
    return {name: " ".join(command.split()) for name, command in runs.items()}


def changed():
    """The changes of variants/extended.py in language: experiments for sections 8, 9 and 10 of the page."""
    runs = {}
    for some in (some for n in range(1, 5) for some in itertools.combinations(CHANGES, n)):
        options = " ".join(CHANGES[name] for name in some)
        runs[f"changes/{'+'.join(some)}_{SEEDS[0]}"] = f"python train.py {SIZE} {options} --lr 8e-3 --max_steps 500"
    for seed in SEEDS[1:]:
        for some in SEEDED:
            options = " ".join(CHANGES[name] for name in some.split("+"))
            runs[f"changes/{some}_{seed}"] = f"python train.py {SIZE} {options} --lr 8e-3 --max_steps 500 --seed {seed}"
    for some in BEFORE:
        options = " ".join(CHANGES[name] for name in some.split("+"))
        runs[f"before/{some}_{SEEDS[0]}"] = f"python train.py {SIZE} {options} --ablation shift=before --lr 8e-3 --max_steps 500"
    for name, options in IN_THE_WAY.items():
        options = options if "--lr" in options else f"{options} --lr 8e-3"
        runs[f"conv/{name}_{SEEDS[0]}"] = f"python train.py {SIZE} {options} --max_steps 500 --seed {SEEDS[0]}"
    for model, options in TEN.items():
        lr, size = LR.get(model, "8e-3"), SIZE.replace("--eval_every 100", "--eval_every 500")
        runs[f"ten/{model}_{SEEDS[0]}"] = f"python train.py {size} {options} --lr {lr} --max_steps 5000"
        for seed in SEEDS[1:] if model in TEN_SEEDED else ():
            runs[f"ten/{model}_{seed}"] = f"{runs[f'ten/{model}_{SEEDS[0]}']} --seed {seed}"
        runs[f"drop/{model}_{SEEDS[0]}"] = f"{runs[f'ten/{model}_{SEEDS[0]}']} --dropout 0.1"
        if model in TEN_SEEDED:
            runs[f"large/{model}"] = f"python train.py {LARGE} {options} --lr {lr} --max_steps 5000"
    for model, rates in FIFTH.items():
        for lr in rates:
            size = SIZE.replace("--eval_every 100", "--eval_every 500")
            runs[f"fifth/{model}_{lr}"] = f"python train.py {size} {TEN[model]} --lr {lr} --max_steps 1000"
    for group in ("ten", "drop"):
        for model in TEN:
            last = f"{OUT}/{group}/{model}_{SEEDS[0]}/last.pt"
            runs[f"{group}-recall/{model}"] = f"python -m experiments.evaluate {last} --recall --long 32 --tokens 65536"
    for seed in SEEDS:
        for name, options in WHY.items():
            runs[f"why/{name}_{seed}"] = f"python train.py {SIZE} {options} --lr 8e-3 --max_steps 500 --seed {seed}"
    for seed in SEEDS:
        for name, options in OVER.items():
            run = f"over/{name}_{seed}"
            runs[run] = f"python train.py {SIZE} {options} --lr 8e-3 --max_steps 500 --seed {seed} --keep_every 100"
            for step in range(100, 600, 100):
                runs[f"over-routing/{name}_{seed}_{step}"] = (
                    f"python -m experiments.evaluate {OUT}/{run}/step-{step}.pt --routing --tokens 16384")
    for seed in SEEDS:
        for m, k in SEATED:
            more = f"--shared_row --n_rows {m + 1} --k_rows {k} --tau 0.25 --seed {seed}"
            runs[f"seated/{m}_{k}_{seed}"] = f"python train.py {SMALL} {more}"
    for model, options in CODE.items():
        size = SIZE.replace("--context 256 --batch_size 8 --eval_every 100", "--context 1024 --batch_size 2 --eval_every 500")
        lr = LR.get(model, "8e-3")
        runs[f"code/{model}"] = f"python train.py --data data/stdlib {size} {options} --lr {lr} --max_steps 1500"
        last = f"{OUT}/code/{model}/last.pt"
        runs[f"code-long/{model}"] = f"python -m experiments.evaluate {last} --long 8 --tokens 131072 --recall"
    return runs


def more_recall():
    """Section 8 again: recall with the changes."""
    runs = {}
    for seed in SEEDS:
        setup = RECALL.replace("--lr 4e-3 ", "")
        names = {f"{task}/{model}_{seed}": f"python train.py --data {task.removesuffix('256')} {setup} {size} {options}"
                 for task, size in MORE_TASKS.items() for model, options in MORE_RECALL.items()}
        names |= {f"passkey/m=64+{model}_{seed}": f"python train.py --data passkey {RECALL} {TASKS['passkey']} {options}"
                  for model, options in PASSKEY.items()}
        for name, command in names.items():
            runs[name] = f"{command} --seed {seed}"
        for name in names:
            runs[f"recall-{name}"] = f"python -m experiments.evaluate {OUT}/{name}/last.pt --recall"
    for lr in RATES:
        for model, options in RATED.items():
            size = "--context 64 --batch_size 32 --max_steps 4800 --eval_every 400"
            runs[f"rates/{model}_{lr}_{SEEDS[0]}"] = f"python train.py --data mqar {RECALL} {size} {options} --lr {lr}"
            for seed in SEEDS[1:] if (model, lr) in RATED_SEEDED else ():
                runs[f"rates/{model}_{lr}_{seed}"] = f"{runs[f'rates/{model}_{lr}_{SEEDS[0]}']} --seed {seed}"
    for name, (steps, options) in SOLVE.items():
        size = f"--context 64 --batch_size 32 --max_steps {steps} --eval_every 2000"
        runs[f"solve/{name}"] = f"python train.py --data mqar {RECALL} {size} {options}"
    return runs


def rows_command(m, k, tau, seed):
    return f"python train.py {SMALL} --n_rows {m} --k_rows {k or 'none'} --tau {tau} --seed {seed}"


def best_tau(m, k):
    """The tau with the lowest loss for the first seed; None as long as they have not all been run."""
    done = results()
    found = {tau: done.get(f"rows/{m}_{k}_{tau}_{SEEDS[0]}") for tau in TAUS}
    return min(TAUS, key=lambda tau: found[tau]["result"]["nats"]) if all(found.values()) else None


# ----------------------------------------------------------------------------------------------------------- running them

def results():
    """{name: line} of experiments.jsonl."""
    lines = LINES.read_text(encoding="utf-8").splitlines() if LINES.is_file() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def run_one(name, command):
    """Runs it, on one thread; returns its line for experiments.jsonl. Raises RuntimeError with the last line it printed, also
    if it was stopped: train.py ends well then, but not at its last step."""
    out = OUT / name
    words, start = command.split(), time.perf_counter()
    training = words[1] == "train.py"
    words = [sys.executable, *words[1:]]
    (ROOT / out).parent.mkdir(parents=True, exist_ok=True)
    if training:
        begun = ROOT / f"{out}.command"                 # a folder is resumed only if it is of the same command
        same = begun.is_file() and begun.read_text(encoding="utf-8") == command and (ROOT / out / "last.pt").is_file()
        begun.write_text(command, encoding="utf-8")
        words += ["--out", str(out), "--resume" if same else "--overwrite"]
    else:
        words += ["--json", f"{out}.json"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{name}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")
    if training and "\nstopped " in done.stdout:
        raise RuntimeError(f"{name}: {done.stdout.strip().splitlines()[-1]}")
    result = read_log(ROOT / out, done.stdout) if training else json.loads((ROOT / f"{out}.json").read_text(), parse_float=short)
    if "routing" in result and name != SHOWN:           # the bulky part, of which one is shown
        del result["routing"]["sentence"]
        for layer in result["routing"]["layers"]:
            del layer["collected"], layer["use"]
    return {"name": name, "command": command, "seconds": round(time.perf_counter() - start, 1), "result": result}


def short(number):
    """Eight digits of it, which is more than a page shows: the file of results is kept with the code."""
    return float(f"{float(number):.8g}")


def thinned(points):
    """At most 45 of a curve's points: the last five, of which pages show the mean, and others evenly before them."""
    return points[:-5][::max(-(-len(points) // 40), 1)] + points[-5:]


def read_log(out, printed):
    """What a training run found, from its log.csv and what it printed."""
    with open(out / "log.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    evals = [r for r in rows if r["val_loss"]]
    words = next(line for line in printed.splitlines() if line.startswith("model ")).split()
    return {"parameters": int(words[1].replace(",", "")), "tokens": int(evals[-1]["tokens"]),
            "curve": [[int(r["step"]), float(r["val_loss"])] for r in evals[:-1]],
            "train": thinned([[int(r["step"]), float(r["train_loss"])] for r in rows if r["train_loss"]][4::5]),
            "nats": float(evals[-1]["val_loss"]),
            **{key: float(evals[-1][column]) for key, column in (("bits_per_byte", "val_bpb"), ("right", "val_accuracy"))
               if evals[-1][column]}}


def run(prefixes, jobs):
    """Run what is missing, `jobs` at a time; what reads a checkpoint waits for the run that writes it."""
    known, done, failed, busy, changed = experiments(), results(), [], set(), threading.Condition()
    waiting = [name for name, command in known.items()
               if (not prefixes or name.startswith(tuple(prefixes))) and done.get(name, {}).get("command") != command]
    print(f"{len(waiting)} to run", flush=True)

    def reads(name):
        return [other for other in known if f"/{other}/" in known[name]]

    def ready(name):
        return not any(other in (*busy, *waiting) for other in reads(name))

    def work():
        while True:
            with changed:
                while waiting and not (name := next(filter(ready, waiting), None)):
                    changed.wait()
                if not waiting:
                    return
                waiting.remove(name)
                busy.add(name)
            try:
                # the checkpoint of a run that was stopped is there as well
                if lacking := [other for other in reads(name) if done.get(other, {}).get("command") != known[other]]:
                    raise RuntimeError(f"{name} reads the checkpoint of {lacking[0]}, which must be run to its end first")
                line = done[name] = run_one(name, known[name])
                with changed, open(LINES, "a", encoding="utf-8") as f:
                    f.write(json.dumps(line, separators=(",", ":")) + "\n")
                print(f"{line['seconds']:7.0f} s  {name}  {line['result'].get('nats', '')}", flush=True)
            except (RuntimeError, OSError, ValueError) as e:
                failed.append(name)
                print(f"FAILED {e}", flush=True)
            with changed:
                busy.discard(name)
                changed.notify_all()

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        sys.exit(f"experiments.run: {len(failed)} failed: {', '.join(failed)}")


def main(argv=None):
    p = parser("run", "Run the experiments of the results page.")
    p.add_argument("names", nargs="*", help="how the names of those to run begin (default: all)")
    p.add_argument("--list", action="store_true", help="only print the names and commands")
    p.add_argument("--jobs", type=int, default=max(os.cpu_count() or 1, 1), help="how many at a time (default: one per core)")
    a = p.parse_args(argv)
    if not 1 <= a.jobs <= 1024:
        p.error(f"--jobs must be from 1 to 1024, not {a.jobs}")
    if not a.list:
        run(a.names, a.jobs)
        return
    try:
        for name, command in experiments().items():
            print(f"{name:32} {command}", flush=True)
    except BrokenPipeError:                             # the reader has enough of it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
