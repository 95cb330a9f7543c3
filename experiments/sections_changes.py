"""Section 8 of the results page: the changes of variants/extended.py in language and in recall."""
import json
import math
import statistics

from data.recall import VALUES
from experiments.run import (
    BEFORE,
    CHANGES,
    FIFTH,
    IN_THE_WAY,
    LARGE,
    LR,
    MORE_RECALL,
    MORE_TASKS,
    PASSKEY,
    RATED,
    RATES,
    RECALL,
    SEEDED,
    SEEDS,
    SIZE,
    SOLVE,
    TEN,
    TEN_SEEDED,
)
from experiments.tables import HERE, NAMES, over_seeds, several, shown, spread, table, value

SEED, BENCH = SEEDS[0], HERE / "results/bench_changes.json"
FIFTH_RATES = sorted({lr for rates in FIFTH.values() for lr in rates}, key=float)


def changed(done):
    """{set of changes: nats per token} of all that were run, the unchanged memory included."""
    losses = {frozenset(name.removeprefix("changes/").rpartition("_")[0].split("+")): line["result"]["nats"]
              for name, line in done.items() if name.startswith("changes/") and name.endswith(f"_{SEED}")}
    return {frozenset(): done[f"short/sparse_{SEED}"]["result"]["nats"], **losses}


def changes_table(done):
    """Loss of every set of changes that was run, best first, beside the models of section 1 with the same seed and budget."""
    losses = changed(done)
    base = losses.pop(frozenset())
    rows = [[" ".join(f"`{option}`" for name, option in CHANGES.items() if name in some), f"{nats:.3f}", f"{nats - base:+.3f}"]
            for some, nats in sorted(losses.items(), key=lambda item: item[1])]
    for model in ("sparse", "transformer", "mamba2", "extended"):
        nats = done[f"short/{model}_{SEED}"]["result"]["nats"]
        wider = ", rows twice as wide" if model == "extended" else ""
        rows.append([f"section 1: {NAMES[model]}{wider}", f"{nats:.3f}", f"{nats - base:+.3f}" if model != "sparse" else ""])
    return table(["change", "nats per token", "difference"], rows)


def seeds_table(done):
    """The sets that were run with every seed, best first: mean and spread, and the lowest and highest."""
    runs = {"the memory as in the paper": "short/sparse", "Mamba-2": "short/mamba2", "Transformer": "short/transformer",
            "conv, gate, rows twice as wide": "short/extended", **{some.replace("+", ", "): f"changes/{some}" for some in SEEDED}}
    rows = []
    for name, path in runs.items():
        nats = [done[f"{path}_{seed}"]["result"]["nats"] for seed in SEEDS if f"{path}_{seed}" in done]
        if len(nats) == len(SEEDS):
            rows.append([name, statistics.mean(nats), f"{statistics.stdev(nats):.3f}", f"{min(nats):.3f} to {max(nats):.3f}"])
    rows = [[name, f"{mean:.3f}", *rest] for name, mean, *rest in sorted(rows, key=lambda row: row[1])]
    return table(["three seeds", "nats per token, mean", "standard deviation", "lowest to highest"], rows)


def before_lines(done):
    """The shift ahead of the convolution instead of after it."""
    pairs = [(done[f"before/{some}_{SEED}"], done[f"changes/shift+{some}_{SEED}"], " ".join(CHANGES[n] for n in some.split("+")))
             for some in BEFORE if f"before/{some}_{SEED}" in done]
    return "".join(f"`--ablation shift=before` with `{options}`, the shift ahead of the convolution: {before['result']['nats']:.3f}, "
                   f"{after['result']['nats']:.3f} after it.\n" for before, after, options in pairs)


def in_the_way_table(done):
    """A convolution and a shared row without a gate: what was tried to tell why they get in each other's way."""
    runs = {f"changes/{some}_{SEED}": " ".join(CHANGES[name] for name in some.split("+")) for some in ("conv", "shared+conv")}
    runs |= {f"conv/{name}_{SEED}": options for name, options in IN_THE_WAY.items()}
    runs[f"changes/shared+conv+gate_{SEED}"] = "--shared_row --conv 4 --gate"
    rows = [[f"`{options}`", shown(done[name]["result"]["nats"])] for name, options in runs.items() if name in done]
    return f"""A convolution and a shared row without a gate, lr 8e-3 if it is not said:

{table(["", "nats per token"], rows)}
""" if any(name.startswith("conv/") for name in done) else ""


def effects(done):
    """Mean over the other changes of what one change does: with it, less without it."""
    losses, rows = changed(done), []
    for name in CHANGES:
        moved = {some: losses[some | {name}] - nats for some, nats in losses.items() if name not in some and some | {name} in losses}
        best, worst = min(moved, key=moved.get), max(moved, key=moved.get)
        rows.append([f"`{CHANGES[name]}`", f"{statistics.mean(moved.values()):+.3f}",
                     *(f"{moved[some]:+.3f}, with {' '.join(sorted(some)) or 'nothing else'}" for some in (best, worst))])
    return table(["change", "mean difference over the eight sets of the others", "best", "worst"], rows)


def rates_table(done):
    rows = []
    for model, options in RATED.items():
        found = [over_seeds(done, f"rates/{model}_{lr}_{{}}", "right") for lr in sorted(RATES, key=float)]
        if any(found):
            name = NAMES.get(model) or (f"memory, `{options}`" if options else "memory")
            name = name if "one-head" not in model else "Transformer, one head"
            rows.append([name, *(", ".join(f"{100 * right:.1f}" for right in seeds) for seeds in found)])
    return table(["model", *(f"lr {lr}" for lr in sorted(RATES, key=float))], rows)


def by_elimination(context=64, sizes=(4, 8, 16)):
    """The share of right answers in windows of mqar for who chooses, at random, among the values that have not come in this
    round: of n that are left 1/n, and another has the same value once in 64 times; over and over to the window's end."""
    left = [n - i % n for n in sizes for i in range(context // 2 - n)]
    return statistics.mean(1 / n + (1 - 1 / n) / VALUES for n in left)


def solve_table(done):
    """The Transformer with more tokens of training, or wider."""
    rows = []
    for name in SOLVE:
        result = done.get(f"solve/{name}", {}).get("result")
        if result:
            learned = next((step * result["tokens"] // result["curve"][-1][0] for step, nats in result["curve"] if nats < 0.1), None)
            rows.append([f"`{SOLVE[name][1]}`", f"{result['parameters']:,}", f"{result['tokens'] / 1e6:.1f}",
                         f"{100 * result['right']:.1f}", f"{learned / 1e6:.1f}" if learned else "never"])
    return table(["options", "parameters", "million tokens", "right, %", "million tokens until below 0.1 nats"], rows) if rows else ""


def pairs_of(task, done):
    """The numbers of pairs, and a row of right answers in percent for each model, with the size of its state."""
    sizes, rows = [], []
    for model, options in MORE_RECALL.items():
        if runs := over_seeds(done, f"recall-{task}/{model}_{{}}", "recall"):
            sizes = [row["pairs"] for row in runs[0]["rows"]]
            rows.append([f"`{options}`", *(spread([100 * run["rows"][i]["right"] for run in runs], 1) for i in range(len(sizes))),
                         f"{runs[0]['state_bytes'] / 1024:.0f}"])
    return sizes, rows


def tasks_section(done):
    """Two more tasks, and the passkey with the changes."""
    rows = []
    for model, options in MORE_RECALL.items():
        cells = []
        for task, key, cases in (("repeat", "strings", (1, 2)), ("copy", "length", (64, 256, 1024))):
            runs = over_seeds(done, f"recall-{task}/{model}_{{}}", "recall")
            for case in cases:
                cells.append(spread([100 * row["right"] for run in runs for row in run["rows"] if row[key] == case], 1))
        if any(cells):
            rows.append([f"`{options}`", *cells])
    passkeys = []
    for model, options in {"m=64": "the memory", **{f"m=64+{name}": f"`{options}`" for name, options in PASSKEY.items()}}.items():
        runs = over_seeds(done, f"recall-passkey/{model}_{{}}", "recall")
        if runs:
            passkeys.append([options, *(spread([100 * run["rows"][i]["right"] for run in runs], 1)
                                        for i in range(len(runs[0]["rows"])))])
            heads = [f"{row['distance']:,}" for row in runs[0]["rows"]]
    if not rows:
        return ""
    text = f"""**Repeated strings and selective copying** (`--data repeat`, `--data copy`, as data/recall.py says; `{RECALL.replace(" --lr 4e-3", "")}
{MORE_TASKS["copy"]}`, the best rate of MQAR for each). Right answers in percent: strings of 16 tokens
in a window of 64 tokens; 16 values among the blanks of a window of 64 (the training length), 256 and 1,024 tokens.

{table(["model", "one string", "two strings", "copy, 64", "256", "1,024"], rows)}
"""
    sizes, rows = pairs_of("mqar256", done)
    text += f"""**Associative recall of up to {sizes[-1]} pairs** (`--data mqar {MORE_TASKS["mqar256"]}`,
the same rates and number of tokens). Right answers in percent by the number of pairs, and the state after a window:

{table(["model", *map(str, sizes), "state, KiB"], rows)}
""" if rows else ""
    sizes, rows = pairs_of("mqar-any", done)
    text += f"""**Any key asked for at any time** (`--data mqar-any {MORE_TASKS["mqar-any"]}`, the same rates), so that
nothing can be told from the values that have not come yet; choosing one of the values gets {", ".join(f"{100 / n:.1f}" for n in sizes)} %:

{table(["model", *map(str, sizes), "state, KiB"], rows)}
""" if rows else ""
    return text + (f"""**The passkey of section 5** with the changes, by the tokens in between:

{table(["model", *heads], passkeys)}
""" if len(passkeys) > 1 else "")


def name_of(model):
    """A model of the runs of ten million tokens."""
    return f"memory, `{TEN[model]}`" if TEN[model] and model not in ("transformer", "mamba2") else NAMES[model]


def overfitted(result):
    """By how much the loss was above its lowest at the end, and the training loss then, the mean of five batches."""
    curve = [loss for _, loss in result["curve"]]
    return [shown(curve[-1] - min(curve)), shown(statistics.mean(loss for _, loss in result["train"][-5:]))]


def ten_section(done, figures):
    """Ten million tokens, with and without dropout, and how much better a passage is predicted the second time."""
    rows = []
    for model in TEN:
        cells, sort = [], []
        for group in ("ten", "drop"):
            result = done.get(f"{group}/{model}_{SEED}", {}).get("result")
            nats = over_seeds(done, f"{group}/{model}_{{}}", "nats")
            cells += [several(nats), *(overfitted(result) if result else ["", ""])]
            sort.append(statistics.mean(nats or [math.inf]))
        if min(sort) < math.inf:
            repeated = next((done[f"{group}-recall/{model}"]["result"]["recall"]["rows"] for group in ("ten", "drop")
                             if f"{group}-recall/{model}" in done), [])
            gains = [shown(row["first"] - row["second"], 2) for row in repeated if row["distance"] in (0, 64, 1024)]
            rows.append((*sort, [name_of(model), *cells, *(gains or [""] * 3)]))
    head = ["", "no dropout", "rise at the end", "training", "dropout 0.1", "rise", "training", "gain, 0 between", "64", "1,024"]

    bench, = json.loads(BENCH.read_text(encoding="utf-8"))["rows"]

    def draw(figure):
        for ax, over in zip(figure.subplots(1, 2, sharey=True), ("million tokens", "minutes"), strict=True):
            for i, (model, options) in enumerate(TEN.items()):
                for group, style in (("ten", "-"), ("drop", "--")):
                    line, times = done.get(f"{group}/{model}_{SEED}"), bench["seconds"].get(model)
                    if line and times:
                        unit = 1e-6 if over == "million tokens" else times[0] / bench["tokens"] / 60
                        steps, losses = zip(*line["result"]["curve"], strict=True)
                        ax.plot([step * 2048 * unit for step in steps], losses, style, color=f"C{i}",
                                label=(NAMES.get(model) or options) + (", dropout 0.1" if group == "drop" else ""))
            ax.set(xlabel=over)
            ax.grid(alpha=0.3)
        figure.axes[0].set(ylabel="validation (a part of it), nats per token")
        figure.axes[0].legend(fontsize=7)

    return rows and f"""**Ten million tokens**: `{SIZE.replace("--eval_every 100", "--eval_every 500")} --max_steps 5000`, six passes over
the plays, lr {LR["transformer"]} for the Transformer and 8e-3 for the others (the rates of section 1), **one seed** where no spread stands. Nats per validation token; by how much
the loss (on a part of that text) had risen at the end above its lowest; the training loss at the end (mean of five single batches; with
dropout that of the thinned model). Last, without dropout, how many nats per token the loss of a passage of 64 tokens falls the
second time, with so many tokens in between. All but the first figure is of the first seed. Of dropouts only 0.1 was tried.

{table(head, [row for *_, row in sorted(rows)])}
{figures.draw("ten", (9, 4), draw, "validation loss over ten million tokens, and over minutes")}
Minutes: tokens times the time per token with nothing else running, two threads (`python -m experiments.bench_models --table changes
--out experiments/results/bench_changes.json`).

{fifth_table(done)}{large_table(done)}"""


def fifth_table(done):
    """The learning rate again, at two million tokens."""
    rows = []
    for model, rates in FIFTH.items():
        if any(f"fifth/{model}_{lr}" in done for lr in rates):
            rows.append([name_of(model), *(
                shown(value(done, f"fifth/{model}_{lr}", "nats")) if lr in rates else "" for lr in FIFTH_RATES)])
    return f"""The learning rate again, at a fifth of that budget (1,000 steps): nats per validation token.

{table(["", *(f"lr {lr}" for lr in FIFTH_RATES)], rows)}
""" if rows else ""


def large_table(done):
    """More parameters and a longer context."""
    rows = [[name_of(model), f"{line['result']['parameters']:,}", shown(line["result"]["nats"]),
             several(over_seeds(done, f"ten/{model}_{{}}", "nats")), shown(min(loss for _, loss in line["result"]["curve"])),
             *overfitted(line["result"])]
            for model in TEN_SEEDED if (line := done.get(f"large/{model}"))]
    return f"""Ten million tokens with more parameters and a longer context, `{LARGE}`, **one seed**, no dropout. Lowest:
the lowest loss on the way, on a part of the validation text, and by how much it had risen at the end; the training loss as above.

{table(["", "parameters", "nats per token", "with one million parameters", "lowest", "rise", "training"], rows)}
""" if rows else ""


def changes_section(done, figures):
    if not any(name.startswith("changes/") for name in done):
        return ""
    seeds = [done[f"short/sparse_{seed}"]["result"]["nats"] for seed in SEEDS]
    tokens = next((line["result"]["tokens"] for name, line in done.items() if name.startswith("rates/")), 0)
    return f"""## 8. A row for all tokens, a shifted write

Four changes to the sparse memory, every set of them: `{SIZE}`, lr 8e-3,
1.02 million tokens, parameters matched, **one seed** ({SEED}); an AMD EPYC, one thread each. What each does is said in
[extended.py](../variants/extended.py). The unchanged memory's three seeds lie {max(seeds) - min(seeds):.3f} nats apart, so smaller differences mean
nothing here.

{changes_table(done)}
{effects(done)}
{before_lines(done)}
{in_the_way_table(done)}With all three seeds:

{seeds_table(done)}
{ten_section(done, figures) or ''}**Associative recall at five rates** (`--data mqar {RECALL.replace("--lr 4e-3 ", "")}` as in section 5, but {tokens / 1e6:.1f} million
tokens, four times as many). Right answers in percent, of each seed that was run, over windows of 4, 8 and 16 pairs; an empty cell was
not run. All keys are asked before any is asked again, so who chooses among the values that have not come yet, and knows nothing of
what belongs together, is right in {100 * by_elimination():.1f} %: **38 to 41 % is no recall**.

{rates_table(done)}
The Transformer with more tokens, wider, with more layers, or where any key may be asked for at any time:

{solve_table(done)}
{tasks_section(done)}    python -m experiments.run changes before conv ten drop fifth large rates solve repeat copy mqar256 mqar-any passkey/m=64+ recall
"""
