"""Draws every figure and writes every table of RESULTS.md, and the results section of README.md, from results/: python report.py

Reads results/experiments.jsonl (experiments.py writes it) and results/bench_models.json (`python bench.py --models` does).
What has not been run yet is left out, with a line that says so. Needs matplotlib for the figures; without it the text alone.
"""
import json
import statistics
import sys
from pathlib import Path

from experiments import ABLATIONS, LR, MODELS, RECALL_MODELS, ROWS, SEEDS, SIZE, SMALL, SPREAD, TASKS, best_tau, results

HERE = Path(__file__).resolve().parent
NAMES = {"sparse": "memory, k = m/4", "dense": "memory, dense", "transformer": "Transformer", "mamba2": "Mamba-2",
         "extended": "memory + conv + gate"}
COLORS = {"sparse": "C0", "dense": "C1", "transformer": "C2", "mamba2": "C3", "extended": "C4"}


def spread(values, digits=3):
    """mean ± standard deviation over the seeds."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f} (one seed)" if values else ""
    mean = round(statistics.mean(values), digits) + 0.0     # no "-0.00"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def over_seeds(done, name, *keys):
    """The value under result[keys...] for each seed that has been run; name has a {} for the seed."""
    found = []
    for seed in SEEDS:
        line = done.get(name.format(seed))
        if line:
            value = line["result"]
            for key in keys:
                value = value[key]
            found.append(value)
    return found


class Figures:
    """Draws, or with draw=False only names, the figures."""

    def __init__(self, draw=True):
        self.plt = None
        if draw:
            try:
                import matplotlib
                matplotlib.use("Agg")
                import matplotlib.pyplot as plt
                self.plt = plt
            except ImportError:
                print("report.py: no matplotlib, so the figures stay as they are", file=sys.stderr)

    def draw(self, name, size, f, text):
        """f(figure) draws it; returns the Markdown that shows it."""
        if self.plt:
            figure = self.plt.figure(figsize=size)
            f(figure)
            figure.savefig(HERE / "results" / f"{name}.png", dpi=80, bbox_inches="tight", metadata={"Software": None})
            self.plt.close(figure)
        return f"![{text}](results/{name}.png)\n"


# ------------------------------------------------------------------------------------------------------------ experiments

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
(Seconds: tokens times the time per token that `python bench.py --models` finds with nothing else running.)

    python experiments.py run lr short

"memory + conv + gate" is ours, not the paper's: `{MODELS["extended"]}` (table 7 takes it apart).
"""


def training_row(bench, d, T):
    return next((r for r in bench if r["table"] == "training" and r["d_model"] == d and r["T"] == T), None)


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
Loss at that position: how much worse (%) the *same* tokens are foreseen in the second half of windows of that length than
in the second half of windows of the training length. Without that pairing the positions would be compared on different text.

{table(["model", *(f"{n:,}" for n in shown)], rises)}
{figures.draw("long", (9, 3.6), draw, "loss beyond the training length")}
A passage of 64 tokens read twice, so many tokens apart: by how many nats per token it is foreseen better the second time.

{table(["model", *(f"{d:,} between" for d in (0, 64, 256, 1024, 4096))], copies)}
    python experiments.py run long
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
    python experiments.py run rows
"""


def speed(bench, figures):
    training = [r for r in bench if r["table"] == "training"]
    generation = [r for r in bench if r["table"] == "generation"]
    if not training:
        return "## 4. Speed\n\nNot measured yet.\n"
    rows = [[r["d_model"], r["T"], *(f"{r['seconds']['transformer'][0] / r['seconds'][m][0]:.2f}" for m in MODELS),
             f"{r['seconds']['mamba2'][0] / r['seconds']['sparse'][0]:.2f}"] for r in training]
    peaks = [[r["T"], *(f"{r['peak_bytes'][m] / 2**20:.0f}" for m in MODELS)] for r in training if "peak_bytes" in r]
    first = {B: next(r for r in generation if r["B"] == B)["token_seconds"]["sparse"][0] for B in (1, 16)}
    steps = [[r["B"], f"{r['context']:,}", *(f"{r['token_seconds'][m][0] / first[r['B']]:.2f}" if m in r["token_seconds"] else "-"
                                             for m in MODELS)] for r in generation]
    prompts = []
    for r in generation:
        if r["prompt_seconds"]:
            cells = []
            for m in MODELS:
                t = r["prompt_seconds"].get(m)
                total = t and t[0] + 256 * r["token_seconds"][m][0]
                cells.append(f"{(r['prompt_seconds']['sparse'][0] + 256 * r['token_seconds']['sparse'][0]) / total:.2f}" if t else "-")
            prompts.append([f"{r['context']:,}", *cells])
    sizes = [[f"{r['context']:,}", *(f"{r['state_bytes'][m] / 2**20:.2f}" for m in MODELS)] for r in generation if r["B"] == 1]

    def draw(figure):
        axes = figure.subplots(1, 2, sharey=True)
        for ax, B in zip(axes, (1, 16), strict=True):
            for m in MODELS:
                points = [(r["context"], r["token_seconds"][m][0] / first[B]) for r in generation
                          if r["B"] == B and m in r["token_seconds"]]
                ax.plot(*zip(*points, strict=True), "o-", color=COLORS[m], label=NAMES[m], markersize=3, linewidth=1.2)
            ax.set(xscale="log", yscale="log", xlabel="context", title=f"{B} text{'s' * (B > 1)}")
            ax.grid(alpha=0.3)
        axes[0].set(ylabel="time of a token (memory at 1k = 1)")
        axes[0].legend(fontsize=8)

    cpu = json.loads((HERE / "results/bench_cpu.json").read_text(encoding="utf-8"))["rows"]
    alone = next(r["last_over_first"] for r in cpu if r["table"] == "context" and r["B"] == 1)
    head = ["context", *(NAMES[m] for m in MODELS)]
    return f"""## 4. Speed, beside the others

Two cores, no GPU, float32, PyTorch, nothing else running, all models alternated in one process, medians, as ratios. Nothing here
says anything about a GPU. Training speed in tokens per second over the Transformer's (above 1: faster), 4,096 tokens per step;
last column: the sparse memory's speed over Mamba-2's.

{table(["d_model", *head, "memory / Mamba-2"], rows)}
Peak memory of a training step, MiB beyond the weights, d_model 256:

{table(head, peaks)}
The time of one more token after a context, d_model 128, over that of the sparse memory after 1,024 tokens with as many texts. (The
models take turns, and a Transformer's cache of hundreds of MB empties the processor's for the next one: the memory's own step does not
change: {alone:.3f} of it after 131,072 tokens in `python bench.py`, where it is alone.)

{table(["texts", *head], steps)}
Tokens per second of a prompt of that length and 256 tokens written, one text, over those of the sparse memory (the Transformer's
prompts beyond 16,384 tokens, quadratic in length, were left out):

{table(head, prompts)}
Bytes of the state of one text, MiB:

{table(head, sizes)}
{figures.draw("generation", (9, 3.4), draw, "time of a token by context")}
    python bench.py --models --out results/bench_models.json
"""


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
        rows = [[NAMES.get(model, "memory, " + model), f"{runs[0]['state_bytes'] / 1024:,.0f}",
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
                        "o-", label=NAMES.get(model, "memory, " + model), markersize=3, linewidth=1.2,
                        color=f"C{list(RECALL_MODELS).index(model)}")
            ax.set(xscale="log", xlabel="pairs" if task == "mqar" else "tokens in between", title=task, ylim=(0, 1.02))
            if task == "mqar":
                ax.set_xticks(cases, cases)
                ax.minorticks_off()
            ax.grid(alpha=0.3)
        axes[0].set(ylabel="share of right answers")
        axes[0].legend(fontsize=7, loc=(0.35, 0.42))

    tables = {task: shown for task, shown, _, _ in text}
    return f"""## 5. Recall

Two layers of width 64, about 110,000 parameters, trained on the task alone, all alike (lr 4e-3, three seeds, the commands below);
the state in bytes is that after a window of the training length. Right answers in percent.

**Multi-query associative recall** (`--data mqar {TASKS["mqar"]}`): keys with random values, then each key is
asked for; a test asks for each once. A guess among 64 values is right in 1.6 %; one among the values that were there, in 100 / pairs %. By number of pairs:

{tables.get("mqar", "not run yet")}
**A passkey** of four digits in noise (`--data passkey {TASKS["passkey"]}`): a guess is right in 10 %. By the tokens
between the passkey and the question, of which training saw at most 247:

{tables.get("passkey", "not run yet")}
{figures.draw("recall", (9, 3.6), draw, "recall")}
    python experiments.py run mqar passkey recall
"""


def routing_section(done, figures):
    text = ["## 6. What the rows do\n"]
    shown = {m: over_seeds(done, f"routing/{m}_{{}}", "routing") for m in ("sparse", "dense", "extended")}
    shown = {m: v for m, v in shown.items() if v}
    if not shown:
        return ""
    rows = []
    for m, runs in shown.items():
        for i in range(len(runs[0]["layers"])):
            def cell(f, digits=2, i=i, runs=runs):
                return f"{statistics.mean(f(run['layers'][i]) for run in runs):.{digits}f}"
            rows.append([NAMES[m], i, cell(lambda s: s["entropy"]), cell(lambda s: s["rows_per_token"], 1),
                         cell(lambda s: s["rows_used"], 1), cell(lambda s: 100 * s["dead"], 0), cell(lambda s: 100 * s["moves"], 0),
                         cell(lambda s: 100 * s["moves_if_random"], 0), cell(lambda s: 100 * s["told_by_token"], 0),
                         cell(lambda s: 100 * s["told_by_most_common"], 0), cell(lambda s: s["eta"][0]), cell(lambda s: s["mu"][0]),
                         cell(lambda s: s["half_life"][0], 1), cell(lambda s: s["half_life"][2], 0)])
    text.append(f"""`python eval.py CHECKPOINT --routing` on the checkpoints of 1 (32 rows, validation text, mean of the seeds). Entropy: of the
softmax of eq. 4, in nats (ln 32 = 3.47). Rows per token, rows used: exp of the entropy of alpha after the top k, of one token and of
the average token. Dead: rows that get less than a tenth of an equal share. Moves: how often the top row differs from that of the
token before, and how often it would if the choices were shuffled. Told by token: how often the token alone, by its most frequent row
in the first half of the text, tells the top row in the second half; by most common: how often the most common row does. Half-life:
tokens after which half of what a row holds is overwritten, of the fastest and of the median row.

{table(["model", "layer", "entropy", "rows per token", "rows used", "dead %", "moves %", "if shuffled %", "told by token %",
        "by most common %", "eta", "mu", "half-life, fastest", "median"], rows)}""")
    over = {m: [(step, done[f"routing/{m}_{SEEDS[0]}_{step}"]["result"]["routing"]) for step in range(0, 500, 100)
                if f"routing/{m}_{SEEDS[0]}_{step}" in done]
            + [(500, done[f"routing/{m}_{SEEDS[0]}"]["result"]["routing"])]
            for m in ("sparse", "extended") if f"routing/{m}_{SEEDS[0]}" in done}

    def draw_over(figure):
        axes = figure.subplots(1, 4, sharex=True)
        for j, (m, points) in enumerate(over.items()):
            for ax, key, title in ((axes[2 * j], "entropy", "entropy"), (axes[2 * j + 1], "rows_used", "rows used")):
                for i in range(len(points[0][1]["layers"])):
                    ax.plot([s for s, _ in points], [r["layers"][i][key] for _, r in points], "o-", markersize=3, label=f"layer {i}")
                ax.set(title=f"{NAMES[m]}\n{title}", xlabel="step")
                ax.title.set_fontsize(9)
                ax.grid(alpha=0.3)
        axes[0].legend(fontsize=7)

    def draw_map(figure):
        import numpy as np
        sentence = shown["sparse"][0]["sentence"]
        axes = figure.subplots(len(sentence["alpha"]), 1, sharex=True)
        for i, (ax, alpha) in enumerate(zip(axes, sentence["alpha"], strict=True)):
            ax.imshow(np.array(alpha).T, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest")
            ax.set(ylabel=f"layer {i}")
        words = [w.replace("\n", "\\n").replace("$", r"\$") for w in sentence["tokens"]]
        axes[-1].set_xticks(range(len(words)), words, rotation=90, fontsize=8)

    if over:
        text.append(figures.draw("routing", (12, 2.8), draw_over, "entropy and use of the rows over training"))
    text.append("Alpha over a sentence (memory, k = m/4; rows of the memory from top to bottom):\n")
    text.append(figures.draw("alpha", (10, 8), draw_map, "alpha over a sentence"))
    layer = shown["sparse"][0]["layers"][0]
    most = sorted(range(len(layer["use"])), key=lambda r: -layer["use"][r])[:8]
    text.append("The eight rows of layer 0 that are used most, and the tokens that they take most often beyond their average:\n")
    text.append(table(["row", "share of the writes, %", "tokens"], [[r, f"{100 * layer['use'][r]:.1f}", " ".join(
        f"`{w!r}`".replace("|", "\\|") for w in layer["collected"][r])] for r in most]))
    text.append("    python experiments.py run routing\n")
    return "\n".join(text)


def ablation_section(done):
    base = over_seeds(done, "ablation/base_{}", "nats")
    rows = []
    for name, options in ABLATIONS.items():
        nats = over_seeds(done, f"ablation/{name}_{{}}", "nats")
        if nats:
            rows.append([f"`{options}`" if options else "the sparse memory as it is", spread(nats),
                         spread([a - b for a, b in zip(nats, base, strict=False)]) if options and len(nats) == len(base) else ""])
    if not rows:
        return ""
    spreads = [[f"`{ABLATIONS[name] or 'as it is'}`", *(f"{layer['rows_used']:.1f}" for layer in line["result"]["routing"]["layers"])]
               for name in SPREAD if (line := done.get(f"ablation-routing/{name}"))]
    return f"""## 7. Ablations

One change each to the sparse memory (`{SIZE}`, lr 8e-3, {200 * 2048:,} tokens, three seeds); in the last column the
difference to the unchanged memory with the same seed (negative: better). `--conv` and `--gate` are ours; what is changed by
`--ablation` is said in [ablations.py](ablations.py).

{table(["change", "nats per token", "difference"], rows)}
Rows used (of 32, as in section 6) by layer, first seed: the collapse can be had less, at no gain.

{table(["change", *(f"layer {i}" for i in range(5))], spreads)}
    python experiments.py run ablation
"""


# ------------------------------------------------------------------------------------------------------------- the pages

def reach(done, bench):
    """What was asked of the models, and what came out."""
    rows = []

    def compare(a, b):
        x, y = (over_seeds(done, f"short/{m}_{{}}", "bits_per_byte") for m in (a, b))
        return [p - q for p, q in zip(x, y, strict=False)]

    for a, b, asked in (("sparse", "transformer", "below 0"), ("dense", "transformer", "below 0"),
                        ("extended", "mamba2", "at most 0")):
        difference = compare(a, b)
        if difference:
            rows.append([f"{NAMES[a]} against {NAMES[b]}, bits per byte, same seed", asked, spread(difference)])
    for m in MODELS:
        runs = over_seeds(done, f"long/{m}_{{}}", "long")
        if runs:
            rises = [100 * (run["rows"][-1]["position"] / run["base"] - 1) for run in runs]
            rows.append([f"{NAMES[m]}: loss by position at 128 times the training length, rise in %",
                         "below 2" if m not in ("transformer", "mamba2") else "", spread(rises, 2)])
    row = training_row(bench, 256, 512)
    if row:
        for m in ("sparse", "dense"):
            rows.append([f"{NAMES[m]}: training speed over the Transformer's, context 512", "1.0",
                         f"{row['seconds']['transformer'][0] / row['seconds'][m][0]:.2f}"])
            rows.append([f"{NAMES[m]}: training speed over Mamba-2's, context 512", "1.4",
                         f"{row['seconds']['mamba2'][0] / row['seconds'][m][0]:.2f}"])
    generation = [r for r in bench if r["table"] == "generation"]
    for B in (1, 16):
        one = [r["token_seconds"]["sparse"][0] for r in generation if r["B"] == B]
        if one:
            rows.append([f"{NAMES['sparse']}: a token after 131,072 over one after 1,024, {B} text{'s' * (B > 1)}", "flat",
                         f"{one[-1] / one[0]:.2f}"])
    return table(["", "asked", "reached"], rows)


def survives(did):
    """What the tests of endurance did at full length: the table of the README's section."""
    def count(*names, what="mutations"):
        return f"{sum(did[name][what] for name in names):,}"

    damaged = "mutations_checkpoint", "mutations_state", "mutations_in_parts", "mutations_data", "mutations_corpora"
    wrong = "wrong_content_sample", "wrong_content_eval", "wrong_content_resume", "wrong_content_state"
    killed, prepared, large, agree = did["killed"], did["prepare_killed"], did["prepare_large"], did["step_and_chunks"]
    longest = [name for name in did if name.startswith("long_prompt_")]
    rows = [
        ["training killed (SIGKILL) at random moments, a checkpoint after every step",
         f"{killed['kills']} kills, {killed['half']} while a checkpoint was half written",
         "resumed each time; weights, optimiser and log as without, bit for bit"],
        ["data/prepare.py killed", f"{prepared['kills']} kills, {prepared['resumed']} with finished files to go on from",
         "the same bytes as without"],
        ["bits turned, pieces lost, zeroed, doubled or put in: checkpoints, checkpoints in parts, states, prepared folders, corpora",
         f"{count(*damaged)} files", f"{count(*damaged, what='refused')} refused in one line, the others loaded to the same, or as text"],
        ["whole files with wrong content (fields, shapes, NaN, sizes), for sample.py, eval.py, --resume, --load-state",
         f"{count(*wrong, what='files')} files", f"{count(*wrong, what='refused')} refused in one line, the others worked"],
        ["prepared folders changed and signed anew with right checksums", f"{count('mutations_data_resigned')} folders",
         f"{count('mutations_data_resigned', what='refused')} refused in one line, the others read"],
        ["prompts of any bytes: control sequences, half characters, lone surrogates", f"{did['prompts']['prompts']:,} prompts",
         "answered; nothing printed can steer a terminal"],
        ["prompts of 10 MB: text, one letter, spaces, no spaces, any bytes", f"{len(longest)} prompts", "answered"],
        ["generation without end", f"{did['endless_generation']['tokens']:,} tokens",
         f"memory grew by {did['endless_generation']['growth_percent']:.2f} %, all finite"],
        ["reading without end", f"{did['endless_reading']['tokens']:,} tokens",
         f"memory grew by {did['endless_reading']['growth_percent']:.2f} %, all finite"],
        ["the same text step by step and in chunks, float32", f"{agree['tokens']:,} tokens",
         f"logits differ by {agree['logits']:.0e}, states by {agree['state']:.0e}"],
        ["a corpus of .txt, .jsonl and .jsonl.gz", f"{large['bytes'] / 1e9:.2f} GB, {large['workers']} cores",
         f"{large['peak_mb']} MB of memory at most; {large['mb_per_second']:.1f} MB/s (tiktoken alone: "
         f"{large['tiktoken_mb_per_second']:.1f})"],
        ["one of two processes of torchrun killed, the model whole in each or split (--fsdp)",
         f"resumed with {did['dead_process']['resumed_with']} and {did['dead_process--fsdp']['resumed_with']}",
         "the run ends in one line; then the losses of one process, to rounding"]]
    return table(["what", "how much", "what happened"], rows)


START, END = "<!-- written by report.py -->\n", "<!-- end -->\n"


def pages(draw=True):
    """{path: text} of the pages; with draw the figures are drawn, too."""
    done, path = results(), HERE / "results/bench_models.json"
    bench = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    figures = Figures(draw)
    sections = [short(done, bench, figures), long(done, figures), rows_section(done, figures), speed(bench, figures),
                recall_section(done, figures), routing_section(done, figures), ablation_section(done)]
    conclusions = (HERE / "results/conclusions.md").read_text(encoding="utf-8").strip()
    page = f"""# Results

Written by `python report.py` from results/experiments.jsonl and results/bench_models.json: no number here is typed by hand.
`python experiments.py list` shows every command, `python experiments.py run` runs what is missing, one per core on one thread each.
All of it on two cores of an Intel Xeon virtual machine (AVX-512, no GPU), PyTorch 2.13.0, float32. The models have a million
parameters or fewer and read a million tokens or fewer: enough to tell the mixers apart at this size, and no more than that. Another
number of threads rounds differently and moves the third decimal.

## What was asked, and what came out

{reach(done, bench)}
{conclusions}

""" + "\n".join(section for section in sections if section)
    rows = []
    for m in MODELS:
        runs = over_seeds(done, f"long/{m}_{{}}", "long")
        if runs:
            far = [100 * (run["rows"][-1]["position"] / run["base"] - 1) for run in runs]
            rows.append([NAMES[m], spread(over_seeds(done, f"short/{m}_{{}}", "bits_per_byte")), spread(far, 1)])
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    tables = [table(["", "bits per byte, context 256", "loss 128 times beyond the training length, %"], rows),
              survives(json.loads((HERE / "results/survives.json").read_text(encoding="utf-8")))]
    text, *rest = readme.split(START)
    for body, part in zip(tables, rest, strict=True):
        text += START + "\n" + body + "\n" + END + part.split(END, 1)[1]
    return {HERE / "RESULTS.md": page, HERE / "README.md": text}


def main():
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
