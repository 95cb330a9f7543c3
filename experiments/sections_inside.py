"""Sections 4, 6 and 7 of the results page: speed, what the rows do, ablations."""
import json
import statistics

import numpy as np

from experiments.run import ABLATIONS, MODELS, SEEDS, SIZE, SPREAD
from experiments.tables import COLORS, HERE, NAMES, over_seeds, spread, table


def draw_generation(figure, generation, first):
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

    cpu = json.loads((HERE / "results/bench_cpu_xeon.json").read_text(encoding="utf-8"))["rows"]
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
change: {alone:.3f} of it after 131,072 tokens in `python -m experiments.bench_scan`, where it is alone.)

{table(["texts", *head], steps)}
Tokens per second of a prompt of that length and 256 tokens written, one text, over those of the sparse memory (the Transformer's
prompts beyond 16,384 tokens, quadratic in length, were left out):

{table(head, prompts)}
Bytes of the state of one text, MiB:

{table(head, sizes)}
{figures.draw("generation", (9, 3.4), lambda figure: draw_generation(figure, generation, first), "time of a token by context")}
    python -m experiments.bench_models --out experiments/results/bench_models.json
"""


def draw_over(figure, over):
    axes = figure.subplots(1, 4, sharex=True)
    for j, (m, points) in enumerate(over.items()):
        for ax, key, title in ((axes[2 * j], "entropy", "entropy"), (axes[2 * j + 1], "rows_used", "rows used")):
            for i in range(len(points[0][1]["layers"])):
                ax.plot([s for s, _ in points], [r["layers"][i][key] for _, r in points], "o-", markersize=3, label=f"layer {i}")
            ax.set(title=f"{NAMES[m]}\n{title}", xlabel="step")
            ax.title.set_fontsize(9)
            ax.grid(alpha=0.3)
    axes[0].legend(fontsize=7)


def draw_map(figure, sentence):
    axes = figure.subplots(len(sentence["alpha"]), 1, sharex=True)
    for i, (ax, alpha) in enumerate(zip(axes, sentence["alpha"], strict=True)):
        ax.imshow(np.array(alpha).T, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        ax.set(ylabel=f"layer {i}")
    words = [w.replace("\n", "\\n").replace("$", r"\$") for w in sentence["tokens"]]
    axes[-1].set_xticks(range(len(words)), words, rotation=90, fontsize=8)


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
    text.append(f"""`python -m experiments.evaluate CHECKPOINT --routing` on the checkpoints of 1 (32 rows, validation text, mean of the seeds). Entropy: of the
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

    if over:
        text.append(figures.draw("routing", (12, 2.8), lambda figure: draw_over(figure, over), "entropy and use of the rows over training"))
    text.append("Alpha over a sentence (memory, k = m/4; rows of the memory from top to bottom):\n")
    text.append(figures.draw("alpha", (10, 8), lambda figure: draw_map(figure, shown["sparse"][0]["sentence"]), "alpha over a sentence"))
    layer = shown["sparse"][0]["layers"][0]
    most = sorted(range(len(layer["use"])), key=lambda r: -layer["use"][r])[:8]
    text.append("The eight rows of layer 0 that are used most, and the tokens that they take most often beyond their average:\n")
    text.append(table(["row", "share of the writes, %", "tokens"], [[r, f"{100 * layer['use'][r]:.1f}", " ".join(
        f"`{w!r}`".replace("|", "\\|") for w in layer["collected"][r])] for r in most]))
    text.append("    python -m experiments.run routing\n")
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
`--ablation` is said in [ablations.py](../variants/ablations.py).

{table(["change", "nats per token", "difference"], rows)}
Rows used (of 32, as in section 6) by layer, first seed: the collapse can be had less, at no gain.

{table(["change", *(f"layer {i}" for i in range(5))], spreads)}
    python -m experiments.run ablation
"""
