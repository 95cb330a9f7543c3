"""Section 8 of the results page: the changes of variants/extended.py in language and in recall."""
import statistics

from experiments.run import CHANGES, RATED, RATES, RECALL, SEEDED, SEEDS, SIZE
from experiments.sections_memory import tasks_section, ten_section
from experiments.tables import NAMES, table

SEED = SEEDS[0]


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
        found = [done.get(f"rates/{model}_{lr}_{SEED}") for lr in sorted(RATES, key=float)]
        if any(found):
            name = NAMES.get(model) or (f"memory, `{options}`" if options else "memory")
            rows.append([name, *(f"{100 * line['result']['right']:.1f}" if line else "" for line in found)])
    return table(["model", *(f"lr {lr}" for lr in sorted(RATES, key=float))], rows)


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
With all three seeds:

{seeds_table(done)}
{ten_section(done, figures) or ''}**Associative recall at five rates** (`--data mqar {RECALL.replace("--lr 4e-3 ", "")}` as in section 5, but {tokens / 1e6:.1f} million
tokens, four times as many; **one seed**). Right answers in percent, over windows of 4, 8 and 16 pairs; an empty cell was not run.

{rates_table(done)}
{tasks_section(done)}    python -m experiments.run changes ten drop rates repeat copy passkey/m=64+ recall
"""
