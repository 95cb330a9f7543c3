"""Sections 1, 2, 3 and 5 of the results page: losses and recall."""
import statistics

from experiments.run import LR, MODELS, RECALL_MODELS, ROWS, SEEDS, SMALL, TASKS, best_tau
from experiments.tables import COLORS, NAMES, over_seeds, spread, table, training_row


def short(done, bench, figures):
    sweep = [[NAMES[m], *(f"{done[f'lr/{m}_{lr}']['result']['nats']:.3f}" if f"lr/{m}_{lr}" in done else "" for lr in
                          ("2e-3", "4e-3", "8e-3", "16e-3")), LR[m]] for m in MODELS]
    rows = []
    base = over_seeds(done, "short/transformer_{}", "nats")
    for m in MODELS:
        nats = over_seeds(done, f"short/{m}_{{}}", "nats")
        if nats:
            rows.append([NAMES[m], f"{over_seeds(done, f'short/{m}_{{}}', 'parameters')[0]:,}",
                         spread(over_seeds(done, f"short/{m}_{{}}", "bits_per_byte")), spread(nats),
                         spread([a - b for a, b in zip(nats, base, strict=False)]) if m != "transformer" else ""])
    seconds = {m: training_row(bench, 128, 256)["seconds"][m][0] / 4096 for m in MODELS} if training_row(bench, 128, 256) else {}

    def draw(figure):
        axes = figure.subplots(1, 2, sharey=True)
        for m in MODELS:
            lines = [done[f"short/{m}_{seed}"]["result"]["train"] for seed in SEEDS if f"short/{m}_{seed}" in done]
            if not lines:
                continue
            steps = [s for s, _ in lines[0]]
            losses = [statistics.mean(line[i][1] for line in lines) for i in range(len(steps))]
            tokens = [s * 2048 for s in steps]
            axes[0].plot([t / 1e6 for t in tokens], losses, color=COLORS[m], label=NAMES[m], linewidth=1.2)
            if seconds:
                axes[1].plot([t * seconds[m] for t in tokens], losses, color=COLORS[m], linewidth=1.2)
        axes[0].set(xlabel="million tokens", ylabel="training loss, nats per token", ylim=(3.2, 5.2))
        axes[1].set(xlabel="seconds")
        axes[0].legend(fontsize=8)
        for ax in axes:
            ax.grid(alpha=0.3)

    return f"""## 1. Short context

Five models of one million parameters each, context 256, the default corpus, {500 * 2048:,} tokens in the same order for all with
the same seed; all that differs is what mixes the tokens, and the width of the MLP, which makes up for its parameters. The
learning rate was swept for each model alike (300 steps, one seed, validation nats per token):

{table(["model", "2e-3", "4e-3", "8e-3", "16e-3", "taken"], sweep)}
With the best rate, 500 steps, three seeds (mean ± standard deviation), on all of the validation text:

{table(["model", "parameters", "bits per byte", "nats per token", "nats beyond the Transformer's, same seed"], rows)}
{figures.draw("short", (9, 3.6), draw, "training loss over tokens and over seconds")}
(Seconds: tokens times the time per token that `python -m experiments.bench_models` finds with nothing else running.)

    python -m experiments.run lr short

"memory + conv + gate" is ours, not the paper's: `{MODELS["extended"]}` (table 7 takes it apart).
"""


def long(done, figures):
    found = {m: over_seeds(done, f"long/{m}_{{}}", "long") for m in MODELS}
    found = {m: v for m, v in found.items() if v}
    if not found:
        return ""
    lengths = [r["length"] for r in next(iter(found.values()))[0]["rows"]]
    shown = [n for n in lengths if n in (32, 128, 256, 512, 1024, 4096, 8192, 32768)]

    def values(m, key, n):
        return [next(r[key] for r in one["rows"] if r["length"] == n) for one in found[m]]

    means = [[NAMES[m], *(f"{statistics.mean(values(m, 'mean', n)):.3f}" for n in shown)] for m in found]
    rises = []
    for m in found:
        change = {n: [100 * (p / one["base"] - 1) for p, one in zip(values(m, "position", n), found[m], strict=True)] for n in shown}
        rises.append([NAMES[m], *(f"{round(statistics.mean(change[n]), 2) + 0.0:+.2f}" for n in shown[:-1]), spread(change[shown[-1]], 2)])

    def draw(figure):
        axes = figure.subplots(1, 2)
        for ax, key in zip(axes, ("mean", "position"), strict=True):
            for m in found:
                ax.plot(lengths, [statistics.mean(values(m, key, n)) for n in lengths], "o-", color=COLORS[m], label=NAMES[m],
                        markersize=3, linewidth=1.2)
            ax.axvline(256, color="grey", linestyle=":", linewidth=1)
            ax.set(xscale="log", xlabel="tokens", title="mean loss so far" if key == "mean" else "loss at that position")
            ax.grid(alpha=0.3)
        axes[0].set(ylabel="nats per token")
        axes[0].legend(fontsize=8)

    copies = []
    for m in MODELS:
        one = over_seeds(done, f"long/{m}_{{}}", "recall")
        if one:
            gains = {d: [r["first"] - r["second"] for run in one for r in run["rows"] if r["distance"] == d]
                     for d in (0, 64, 256, 1024, 4096)}
            copies.append([NAMES[m], *(spread(gains[d], 2) for d in gains)])
    return f"""## 2. Beyond the training length

The checkpoints of 1 on {found["sparse"][0]["tokens"]:,} tokens of validation text, cut into windows of 32 to 32,768 tokens, 128 times
the training length. Mean loss so far: all tokens of the windows (nats per token, mean of the seeds).

{table(["model", *(f"{n:,}" for n in shown)], means)}
Loss at that position: how much the loss on the *same* tokens rises (%) from the second half of windows of the training length to
the second half of windows of that length. Without that pairing the positions would be compared on different text.

{table(["model", *(f"{n:,}" for n in shown)], rises)}
{figures.draw("long", (9, 3.6), draw, "loss beyond the training length")}
A passage of 64 tokens read twice, so many tokens apart: how many nats per token its loss falls the second time.

{table(["model", *(f"{d:,} between" for d in (0, 64, 256, 1024, 4096))], copies)}
    python -m experiments.run long
"""


def rows_section(done, figures):
    found = {}
    for m, k in ROWS:
        tau = best_tau(m, k)
        if tau:
            found[m, k] = tau, over_seeds(done, f"rows/{m}_{k}_{tau}_{{}}", "nats")
    if not found:
        return ""
    updates = {"dense": lambda m: None, "k = 4": lambda m: 4, "k = m/4": lambda m: m // 4}
    rows, taus = [], []
    for m in sorted({m for m, _ in found}):
        cells = []
        for pick in updates.values():
            k = pick(m) if pick(m) != m else None
            tau, nats = found.get((m, k), (None, []))
            cells.append(f"{spread(nats)}, tau {tau}" if nats else "")
        rows.append([m, *cells])
    for m, k in ROWS:
        values = [done.get(f"rows/{m}_{k}_{tau}_{SEEDS[0]}") for tau in ("1", "0.5", "0.25", "0.125")]
        if any(values):
            taus.append([m, k or "dense", *(f"{v['result']['nats']:.3f}" if v else "not run" for v in values)])

    def draw(figure):
        ax = figure.subplots()
        for i, (name, pick) in enumerate(updates.items()):
            points = [(m, found[key][1]) for m in sorted({m for m, _ in found})
                      if (key := (m, pick(m) if pick(m) != m else None)) in found]
            ax.errorbar([m for m, _ in points], [statistics.mean(v) for _, v in points],
                        [statistics.stdev(v) if len(v) > 1 else 0 for _, v in points], marker="o", capsize=3, color=f"C{i}",
                        label=name, markersize=4)
        ax.set(xscale="log", xlabel="rows m", ylabel="validation, nats per token")
        ticks = sorted({m for m, _ in found})
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)

    return f"""## 3. Memory scaling

`{SMALL}`: 0.5 million parameters, 409,600 tokens. Validation nats per token by the number of rows m and of the
rows k that a token takes; tau is the best of those tried with the first seed, then three seeds.

{table(["m", *updates], rows)}
{figures.draw("rows", (5.5, 3.6), draw, "loss by rows")}
The sweep of tau, first seed:

{table(["m", "k", "tau 1", "0.5", "0.25", "0.125"], taus)}
    python -m experiments.run rows
"""


def recall_name(model):
    """The name of one of RECALL_MODELS on the page."""
    layer, comma, more = model.partition(", ")
    return NAMES.get(layer, f"memory, {layer}") + comma + more.replace("lr=", "lr ")


def recall_section(done, figures):
    text = []
    for task, key in (("mqar", "pairs"), ("passkey", "distance")):
        found = {}
        for model in RECALL_MODELS:
            runs = over_seeds(done, f"recall-{task}/{model}_{{}}".replace(", ", "+"), "recall")
            if runs:
                found[model] = runs
        if not found:
            continue
        cases = [r[key] for r in next(iter(found.values()))[0]["rows"]]
        rows = [[recall_name(model), f"{runs[0]['state_bytes'] / 1024:,.0f}",
                 *(spread([100 * r["right"] for run in runs for r in run["rows"] if r[key] == case], 1) for case in cases)]
                for model, runs in found.items()]
        text.append((task, table(["model", "state, KiB", *(f"{case:,}" for case in cases)], rows), found, cases))
    if not text:
        return ""

    def draw(figure):
        axes = figure.subplots(1, len(text), squeeze=False)[0]
        for ax, (task, _, found, cases) in zip(axes, text, strict=True):
            key = "pairs" if task == "mqar" else "distance"
            for model, runs in found.items():
                ax.plot(cases, [statistics.mean(r["right"] for run in runs for r in run["rows"] if r[key] == c) for c in cases],
                        "o-", label=recall_name(model), markersize=3, linewidth=1.2,
                        color=f"C{list(RECALL_MODELS).index(model)}")
            ax.set(xscale="log", xlabel="pairs" if task == "mqar" else "tokens in between", title=task, ylim=(0, 1.02))
            if task == "mqar":
                ax.set_xticks(cases, cases)
                ax.minorticks_off()
            ax.grid(alpha=0.3)
        axes[0].set(ylabel="share of right answers")
        figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, ncol=4, loc="upper center", bbox_to_anchor=(0.5, -0.03))

    tables = {task: shown for task, shown, _, _ in text}
    return f"""## 5. Recall

Two layers of width 64, about 110,000 parameters, trained on the task alone, all alike (lr 4e-3 where no other is named, three seeds,
the commands below; the runs at 16e-3 on an AMD EPYC); the state in bytes is that after a window of the training length. Right answers in percent.

**Multi-query associative recall** (`--data mqar {TASKS["mqar"]}`): keys with random values, then each key is
asked for; a test asks for each once. A guess among 64 values is right in 1.6 %; one among the values that were there, in 100 / pairs %. By number of pairs:

{tables.get("mqar", "not run yet")}
**A passkey** of four digits in noise (`--data passkey {TASKS["passkey"]}`): a guess is right in 10 %. By the tokens
between the passkey and the question, of which training saw at most 247:

{tables.get("passkey", "not run yet")}
{figures.draw("recall", (9, 3.6), draw, "recall")}
    python -m experiments.run mqar passkey recall
"""
