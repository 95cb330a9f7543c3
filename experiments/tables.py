"""What the sections of the results page share: names and colours, Markdown tables, means over seeds, figures."""
import statistics
import sys
from pathlib import Path

from experiments.run import SEEDS

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


def several(values, digits=3):
    """As `spread`, but of one seed the number alone."""
    return spread(values, digits) if len(values) > 1 else "".join(shown(value, digits) for value in values)


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


def training_row(bench, d, T):
    return next((r for r in bench if r["table"] == "training" and r["d_model"] == d and r["T"] == T), None)


def value(done, name, key):
    return done[name]["result"][key] if name in done else None


def shown(number, digits=3):
    return "" if number is None else f"{number:.{digits}f}"
