"""Fill the tables of docs/results.md from lab/results/runs.jsonl, and draw its figure.

    python -m lab.results

A table, or nothing without raw lines, stands after its mark. The figure needs matplotlib.
"""

import json
import re
import statistics
from collections import defaultdict

from lab.experiments import ROOT, RUNS, SHAPES, read_runs

PAGE = ROOT / "docs/results.md"
FIGURE = ROOT / "docs/results-ten.png"
NAMES = {
    "paper": "memory, as in the paper",
    "dense": "memory, dense",
    "ours": "memory + all four changes",
    "mamba2": "Mamba-2",
    "conv+gate,wide": "memory + conv + gate, wide",
}
MAIN = ("paper", "ours", "transformer", "transformer+conv", "mamba2")  # in the figure


def collect(done, group):
    """{(model, rate): {seed: line}} of a group, in the order of the file."""
    groups = defaultdict(dict)
    for name, line in done.items():
        in_group, _, run = name.partition("/")
        if in_group == group:
            model, rate, seed = run.rsplit("_", 2)
            groups[model, rate][seed] = line
    return groups


def values(lines, key):
    return [line["result"][key] for line in lines.values()]


def mean_std(numbers, digits=3):
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
        return model.capitalize().replace("+", " + ").replace("-", ", ", 1).replace("-", " ")
    changes = model.removeprefix("paper+").replace("shared", "shared row")
    return "memory + " + changes.replace("+", " + ")


def table(heads, rows):
    """A table of Markdown; "" without rows."""
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def language(done):
    rows = []
    for group in ("short", "short-8e-3", "extensions", "wide"):
        for (model, rate), lines in collect(done, group).items():
            nats = values(lines, "nats")
            bits = mean_std(values(lines, "bits_per_byte"))
            parameters = f"{max(values(lines, 'parameters')):,}"
            row = [label(model), parameters, rate, len(lines), mean_std(nats), bits]
            rows.append((statistics.mean(nats), row))
    heads = ["model", "parameters", "rate", "seeds", "nats per token", "bits per byte"]
    return table(heads, [row for _, row in sorted(rows)])


def rates(done, key, *groups):
    """A sweep of learning rates, whose runs may be in several groups."""
    swept = defaultdict(dict)
    for group in groups:
        for run, lines in collect(done, group).items():
            swept[run] |= lines
    columns = sorted({rate for _, rate in swept}, key=float)
    rows = []
    for model in dict.fromkeys(model for model, _ in swept):
        cells = [values(swept[model, rate], key) for rate in columns]
        cells = [mean_std(numbers, 3 if key == "nats" else 1) for numbers in cells]
        rows.append([label(model), *cells])
    return table(["model", *columns], rows)


def rise(lines):
    """How far the first run's loss on a part of the text ends above its lowest value."""
    for line in lines.values():
        losses = [loss for _, loss in line["result"]["validation"]]
        return f"{losses[-1] - min(losses):.3f}"


def ten(done):
    rows = []
    for (model, rate), lines in collect(done, "ten").items():
        nats = values(lines, "nats")
        bits = mean_std(values(lines, "bits_per_byte"))
        row = [label(model), rate, len(lines), mean_std(nats), bits, rise(lines)]
        large = collect(done, "large").get((model, rate), {})
        row += [mean_std(values(large, "nats")), rise(large) or ""]
        rows.append((statistics.mean(nats), row))
    heads = ["model", "rate", "seeds", "nats per token", "bits per byte", "rise", "3.6 M", "rise"]
    return table(heads, [row for _, row in sorted(rows)])


def long(done):
    """The loss in windows longer than those of the training, mean of the seeds."""
    rows = []
    lengths = (256, 512, 1024, 4096, 16384, 32768)
    for (model, _), lines in {**collect(done, "long"), **collect(done, "long-wide")}.items():
        losses = defaultdict(list)
        for line in lines.values():
            for result in line["results"]:
                losses[result["length"]].append(result["at_end"])
        rows.append([label(model), *(f"{statistics.mean(losses[n]):.3f}" for n in lengths)])
    return table(["model", *(f"{n:,}" for n in lengths)], rows)


def rows_of_memory(done):
    groups = collect(done, "rows")
    rows = []
    for m, k in SHAPES:
        cells = [groups.get((f"{name}m={m},k={k}", "8e-3"), {}) for name in ("", "shared,")]
        if any(cells):
            rows.append([m, k, *(mean_std(values(lines, "nats")) for lines in cells)])
    return table(["m", "k", "paper's layer", "with a shared row"], rows)


def harder(done):
    """Right answers in percent, by number of pairs and by distance of the passkey."""
    right = defaultdict(lambda: defaultdict(list))
    for group, key in (("recall256-pairs", "pairs"), ("passkey-distances", "distance")):
        for (model, _), lines in collect(done, group).items():
            for line in lines.values():
                for result in line["results"]:
                    right[model][key, result[key]].append(100 * result["right"])
    columns = list(dict.fromkeys(column for row in right.values() for column in row))
    rows = [[label(m), *(mean_std(row[c], 1) for c in columns)] for m, row in right.items()]
    return table(["model", *(f"{key} {hard:,}" for key, hard in columns)], rows)


def routing(done):
    """What the rows do, layer by layer; the mean of the seeds, of the median row the median."""
    rows = []
    for (model, _), lines in {**collect(done, "routing"), **collect(done, "routing-wide")}.items():
        cells = [[], [], [], []]
        for layer in zip(*(line["results"] for line in lines.values()), strict=True):
            used = statistics.mean(result["rows_used"] for result in layer)
            touched = statistics.mean(result["rows_per_token"] for result in layer)
            fastest = statistics.mean(result["half_life"][0] for result in layer)
            middle = statistics.median(result["half_life"][2] for result in layer)
            texts = [f"{used:.1f}", f"{touched:.1f}", f"{fastest:.1f}", f"{middle:,.0f}"]
            for cell, text in zip(cells, texts, strict=True):
                cell.append(text)
        rows.append([label(model), *(" / ".join(cell) for cell in cells)])
    heads = ["model", "rows used", "by a token", "half-life, fastest row", "median row"]
    return table(heads, rows)


def default(done):
    """Runs of train.py: bits per byte of each seed at each rate, by command and processor."""
    runs = defaultdict(lambda: defaultdict(list))
    for group in ("default", "tinyshakespeare", "character-rates", "characters"):
        for (_, rate), lines in collect(done, group).items():
            for line in lines.values():
                command = line["command"].partition(" --lr")[0]
                runs[f"`{command}`", line["processor"]][rate].append(line)
    rows = []
    for run, by_rate in runs.items():
        cells = []
        for rate in sorted(by_rate, key=float):
            bits = [f"{line['result']['bits_per_byte']:.3f}" for line in by_rate[rate]]
            cells.append(f"{rate}: {', '.join(bits)}")
        rows.append([*run, "; ".join(cells)])
    return table(["command", "on", "rate: bits per byte of each seed"], rows)


def speed(done):
    """Times by context, as multiples of another model's, and the bytes of the largest state."""
    lines = (RUNS.parent / "bench.jsonl").read_text(encoding="utf-8").splitlines() if done else []
    heads = ["model"]
    rows = {model: [label(model)] for model in MAIN if lines}
    for bench, beside in (("train", "transformer"), ("generate", "paper")):
        for line in [line for line in map(json.loads, lines) if line["bench"] == bench][::2]:
            heads.append(f"{bench} {line['context']:,}")
            for model, row in rows.items():
                row.append(f"{line['seconds'][model] / line['seconds'][beside]:.2f}")
    for model, row in rows.items():
        row.append(f"{line['state_bytes'][model]:,}")
    return table([*heads, "bytes"], list(rows.values()))


TABLES = {
    "language": language,
    "rates": lambda done: rates(done, "nats", "rates", "edge"),
    "ten": ten,
    "long": long,
    "rows": rows_of_memory,
    "recall": lambda done: rates(done, "percent_right", "recall-rates", "recall-heads", "recall"),
    "harder": harder,
    "routing": routing,
    "default": default,
    "speed": speed,
}


def fill(text, done):
    """The page with the table after each mark."""

    def replace(match):
        return "\n".join([f"<!-- {match[1]} -->", TABLES[match[1]](done)]).rstrip() + "\n"

    return re.sub(r"<!-- ([\w-]+) -->\n(?:\|.*\n)*", replace, text)


def draw(done):
    """The validation losses over ten million tokens, first seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.5))
    axes = figure.subplots()
    for (model, _), lines in collect(done, "ten").items():
        if model in MAIN:
            result = next(iter(lines.values()))["result"]
            steps, nats = zip(*result["validation"], strict=True)
            tokens = [step * result["tokens"] / steps[-1] for step in steps]
            axes.plot(tokens, nats, "o-", markersize=3, label=label(model))
    axes.set(xlabel="tokens (validation on a part of the text)", ylabel="nats per token")
    axes.set_xscale("log")
    axes.legend(fontsize=8)
    figure.savefig(FIGURE, dpi=80, bbox_inches="tight", metadata={"Software": None})


def main():
    done = read_runs()
    filled = fill(PAGE.read_text(encoding="utf-8"), done)
    PAGE.write_text(filled, encoding="utf-8", newline="\n")
    draw(done)


if __name__ == "__main__":
    main()
