"""The headline of the results page, and its sections 9 and 10: why the shared row helps, and whether a longer past does."""
import statistics

from experiments.run import CODE, MORE_TASKS, OVER, RATES, SEATED, SEEDS, SIZE, SMALL, WHY
from experiments.tables import NAMES, over_seeds, several, shown, spread, table, value

SEED = SEEDS[0]
# model: its runs at a million tokens, at ten million, its name in the recall experiments
HEADLINE = {"memory, as in the paper": ("short/sparse", "sparse", "paper"), "memory, dense": ("short/dense", "dense", None),
            "memory + shared row": ("changes/shared", "shared", "shared"),
            "memory + shared row + shift": ("changes/shared+shift", "shared+shift", "shared+shift"),
            "memory + shared row + shift + gate": ("changes/shared+shift+gate", "shared+shift+gate", None),
            "memory + all four": ("changes/shared+shift+conv+gate", "all", None),
            "memory + conv + gate": ("changes/conv+gate", "conv+gate", "conv+gate"),
            "Mamba-2": ("short/mamba2", "mamba2", "mamba2"), "Transformer": ("short/transformer", "transformer", "transformer")}


SHORT = {"mqar256": "MQAR to 64 pairs", "mqar-any": "MQAR, any key"}


def best_rate(done, model):
    """The shares of right answers of mqar, one per seed, at the rate that is best on the mean; of those that are level in whole
    percent the one of most seeds; empty before any was run."""
    found = [over_seeds(done, f"rates/{model}_{lr}_{{}}", "right") for lr in RATES]
    return max(filter(None, found), key=lambda shares: (round(statistics.mean(shares), 2), len(shares)), default=[])


def headline_table(done):
    """-> the table of language against recall against the size of the state, and (name, nats, recall, KiB) of whole rows."""
    rows, points = [], []
    for name, (short, ten, recall) in HEADLINE.items():
        tasks = {"mqar": best_rate(done, recall),
                 **{task: over_seeds(done, f"{task}/{recall}_{{}}", "right") for task in MORE_TASKS}}
        state = value(done, f"recall-repeat/{recall}_{SEED}", "recall")
        kib = state and state["state_bytes"] / 1024
        nats = [over_seeds(done, f"{group}/{ten}_{{}}", "nats") for group in ("ten", "drop")]
        rows.append([name, spread(over_seeds(done, short + "_{}", "nats")), *map(several, nats),
                     *(several([100 * share for share in shares], 1) for shares in tasks.values()), shown(kib, 0)])
        if nats[0] and kib and tasks["mqar"] and tasks["repeat"]:
            right = statistics.mean(statistics.mean(tasks[task]) for task in ("mqar", "repeat"))
            points.append((name, statistics.mean(nats[0]), right, kib))
    head = ["model", "1 million tokens, three seeds", "10 million", "the same, dropout 0.1", "MQAR, best rate, %",
            *(f"{SHORT.get(task, task)}, %" for task in MORE_TASKS), "state, KiB"]
    return table(head, rows), points


def headline(done, figures):
    """One table and one picture."""
    shown_table, points = headline_table(done)

    def draw(figure):
        ax = figure.subplots()
        for i, (name, nats, right, kib) in enumerate(points):
            ax.scatter(nats, 100 * right, s=6 * kib, color=f"C{i}", alpha=0.7)
            ax.annotate(f"{name}, {kib:.0f} KiB", (nats, 100 * right), fontsize=8, xytext=(0, 10), textcoords="offset points",
                        ha="center")
        ax.set(xlabel="language, nats per token after ten million tokens, no dropout (left is better)", ylim=(0, 115),
               ylabel="recall, right answers in %, mean of MQAR and repeat")
        ax.margins(x=0.3)
        ax.grid(alpha=0.3)

    picture = figures.draw("headline", (7.5, 4.2), draw, "language against recall against the size of the state") if points else ""
    return f"""{shown_table}
Language in nats per validation token (sections 1 and 8), recall in right answers (section 8), state of the model that was trained on
recall, after 64 tokens. **One seed** where no spread stands, else the two or three that were run; an empty cell was not run.
[docs/memory.md](../docs/memory.md) tells what it means.

{picture}"""


def why_table(done):
    """One part of the shared row at a time."""
    base = over_seeds(done, "short/sparse_{}", "nats")
    rows = [["the paper's layer", spread(base), len(base), ""]]
    for name, path in {"shared": "changes/shared", **{name: f"why/{name}" for name in WHY}}.items():
        if found := over_seeds(done, path + "_{}", "nats"):
            difference = f"{found[0] - base[0]:+.3f}" if f"{path}_{SEED}" in done else ""
            rows.append([f"`{WHY.get(name, '--shared_row')}`", spread(found), len(found), difference])
    return table(["change", "nats per token", "seeds", "difference, first seed"], rows) if len(rows) > 2 else ""


def why_section(done):
    """Section 9; empty as long as none of it was run."""
    if not (parts := why_table(done)):
        return ""
    steps = []
    for name in OVER:
        for step in range(100, 600, 100):
            runs = over_seeds(done, f"over-routing/{name}_{{}}_{step}", "routing", "layers")
            if runs:
                layers = list(zip(*runs, strict=True))
                cells = [" / ".join(f"{statistics.mean(pick(layer) for layer in seeds):.{digits}f}" for seeds in layers)
                         for pick, digits in ((lambda layer: layer["rows_used"], 1), (lambda layer: layer["entropy"], 2),
                                              (lambda layer: layer["half_life"][2], 0))]
                seat = [" / ".join(f"{statistics.mean(layer['shared_row']['half_life'] for layer in seeds):.1f}" for seeds in layers)
                        if "shared_row" in layers[0][0] else ""]
                lam = [" / ".join(f"{layer[0]['lambda']:.2f}" for layer in layers) if "lambda" in layers[0][0] else ""]
                steps.append([name, step, len(runs), *cells, *seat, *lam])
    scaling = []
    for m in sorted({m for m, _ in SEATED}):
        cells = []
        for pick in (4, m // 4):
            key = (m, pick)
            cells.append(spread(over_seeds(done, f"seated/{m}_{pick}_{{}}", "nats")) if key in SEATED else "")
        if any(cells):
            scaling.append([m, *cells])
    over = f"""**Over training**, `{OVER["shared"]}` and `--shared_row --shift` beside the paper's layer, layers 0 / 1 / 2 / 3 / 4, means over the
seeds that were run (column n): rows used (exponential of the entropy of their use; of 32, or of 31 beside the shared one), entropy of a token's
affinity in nats, median half-life of the rows in tokens; the half-life of the shared row; lambda, the part of the token before in
the routing of a write (0.12 at the start).

{table(["model", "step", "n", "rows used", "entropy", "half-life", "of the shared row", "lambda"], steps)}
""" if steps else ""
    seated = f"""**Memory scaling with the shared row** (section 3 again: `{SMALL}
--tau 0.25`), m rows beside it. Nats per token:

{table(["m", "k = 4", "k = m/4"], scaling)}
""" if scaling else ""
    return f"""## 9. Why

One part of the shared row at a time, and what might do the same without it (`{SIZE}`,
lr 8e-3, 1.02 million tokens, parameters matched, mean ± standard deviation over the seeds that were run; an AMD EPYC). What each
change is stands in [ablations.py](../variants/ablations.py). The last column is the difference to the paper's layer with seed {SEED}.

{parts}
{over}{seated}    python -m experiments.run why over seated
"""


def code_section(done):
    """Section 10; empty as long as none of it was run."""
    found = {model: done[f"code-long/{model}"]["result"]["long"] for model in CODE if f"code-long/{model}" in done}
    if not found:
        return ""
    lengths = [row["length"] for row in next(iter(found.values()))["rows"]]
    rows = [[NAMES.get(model) or f"memory, `{CODE[model]}`", *(f"{row['position']:.3f}" for row in long["rows"])]
            for model, long in found.items()]
    gains = [[NAMES.get(model) or f"memory, `{CODE[model]}`", shown(done[f"code/{model}"]["result"]["nats"]),
              *(shown(row["first"] - row["second"], 2) for row in done[f"code-long/{model}"]["result"]["recall"]["rows"])]
             for model in found]
    head = [f"{row['distance']:,}" for row in done[f"code-long/{next(iter(found))}"]["result"]["recall"]["rows"]]
    return f"""## 10. Does a longer past help?

Source code, where names come back after hundreds of tokens: Python's standard library (`python data/prepare.py --corpus stdlib`),
training context 1,024, 3.1 million tokens, sizes and rates as in section 1, **one seed**. The loss in nats per token at the second half of
windows of that length, on the same tokens for all lengths (section 2 says how):

{table(["model", *(f"{n:,}" for n in lengths)], rows)}
All of the validation text in windows of 1,024, and how many nats per token the loss of a passage of 64 tokens falls the second time,
with so many tokens in between:

{table(["model", "nats per token", *head], gains)}
    python -m experiments.run code
"""
