"""log.csv and the loss curve."""
import contextlib
import csv
import math
import os

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values, most=60):
    """Numbers as a line of bars between the smallest and the largest of them; of more than `most`, as many at equal distances."""
    if len(values) > most:
        values = [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join(BARS[int((v - low) / span * (len(BARS) - 1) + 0.5)] if math.isfinite(v) else " " for v in values)


def draws(stream):
    """Whether a stream is a terminal that shows bars."""
    try:
        BARS.encode(stream.encoding)
        return stream.isatty()
    except (AttributeError, LookupError, TypeError, UnicodeEncodeError, ValueError):
        return False


def events(folder, step):
    """A writer of event files for TensorBoard, which leaves out what an earlier part of the run wrote after `step`. Raises
    ValueError where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--log tensorboard needs the package tensorboard; pip install tensorboard") from None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


class Log:
    """log.csv, and with `tensorboard` the same numbers as event files beside it. On resume the rows after the checkpoint are
    dropped, for those steps are done again."""
    columns = ("step", "tokens", "seconds", "train_loss", "lr", "grad_norm", "tokens_per_second",
               "val_loss", "val_bpb", "val_tokens", "val_accuracy", "skipped")

    def __init__(self, path, step, tensorboard=False):
        self.events = events(path.parent, step) if tensorboard else None
        self.rows, kept = [], path.with_name(f".{path.name}.tmp")
        if step and path.is_file():
            with open(path, newline="", encoding="utf-8") as f:     # a row that a kill cut short has columns of None
                self.rows = [row for row in csv.DictReader(f) if None not in row.values() and int(row["step"]) <= step]
        try:
            with open(kept, "w", newline="", encoding="utf-8") as f:
                writer = csv.DictWriter(f, self.columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows)
            os.replace(kept, path)
        finally:
            kept.unlink(missing_ok=True)
        self.file = open(path, "a", newline="", encoding="utf-8")   # noqa: SIM115 (open for the whole run)
        self.writer = csv.DictWriter(self.file, self.columns, lineterminator="\n")

    def write(self, **row):
        if self.events:
            for name in row.keys() - {"step"}:
                self.events.add_scalar(name, row[name], row["step"])
            self.events.flush()
        row = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        self.rows.append(row)
        try:
            self.writer.writerow(row)
            self.file.flush()
        except OSError:
            with contextlib.suppress(OSError):          # or Python tries again at its end, and complains again
                self.file.close()
            raise

    def validation(self):
        """The validation losses so far."""
        return [float(row["val_loss"]) for row in self.rows if row.get("val_loss")]

    def draw(self, path):
        try:
            import matplotlib
            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
        except ImportError:
            return
        figure, axes = plt.subplots(figsize=(7, 4))
        for column, style in (("train_loss", "-"), ("val_loss", "o-")):
            points = {int(r["step"]): float(r[column]) for r in reversed(self.rows) if r.get(column)}     # the first per step
            if points:
                axes.plot(*zip(*sorted(points.items()), strict=True), style, label=column.replace("_", " "), linewidth=1)
        axes.set(xlabel="step", ylabel="nats per token")
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120, bbox_inches="tight")
        plt.close(figure)
