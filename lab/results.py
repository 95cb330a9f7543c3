"""Fill the tables of docs/results.md from lab/results/*.jsonl, and draw its figures.

    python -m lab.results

A table is what stands between a mark with its name and the end mark; the words around it are
written by hand. A table without raw lines is left empty. Figures need matplotlib.
"""

import json
import re
import statistics
import sys
from collections import defaultdict

from data.tokenizer import one_line
from lab.experiments import GROUPS, ROOT, SHAPES, read_runs

PAGE = ROOT / "docs/results.md"
BENCH = ROOT / "lab/results/bench.jsonl"
NAMES = {
    "paper": "memory, as in the paper",
    "dense": "memory, dense",
    "ours": "memory + all four changes",
    "transformer": "Transformer",
    "transformer+conv": "Transformer + conv",
    "mamba2": "Mamba-2",
    "conv+gate,wide": "memory + conv + gate, wide",
}
MAIN = ("paper", "ours", "transformer", "transformer+conv", "mamba2")  # of the figures


def collect(done, group):
    """{(model, rate): {seed: line}} of a group, in the order of the file."""
    found = defaultdict(dict)
    for name, line in done.items():
        in_group, _, run = name.partition("/")
        if in_group == group:
            model, rate, seed = run.rsplit("_", 2)
            found[model, rate][seed] = line
    return found


def values(lines, key):
    return [line["result"][key] for line in lines.values()]


def spread(numbers, digits=3):
    """Mean ± standard deviation, or the only number there is."""
    if not numbers:
        return ""
    mean = f"{statistics.mean(numbers):.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def label(model):
    """What the page calls a model: the memory with these changes, if it has no name of its own."""
    if model in NAMES:
        return NAMES[model]
    if model.startswith("transformer"):
        return model.replace("transformer-", "Transformer, ").replace("-", " ")
    changes = model.removeprefix("paper+").replace("shared", "shared row")
    return "memory + " + changes.replace("+", " + ")


def table(heads, rows):
    """A table of Markdown; "" without rows."""
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def figure(name, text, xlabel, curves):
    """Draw {label: (x, y)} to docs/results-NAME.png; returns the Markdown that shows it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = PAGE.with_name(f"results-{name}.png")
    drawing, axes = pyplot.subplots(figsize=(6.5, 3.5))
    for curve, (x, y) in curves.items():
        axes.plot(x, y, "o-", markersize=3, label=curve)
    axes.set(xlabel=xlabel, ylabel="nats per token", xscale="log")
    axes.legend(fontsize=8)
    drawing.savefig(path, dpi=80, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(drawing)
    return f"![{text}]({path.name})"


def language(done):
    rows = []
    for group in ("short", "extensions"):
        for (model, rate), lines in collect(done, group).items():
            nats = values(lines, "nats")
            bits = spread(values(lines, "bits_per_byte"))
            parameters = f"{max(values(lines, 'parameters')):,}"
            row = [label(model), parameters, rate, len(lines), spread(nats), bits]
            rows.append((statistics.mean(nats), row))
    heads = ["model", "parameters", "rate", "seeds", "nats per token", "bits per byte"]
    return table(heads, [row for _, row in sorted(rows)])


def rates(done, group="rates"):
    """A sweep of learning rates."""
    swept = collect(done, group)
    columns = GROUPS[group].rates
    rows = []
    for model in dict.fromkeys(model for model, _ in swept):
        cells = [spread(values(swept.get((model, rate), {}), "nats")) for rate in columns]
        rows.append([label(model), *cells])
    return table(["model", *columns], rows)


def ten(done):
    rows = []
    curves = {}
    for (model, rate), lines in collect(done, "ten").items():
        nats = values(lines, "nats")
        first = next(iter(lines.values()))["result"]
        losses = [loss for _, loss in first["validation"]]
        large = spread(values(collect(done, "large").get((model, rate), {}), "nats"))
        rise = f"{losses[-1] - min(losses):.3f}"
        row = [label(model), rate, len(lines), spread(nats), rise, large]
        rows.append((statistics.mean(nats), row))
        if model in MAIN:
            last_step = first["validation"][-1][0]
            tokens = [step * first["tokens"] / last_step for step, _ in first["validation"]]
            curves[label(model)] = (tokens, losses)
    heads = ["model", "rate", "seeds", "nats per token", "rise", "3.6 million parameters"]
    found = table(heads, [row for _, row in sorted(rows)])
    if not curves:
        return found
    text = "validation loss over ten million tokens"
    return found + "\n\n" + figure("ten", text, "tokens (validation on a part of the text)", curves)


def long(done):
    rows = []
    curves = {}
    shown = (256, 512, 1024, 4096, 16384, 32768)
    for (model, _), lines in collect(done, "long").items():
        losses = defaultdict(list)
        for line in lines.values():
            for result in line["results"]:
                losses[result["length"]].append(result["at_end"])
        means = {length: statistics.mean(column) for length, column in losses.items()}
        curves[label(model)] = (list(means), list(means.values()))
        rows.append([label(model), *(f"{means[n]:.3f}" if n in means else "" for n in shown)])
    if not rows:
        return ""
    picture = figure("long", "loss by length of the window", "tokens of the window", curves)
    return table(["model", *(f"{n:,}" for n in shown)], rows) + "\n\n" + picture


def rows_of_memory(done):
    groups = collect(done, "rows")
    rows = []
    for m, k in SHAPES:
        cells = [groups.get((f"{name}m={m},k={k}", "8e-3"), {}) for name in ("", "shared,")]
        if any(cells):
            rows.append([m, k, *(spread(values(lines, "nats")) for lines in cells)])
    return table(["m", "k", "paper's layer", "with a shared row"], rows)


def shares(done, group, kind, key):
    """Right answers in percent, by what makes the task hard; kind: the results that are meant."""
    rows = []
    heads = []
    for (model, rate), lines in collect(done, group).items():
        found = defaultdict(list)
        for line in lines.values():
            for result in line["results"]:
                if result["result"] == kind:
                    found[result[key]].append(100 * result["right"])
        heads = [f"{hard:,}" for hard in found]
        cells = [spread(numbers, 1) for numbers in found.values()]
        rows.append([label(model), rate, len(lines), *cells])
    return table(["model", "rate", "seeds", *heads], rows)


def routing(done):
    """What the rows do, layer by layer; the mean of the seeds, of the median rows the median."""
    rows = []
    for (model, _), lines in collect(done, "routing").items():
        layers = list(zip(*(line["results"] for line in lines.values()), strict=True))
        used = [statistics.mean(result["rows_used"] for result in layer) for layer in layers]
        touched = [
            statistics.mean(result["rows_per_token"] for result in layer) for layer in layers
        ]
        fastest = [statistics.mean(result["half_life"][0] for result in layer) for layer in layers]
        middle = [statistics.median(result["half_life"][2] for result in layer) for layer in layers]
        cells = [" / ".join(f"{v:.1f}" for v in column) for column in (used, touched, fastest)]
        rows.append([label(model), *cells, " / ".join(f"{v:,.0f}" for v in middle)])
    heads = ["model", "rows used", "by a token", "half-life, fastest row", "median row"]
    return table(heads, rows)


def default(done):
    rows = []
    for group in ("default", "tinyshakespeare"):
        on = defaultdict(list)  # the lines of a model by processor
        for (model, _), lines in collect(done, group).items():
            for line in lines.values():
                on[model, line["processor"]].append(line)
        for (_, processor), lines in on.items():
            command = lines[0]["command"].partition(" --lr")[0]
            bits = [f"{line['result']['bits_per_byte']:.3f}" for line in lines]
            seconds = [line["seconds"] for line in lines]
            cells = [", ".join(bits), ", ".join(map(str, seconds))]
            rows.append([f"`{command}`", processor, *cells])
    return table(["command", "on", "bits per byte of each seed", "seconds"], rows)


def speed(_):
    """What lab.bench measured, the newest line of each shape and device; times as ratios."""
    newest = {}
    lines = BENCH.read_text(encoding="utf-8").splitlines() if BENCH.is_file() else []
    for line in map(json.loads, lines):
        shape = {k: v for k, v in line.items() if isinstance(v, int) and k != "threads"}
        what = " ".join([line["bench"], line.get("direction", ""), json.dumps(shape)[1:-1]])
        newest[line["device"], what.replace('"', "")] = line
    rows = []
    for (device, what), line in newest.items():
        beside = next(iter(line["seconds"]))
        milliseconds = 1e3 * line["seconds"][beside]
        ratios = [f"{k} {v / line['seconds'][beside]:.2f}" for k, v in line["seconds"].items()]
        rows.append([device, what, f"{beside} {milliseconds:.2f} ms", ", ".join(ratios)])
    return table(["on", "what", "one", "times that"], rows)


TABLES = {
    "language": language,
    "rates": rates,
    "ten": ten,
    "long": long,
    "rows": rows_of_memory,
    "recall-rates": lambda done: rates(done, "recall-rates"),
    "recall": lambda done: shares(done, "recall-pairs", "recall", "pairs"),
    "recall256": lambda done: shares(done, "recall256-pairs", "recall", "pairs"),
    "passkey": lambda done: shares(done, "passkey-distances", "passkey", "distance"),
    "routing": routing,
    "default": default,
    "speed": speed,
}


def fill(text, done):
    """The page with every table between its marks. Raises ValueError for an unknown name."""

    def replace(match):
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
        return f"<!-- {name} -->\n{TABLES[name](done)}\n<!-- end -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


def main():
    try:
        filled = fill(PAGE.read_text(encoding="utf-8"), read_runs())
    except (ImportError, ValueError, OSError) as error:
        sys.exit(f"lab.results: error: {one_line(error)}")
    PAGE.write_text(filled, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
