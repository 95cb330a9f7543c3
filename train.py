"""Train a Factorization Memory language model.

    python train.py                            # picks the device, the preset and the data; prints what and why
    python train.py --resume                   # goes on where the run in out/ stopped
    torchrun --nproc_per_node 2 train.py       # data parallel: the same batches, split over the processes
    torchrun --nproc_per_node 8 train.py --fsdp     # the model too is split over them (sharded.py)

Every field of Settings below is an option, `--name value`. A run writes into --out:

    last.pt   the newest checkpoint      best.pt    the one with the best validation loss
    log.csv   one row per log line       loss.png   the loss curve, where matplotlib is installed
    step-N.pt what it was after N steps, with --keep_every
    step-N/   instead of last.pt with --fsdp: every process writes its part

All that is random in a step is a function of (seed, step, process), so a resumed run continues bit for bit.
"""
import argparse
import contextlib
import csv
import dataclasses
import difflib
import math
import os
import re
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import prepare, recall
from fmem import FMem, FMemConfig, choose_scan, copy_state

HERE = Path(__file__).resolve().parent


def option(default, text):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """A run. "preset" as a default means: the value of the preset, PRESETS below."""
    # the run
    preset: str = option("auto", "values for the fields marked so: gpu, cpu, or auto (by the device)")
    out: str = option("out", "folder for checkpoints and log")
    data: str = option(str(prepare.HERE / "default"), "prepared folder (the default is made when missing), or: mqar, passkey")
    resume: bool = option(False, "continue the run in --out; options given again replace the saved ones")
    overwrite: bool = option(False, "start anew in a folder that holds a run, which is lost")
    device: str = option("auto", "cuda, mps, cpu, or auto")
    dtype: str = option("auto", "bf16 (autocast), float32, or auto: bf16 on a GPU that has it")
    fsdp: bool = option(False, "split weights, gradients and optimiser over the processes of torchrun: for models beyond one GPU")
    compile: bool = option(False, "torch.compile; falls back, saying why, where that fails")
    seed: int = option(1337, "of the weights, the order of the data and dropout")
    # the model
    n_layer: int = option("preset", "blocks")
    d_model: int = option("preset", "width")
    d_memory: int | None = option(None, "d, width of a memory row (none: d_model)")
    n_rows: int = option("preset", "m, memory rows")
    k_rows: int | None = option("preset", "k, rows a token writes and reads (none: all, the dense form)")
    tau: float = option(FMemConfig.tau, "temperature of the affinity")
    alpha_std: float = option(FMemConfig.alpha_std, "spread of the affinity's logits at initialisation")
    d_mlp: int | None = option(None, "hidden width of the MLP (none: 8/3 d_model, less what mixer, conv or gate add)")
    dropout: float = option("preset", "on the embedding and on what each layer adds")
    scan: str = option("auto", "form of the recurrence: auto, loop, chunked or kernel")
    conv: int = option(0, "not in the paper: tokens of a short convolution before the projections (0: none)")
    gate: bool = option(False, "not in the paper: an output gate")
    mixer: str = option("memory", "memory, or to compare with: attention, mamba2 (with --d_mlp none: as many parameters)")
    n_head: int | None = option(None, "heads of attention or Mamba-2 (none: of width 32, 64)")
    n_kv_head: int | None = option(None, "key and value heads of attention (none: n_head)")
    d_state: int = option(FMemConfig.d_state, "numbers per channel in Mamba-2's state")
    ablation: str = option("", "one change to the memory; ablations.py has the list")
    # the training
    context: int = option("preset", "tokens per training window")
    batch_size: int = option("preset", "windows per step, over all processes")
    carry_state: bool = option(False, "windows go on where those of the step before ended, with their state (truncated "
                                      "backpropagation through time); else each starts from an empty memory")
    micro_batch: int | None = option(None, "windows per process that go through the model at once (none: all of them)")
    max_steps: int = option("preset", "optimiser steps")
    seconds: float | None = option(None, "finish the schedule in this time (the last evaluation comes on top), if not before")
    lr: float = option("preset", "peak learning rate of AdamW")
    router_lr: float = option(1.0, "learning rate of W_alpha, times that of the rest")
    min_lr: float = option(0.05, "learning rate at the end, as a share of the peak")
    warmup: int = option(50, "steps of linear warm-up")
    beta2: float = option(0.95, "AdamW's second decay rate")
    weight_decay: float = option(0.1, "AdamW's decay of the matrices")
    clip: float = option(1.0, "largest norm of the gradient")
    max_skipped: int = option(20, "so many steps in a row skipped, for a loss or gradient that is not finite, end the run")
    # the reports
    log_every: int = option(10, "steps between log lines")
    eval_every: int = option("preset", "steps between evaluations, each followed by a checkpoint")
    keep_every: int | None = option(None, "keep a checkpoint of every so many steps (none: only the last and the best)")
    eval_tokens: int = option(32768, "validation tokens of these evaluations; the one at the end takes all")
    sample_tokens: int = option(200, "tokens of the text written at the end")


PRESETS = {
    # 12.4 M parameters, 6 epochs of the default corpus: few enough, with dropout, not to learn it by heart
    "gpu": dict(n_layer=8, d_model=384, n_rows=64, k_rows=16, dropout=0.2, context=1024, batch_size=16, max_steps=650,
                lr=3e-3, eval_every=50),
    # 1.7 M parameters, an epoch and a half
    "cpu": dict(n_layer=4, d_model=192, n_rows=32, k_rows=8, dropout=0.0, context=256, batch_size=8, max_steps=1300,
                lr=4e-3, eval_every=200),
}


# ----------------------------------------------------------------------------------------------------- the command line

def parse(argv):
    """argv -> {name: value} of the options given. Exits with one line on an unknown name or a value of another type."""
    def number(kind):
        def read(text):
            value = kind(text)
            if not -math.inf < value < math.inf:
                raise ValueError
            return value
        read.__name__ = {int: "whole number", float: "number"}[kind]
        return read

    def optional(kind):
        def read(text):
            return None if text.lower() == "none" else number(kind)(text)
        read.__name__ = f"{number(kind).__name__} (or none)"
        return read

    kinds = {int: number(int), float: number(float), str: str, int | None: optional(int), float | None: optional(float)}
    p = argparse.ArgumentParser(usage="python train.py [--name value ...]", allow_abbrev=False,
                                argument_default=argparse.SUPPRESS, description=__doc__.splitlines()[0])
    p.error = lambda message: p.exit(2, f"train.py: error: {prepare.one_line(message)}\n")
    for f in dataclasses.fields(Settings):
        shown = f.default
        if shown == "preset":
            shown = ", ".join(f"{values[f.name]} on a {name.upper()}" for name, values in PRESETS.items())
        text = f"{f.metadata['help']} [{shown}]".replace("%", "%%")
        if f.type is bool:
            p.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=text)
        else:
            p.add_argument(f"--{f.name}", type=kinds[f.type], metavar=getattr(f.type, "__name__", str(f.type)).upper(), help=text)
    dashed = {f"--{no}{f.name.replace('_', '-')}": f"--{no}{f.name}" for f in dataclasses.fields(Settings) for no in ("", "no-")}
    words = (word.partition("=") for word in (sys.argv[1:] if argv is None else argv))
    given, unknown = p.parse_known_args([dashed.get(name, name) + equals + value for name, equals, value in words])
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, [f"--{f.name}" for f in dataclasses.fields(Settings)], 1)
        p.error(f"{name} is not an option" + (f"; did you mean {near[0]}?" if near else "; --help lists them"))
    return vars(given)


def check(s):
    """Raises ValueError on settings that cannot work (the model's own are checked by FMemConfig)."""
    for name in ("context", "batch_size", "max_steps", "max_skipped", "log_every", "eval_every", "eval_tokens"):
        if getattr(s, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(s, name)}")
    for name in ("lr", "router_lr", "clip", "seconds", "micro_batch", "keep_every"):
        if getattr(s, name) is not None and getattr(s, name) <= 0:
            raise ValueError(f"--{name} must be above 0, not {getattr(s, name)}")
    for name in ("seed", "warmup", "weight_decay", "sample_tokens"):
        if getattr(s, name) < 0:
            raise ValueError(f"--{name} must be at least 0, not {getattr(s, name)}")
    if s.seed >= 2**63:
        raise ValueError(f"--seed must be below 2**63, not {s.seed}")
    for name, below in (("min_lr", 1.0000001), ("beta2", 1)):
        if not 0 <= getattr(s, name) < below:
            raise ValueError(f"--{name} must be from 0 to 1, not {getattr(s, name)}")
    if s.batch_size * s.context >= 2**31:
        raise ValueError(f"--batch_size times --context must be below 2**31 tokens, not {s.batch_size} times {s.context}")
    if s.dtype not in ("auto", "bf16", "float32"):
        raise ValueError(f"--dtype must be auto, bf16 or float32, not {s.dtype}")
    if s.resume and s.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")


def pick_device(name, local_rank=0):
    """-> torch.device, reason. Raises ValueError when it cannot be had."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name, why = (("cuda", "a GPU is here") if cuda else ("mps", "an Apple GPU is here") if mps
                     else ("cpu", "no GPU is usable here"))
    else:
        why = "as asked"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is not a device; try cuda, mps or cpu") from None
    if device.type not in ("cuda", "mps", "cpu") or (device.type == "cuda" and not cuda) or (device.type == "mps" and not mps):
        raise ValueError(f"--device {name} cannot be used here; leave it out or take cpu")
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: there are {torch.cuda.device_count()} GPUs, numbered from 0")
        torch.cuda.set_device(device)
        why += f", {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        why += f", {torch.get_num_threads()} threads"
    return device, why


def pick_dtype(name, device):
    if name != "auto":
        return (torch.bfloat16 if name == "bf16" else torch.float32), "as asked"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16, "autocast; this GPU has it"
    return torch.float32, "no fast bf16 on this GPU" if device.type == "cuda" else "bf16 is for NVIDIA GPUs"


# ------------------------------------------------------------------------------------------------------------- the data

class Batches:
    """Training windows of context + 1 tokens. Every epoch cuts the text at another offset and shuffles the windows.

    A batch is a function of (seed, step) alone, so that resuming, or splitting it over processes, changes nothing.
    """

    def __init__(self, tokens, context, batch_size, seed):
        slack = len(tokens) - 1 - context
        if slack < 0:
            raise ValueError(f"the training text has {len(tokens)} tokens; --context must be below that, not {context}")
        self.tokens, self.context, self.batch_size, self.seed = tokens, context, batch_size, seed
        self.offsets = min(context, slack + 1)                      # an epoch starts at one of these tokens
        self.per_epoch = (len(tokens) - self.offsets) // context    # windows, whatever the offset
        self.epoch = None

    def start(self, i):
        """Where window number i of the run begins."""
        epoch, j = divmod(i, self.per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.offset = epoch, rng.integers(self.offsets)
            self.order = rng.permutation(self.per_epoch)
        return self.offset + self.order[j] * self.context

    def __call__(self, step, part=slice(None)):
        """Windows `part` of the step's batch: int64 [windows, context + 1]."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)[part]
        starts = [self.start(i) for i in numbers]
        return torch.from_numpy(np.stack([self.tokens[a:a + self.context + 1] for a in starts]).astype(np.int64))


class Streams(Batches):
    """For --carry_state: the text cut into batch_size streams; window b of a step goes on where window b of the last ended.

    Every epoch begins at another offset, with new states. Also a function of (seed, step) alone.
    """

    def __init__(self, tokens, context, batch_size, seed):
        super().__init__(tokens, context, batch_size, seed)
        self.steps = self.per_epoch // batch_size
        if self.steps < 1:
            raise ValueError(f"--carry_state: the training text has no room for {batch_size} windows of {context} side by side; "
                             f"--batch_size must be at most {self.per_epoch}")

    def begins(self, step):
        """Whether the states start anew at this step."""
        return step % self.steps == 0

    def __call__(self, step, part=slice(None)):
        epoch, j = divmod(step, self.steps)
        offset = np.random.default_rng([self.seed, epoch]).integers(self.offsets)
        starts = [offset + (b * self.steps + j) * self.context for b in range(self.batch_size)[part]]
        return torch.from_numpy(np.stack([self.tokens[a:a + self.context + 1] for a in starts]).astype(np.int64))


def detached(part, device):
    """A state without the graph that made it: gradients end at the window's start."""
    if isinstance(part, (list, tuple)):
        return type(part)(detached(p, device) for p in part)
    return part.detach().to(device) if torch.is_tensor(part) else part


@torch.no_grad()
def evaluate(model, tokens, context, sizes, device, amp, limit=None, batch=8, rank=0, world=1):
    """Mean loss over consecutive windows of `context` tokens, each from an empty memory.

    Returns nats per token and bits per byte of text. limit: only the first so many tokens. sizes: bytes of each token.
    """
    model.eval()
    tokens = tokens[:limit + 1] if limit else tokens
    starts = list(range(0, len(tokens) - 1, context))
    groups = [starts[i:i + batch] for i in range(0, len(starts), batch)]
    if len(groups[-1]) > 1:                                         # the last window may be shorter: by itself
        groups[-1:] = [groups[-1][:-1], groups[-1][-1:]]
    total = torch.zeros(3, dtype=torch.float64)                     # nats, tokens, bytes
    mine = [(group, 1.0) for group in groups[rank::world]]
    if len(mine) * world < len(groups):                             # a model in parts needs all its processes every time
        mine.append((groups[-1], 0.0))
    for group, counts in mine:
        windows = np.stack([tokens[a:a + context + 1] for a in group]).astype(np.int64)
        inputs = torch.from_numpy(windows[:, :-1]).to(device)
        with amp():
            logits, _ = model(inputs)
        targets = torch.from_numpy(windows[:, 1:])
        nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten().to(device), reduction="sum")
        total += counts * torch.tensor([nats.item(), targets.numel(), sizes[targets.numpy()].sum()], dtype=torch.float64)
    if world > 1:
        total = total.to(device if device.type == "cuda" else "cpu")
        dist.all_reduce(total)
    nats, count, size = total.tolist()
    model.train()
    return nats / count, nats / math.log(2) / max(size, 1)


# ------------------------------------------------------------------------------------------------------- the checkpoint

FORMAT = "fmem checkpoint 1"


def save_checkpoint(checkpoint, path):
    """Write beside the target and rename, so that `path` is always a whole checkpoint. Raises OSError."""
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        with open(tmp, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except RuntimeError as e:                                       # what torch.save makes of a full disk
        raise OSError(str(e).splitlines()[0]) from None
    finally:
        tmp.unlink(missing_ok=True)


CONTENT = {"config": dict, "settings": dict, "tokenizer": dict | None, "corpus": str, "step": int, "best": float,
           "seconds": float}


def check_content(checkpoint):
    """Raises ValueError if what is beside the weights is not what `train` saves."""
    for name, kind in CONTENT.items():
        if not isinstance(checkpoint.get(name, ...), kind):
            raise ValueError(f"it has no {name}, or one of another kind")
    kinds = {f.name: f.type | int if isinstance(0.0, f.type) else f.type for f in dataclasses.fields(Settings)}
    wrong = [name for name, value in checkpoint["settings"].items() if not isinstance(value, kinds.get(name, ()))]
    if wrong or not {"context", "data"} <= checkpoint["settings"].keys():
        what = ", ".join(map(str, wrong)) or "some are missing"
        raise ValueError(f"its settings are not those of this version of train.py ({what})")


def load_checkpoint(path, device="cpu", form=FORMAT, maker="train.py"):
    """The dict that `train` saved; no code in the file is run. Raises ValueError, one line, if it is not that."""
    try:
        with zipfile.ZipFile(path) as parts:            # torch.load does not look at the checksums
            if parts.testzip() is not None:
                raise ValueError("it is damaged, a checksum differs")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        if checkpoint.get("format") != form:
            raise ValueError(f"not written by this version of {maker}")
        if form == FORMAT:
            check_content(checkpoint)
        return checkpoint
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; python {maker} makes one") from None
    except Exception as e:                              # a damaged or hostile file can make a reader raise anything
        raise ValueError(f"{path} cannot be read as a checkpoint: {prepare.one_line(e)}") from None


def model_from(checkpoint, device, **changes):
    """The trained model of a checkpoint, in evaluation mode; `changes` replace fields of its config (scan, say).

    Raises ValueError, one line, if the checkpoint's parts do not make one.
    """
    try:
        config, weights = FMemConfig(**{**checkpoint["config"], **changes}), checkpoint["model"]
        if not all(torch.isfinite(weight).all() for weight in weights.values()):
            raise TypeError("a weight is not a finite number")
        if 2 * config.n_parameters() > sum({w.data_ptr(): w.untyped_storage().nbytes() for w in weights.values()}.values()):
            raise TypeError(f"its config asks for {config.n_parameters():,} parameters, which it does not have")
        model = FMem(config).to(device)
        model.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f"the checkpoint does not hold a model: {prepare.one_line(e)}") from None
    return model.eval()


@torch.no_grad()
def check_state(model, state, tokens, path):
    """Raises ValueError if `state`, out of the file `path`, is none that the model can go on from with tokens [B]."""
    def shapes(part):
        return list(map(shapes, part)) if isinstance(part, (list, tuple)) else getattr(part, "shape", None)

    try:
        logits, after = model(tokens, None if state is None else copy_state(state))
        if not logits.isfinite().all():
            raise ValueError("it leads to what is no number")
        if model.config.mixer != "attention" and shapes(after) != shapes(model(tokens)[1]):    # its state grows
            raise ValueError("its shape is another")
    except Exception as e:                              # whatever a state of another shape makes the model raise
        raise ValueError(f"{path} does not hold a state of this model: {prepare.one_line(e)}") from None


def tokenizer_of(checkpoint):
    """The tiktoken.Encoding in a checkpoint. Raises ValueError if there is none that goes with the model."""
    if checkpoint["tokenizer"] is None:
        raise ValueError(f"the checkpoint was trained on {checkpoint['corpus']}, not on text; eval.py --recall tests it")
    enc, n = prepare.load_tokenizer(checkpoint["tokenizer"]), checkpoint["config"].get("vocab_size")
    if enc.n_vocab != n:
        raise ValueError(f"the checkpoint's tokenizer has {enc.n_vocab} tokens, its model {n}")
    return enc


# --------------------------------------------------------------------------------------------------------- the training

def make_optimizer(model, s, device):
    """AdamW. Decayed: the matrices of the layers. Not decayed: embedding, output layer, and what is no matrix."""
    free = {id(p) for p in model.parameters() if p.dim() < 2} | {id(model.embed.weight), id(model.head.weight)}
    router = {id(p) for name, p in model.named_parameters() if s.router_lr != 1 and name.endswith("W_alpha.weight")}
    groups = [{"params": [p for p in model.parameters() if id(p) not in free | router], "weight_decay": s.weight_decay},
              {"params": [p for p in model.parameters() if id(p) in free], "weight_decay": 0.0}]
    if router:
        groups.append({"params": [p for p in model.parameters() if id(p) in router], "weight_decay": s.weight_decay})
    return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, s.beta2), fused=device.type in ("cuda", "cpu"))


def load_moments(optimizer, saved):
    """What AdamW has learnt, from its state_dict; rates and decays stay those of the settings. Raises ValueError and others."""
    groups = optimizer.state_dict()["param_groups"]
    if [list(g["params"]) for g in saved["param_groups"]] != [g["params"] for g in groups]:
        raise ValueError("its parameters are grouped in another way (--router_lr)")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    for p, state in optimizer.state.items():
        fits = all(state[name].shape == shape for name, shape in (("exp_avg", p.shape), ("exp_avg_sq", p.shape), ("step", ())))
        if not fits or not all((value >= 0).all() and value.isfinite().all() for value in (state["step"], state["exp_avg_sq"])):
            raise ValueError("the optimiser's moments do not fit the weights")


def learning_rate(s, step, progress):
    """Linear warm-up over s.warmup steps, cosine to s.min_lr; progress is the share of the run that is done, 0 to 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
    return s.lr * min(1, (step + 1) / (s.warmup + 1)) * (s.min_lr + (1 - s.min_lr) * cosine)


def try_compile(model, batch, amp, say):
    """torch.compile, tried out on one batch; the model itself, with the reason, where that fails."""
    compiled = torch.compile(model)
    try:
        with amp():
            compiled(batch)[0].sum().backward()
    except Exception as e:                                          # whatever a compiler can raise
        say(f"compile   no: {type(e).__name__}: {str(e).strip().splitlines()[0][:160]}")
        compiled = model
    else:
        say("compile   yes")
    model.zero_grad(set_to_none=True)
    return compiled


class Stop:
    """Ctrl-C and SIGTERM end the run after the step in hand; a second one ends it at once."""

    def __enter__(self):
        self.signal, self.before = None, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):                   # not in the main thread: no handlers
                self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        self.signal = number
        self.__exit__()

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """log.csv. On resume the rows after the checkpoint are dropped: those steps are done again."""
    columns = ("step", "tokens", "seconds", "train_loss", "lr", "grad_norm", "tokens_per_second",
               "val_loss", "val_bpb", "val_tokens", "val_accuracy", "skipped")

    def __init__(self, path, step):
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
        row = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        self.rows.append(row)
        try:
            self.writer.writerow(row)
            self.file.flush()
        except OSError:
            with contextlib.suppress(OSError):          # or Python tries again at its end, and complains again
                self.file.close()
            raise

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


def settle(given, device, saved):
    """Settings from, each over the one before: defaults, preset, the resumed run, the command line."""
    preset = given.get("preset", "auto")
    if preset == "auto":
        preset = saved.get("preset", "gpu" if device.type == "cuda" else "cpu")
    if preset not in PRESETS:
        raise ValueError(f"--preset must be gpu, cpu or auto, not {preset}")
    kept = {k: v for k, v in saved.items() if k not in ("resume", "overwrite", "out")}
    s = Settings(**{**PRESETS[preset], **kept, **given, "preset": preset})
    check(s)
    return s


def train(given):
    """Run `given` ({name: value} of Settings). Returns the last checkpoint, or None on processes other than the first.

    Raises ValueError or OSError, one line, on anything the user can mend.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))

    def say(*words, **how):
        if rank == 0:
            print(*(prepare.printable(str(word)) for word in words), **how, flush=True)

    torch.set_flush_denormal(True)                      # sharp routing makes denormal decays, 3.5 times slower on a CPU
    out = Path(given.get("out", Settings.out))
    checkpoint, saved, last = None, {}, out / "last.pt"
    folder = sharded().newest(out) if any(out.glob("step-*/run.pt")) else None     # of a run with --fsdp
    if given.get("resume"):
        if not last.is_file() and not folder:
            raise ValueError(f"--resume: there is no {last}; leave --resume out to start a run")
        checkpoint = load_checkpoint(folder / "run.pt" if folder else last)
        saved = checkpoint["settings"]
    device, why_device = pick_device(given.get("device", saved.get("device", "auto")), local_rank)
    s = settle(given, device, saved)
    dtype, why_dtype = pick_dtype(s.dtype, device)
    if not s.resume and not s.overwrite and (folder or last.exists()):
        raise ValueError(f"{out} holds a run; --resume continues it, --out DIR starts another, --overwrite replaces it")
    if s.batch_size % world:
        raise ValueError(f"--batch_size {s.batch_size} cannot be split evenly over {world} processes")
    local = s.batch_size // world
    micro = min(s.micro_batch or local, local)
    if local % micro:
        raise ValueError(f"--micro_batch {micro} must divide the {local} windows that a process has")
    if s.carry_state and (world > 1 or s.data in recall.TASKS or s.mixer == "attention"):
        raise ValueError("--carry_state is for text, one process, and a mixer whose state does not grow")
    if s.resume and s.fsdp != bool(folder):
        raise ValueError(f"--resume: the run in {out} was begun {'with' if folder else 'without'} --fsdp, so it goes on")
    if s.fsdp and "WORLD_SIZE" not in os.environ:
        raise ValueError("--fsdp splits a model over processes; start them with torchrun --nproc_per_node 2 train.py --fsdp")
    if s.fsdp and s.carry_state:
        raise ValueError("--fsdp and --carry_state exclude each other")
    if world > 1 or s.fsdp:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    out.mkdir(parents=True, exist_ok=True)

    task = s.data in recall.TASKS
    if task:
        batches, vocab_size, corpus, fields = recall.Recall(s.data, s.context, s.batch_size, s.seed), recall.VOCAB, s.data, None
        targets, about, bits_per_byte = recall.Recall.targets, f"{s.data}, made anew for every step", 0.0
    else:
        if rank == 0 and Path(s.data) == prepare.HERE / "default" and not (Path(s.data) / "meta.json").is_file():
            prepare.prepare()
        if world > 1:
            dist.barrier()
        train_tokens, val_tokens, fields, meta = prepare.load(s.data)
        enc = prepare.load_tokenizer(fields)
        sizes = np.array([len(piece) for piece in prepare.token_strings(enc)])
        if len(val_tokens) < 2:
            raise ValueError(f"the validation split of {s.data} has only {len(val_tokens)} token")
        bits_per_byte = meta["train"]["tokens"] / meta["train"]["bytes"] / math.log(2)      # of the training loss
        batches = (Streams if s.carry_state else Batches)(train_tokens, s.context, s.batch_size, s.seed)
        vocab_size, corpus = enc.n_vocab, meta["corpus"]
        about = f"{corpus}: {meta['train']['bytes']:,} bytes, {len(train_tokens):,} tokens to train on"

        def targets(windows):
            return windows[:, 1:]

    names = {f.name for f in dataclasses.fields(FMemConfig)}
    config = FMemConfig(vocab_size=vocab_size, **{k: v for k, v in dataclasses.asdict(s).items() if k in names})
    step, elapsed_before, best = 0, 0.0, math.inf
    if checkpoint:
        same = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("scan", "dropout", "chunk_size")}
        try:
            before = dataclasses.asdict(FMemConfig(**checkpoint["config"]))         # with fields that are younger than it
        except TypeError as e:
            raise ValueError(f"--resume: {last} is of another version of fmem.py: {e}") from None
        differs = [k for k in same if before[k] != same[k]]
        if differs or checkpoint["tokenizer"] != fields:
            what = f"--{differs[0]}" if differs else "the tokenizer of --data"
            raise ValueError(f"--resume: {what} is not that of the run in {out}; start another with --out DIR")
        step, elapsed_before, best = checkpoint["step"], checkpoint["seconds"], checkpoint["best"]
    room = memory_of(device)
    if room and 16 * config.n_parameters() > room * (world if s.fsdp else 1):   # float32 weights, gradients and two moments
        raise ValueError(f"a model of {config.n_parameters():,} parameters needs 16 bytes for each to train, and {device} has "
                         f"{room / 2**30:.0f} GB; try a smaller --d_model, --n_layer, --n_rows or --d_mlp")
    torch.manual_seed(s.seed)
    model = FMem(config)                                # alike in every process, before it is split
    model = sharded().shard(model, device, dtype) if s.fsdp else model.to(device)
    optimizer = make_optimizer(model, s, device)
    if checkpoint and s.fsdp:
        sharded().load(folder, model, optimizer)
    elif checkpoint:
        try:
            model.load_state_dict(checkpoint["model"])
            load_moments(optimizer, checkpoint["optimizer"])
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as e:
            raise ValueError(f"--resume: {last} is not whole: {prepare.one_line(e)}") from None

    def amp():
        return torch.autocast(device.type, torch.bfloat16) if dtype == torch.bfloat16 else contextlib.nullcontext()

    n_params = sum(p.numel() for p in model.parameters())
    say(f"device    {device} ({why_device})\ndtype     {str(dtype)[6:]} ({why_dtype})")
    say("scan      {} ({})".format(*choose_scan(config.scan, device, config.n_rows, config.d_memory)))
    say(f"data      {about}")
    say("settings  " + " ".join(f"{k}={v}" for k, v in dataclasses.asdict(s).items()))
    say(f"model     {n_params:,} parameters; d_memory={config.d_memory} d_mlp={config.d_mlp} vocab_size={config.vocab_size}")
    say(f"batch     {s.batch_size} windows of {s.context} tokens = {s.batch_size * s.context:,} tokens per step, "
        f"{batches.per_epoch / s.batch_size:.1f} steps per epoch")
    if s.resume:
        say(f"resumed   {folder or last} after step {step}")
    net = try_compile(model, batches(0)[:micro, :-1].to(device), amp, say) if s.compile else model
    if world > 1 and not s.fsdp:
        net = torch.nn.parallel.DistributedDataParallel(net)

    if s.overwrite and rank == 0:
        for path in [last, out / "best.pt", *out.glob("step-*.pt"), *out.glob("step-*/run.pt")]:
            path.unlink(missing_ok=True)
            if path.name == "run.pt":
                shutil.rmtree(path.parent)
    log = Log(out / "log.csv", step) if rank == 0 else None
    start = last_time = time.perf_counter()
    states = None                                                   # of --carry_state, one per part of the batch
    if s.carry_state:
        states, kept = [None] * (local // micro), checkpoint and checkpoint.get("states")
        if isinstance(kept, list) and len(kept) == len(states):     # else they start anew: --micro_batch is another
            states = detached(kept, device)
            for state in states:
                check_state(model, state, torch.zeros(micro, dtype=torch.long, device=device), last)
    smooth, pending, last_step, skipped, in_a_row, saved_at = None, [], step, 0, 0, step if checkpoint else None

    def snapshot(**weights):
        weights = weights or {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        return {"format": FORMAT, "config": dataclasses.asdict(config), "settings": dataclasses.asdict(s),
                "tokenizer": fields, "corpus": corpus, **weights, "step": step, "best": best,
                "seconds": elapsed_before + time.perf_counter() - start,
                # all that the order of the data and every random draw to come depend on
                "states": states,
                "random": {"seed": s.seed, "next_step": step, "next_window": step * s.batch_size}}

    def validate(limit, name):
        if task:                                        # every process does all of it: it is little
            loss, right = batches.evaluate(model, device, amp, batch=micro)
            say(f"{name:9s} step {step}: {loss:.4f} nats per answer, {right:.2%} right")
            if rank == 0:
                log.write(step=step, tokens=step * s.batch_size * s.context, val_loss=loss, val_accuracy=right,
                          seconds=elapsed_before + time.perf_counter() - start)
            return loss
        loss, bpb = evaluate(model, val_tokens, s.context, sizes, device, amp, limit, micro, rank, world)
        count = min(limit or len(val_tokens), len(val_tokens) - 1)
        say(f"{name:9s} step {step}: validation {loss:.4f} nats per token, {bpb:.4f} bits per byte ({count:,} tokens)")
        if rank == 0:
            log.write(step=step, tokens=step * s.batch_size * s.context, seconds=elapsed_before + time.perf_counter() - start,
                      val_loss=loss, val_bpb=bpb, val_tokens=count)
        return loss

    def save(path=last):
        nonlocal saved_at
        if s.fsdp and path.name != "best.pt":
            if saved_at != step:
                sharded().save(out, step, model, optimizer, lambda run: save_checkpoint(snapshot(model=None), run),
                               keep=lambda n: s.keep_every and n % s.keep_every == 0)
            saved_at = step
        elif s.fsdp:                                            # whole, so that sample.py and eval.py need nothing else
            weights = sharded().full_weights(model)
            sharded().everywhere(lambda: rank or save_checkpoint(snapshot(model=weights), path), f"cannot write {path}")
        elif rank == 0:
            save_checkpoint(snapshot(), path)

    def validate_and_save():
        nonlocal best
        loss = validate(s.eval_tokens, "eval")
        better = loss < best                                    # never, if it is not a number
        best = loss if better else best
        for path in [last] + [out / "best.pt"] * better:
            save(path)

    def keep():
        save(out / f"step-{step}.pt")

    if s.keep_every and step == 0:
        keep()

    with Stop() as stop:
        while True:
            # Every process must take the same decision: the first one's clock and anybody's signal count.
            elapsed = elapsed_before + time.perf_counter() - start
            progress, stopped = max(step / s.max_steps, elapsed / s.seconds if s.seconds else 0), bool(stop.signal)
            if world > 1:
                word = torch.tensor([progress if rank == 0 else 0.0, float(stopped)], dtype=torch.float64, device=device)
                dist.all_reduce(word)
                progress, stopped = word[0].item(), word[1].item() > 0
            if progress >= 1 or stopped:
                break
            lr = learning_rate(s, step, progress)
            for group, times in zip(optimizer.param_groups, (1, 1, s.router_lr)):  # noqa: B905 (the third is optional)
                group["lr"] = lr * times
            torch.manual_seed(int(np.random.SeedSequence([s.seed, step, rank]).generate_state(1)[0]))   # dropout
            mine = batches(step, slice(rank * local, (rank + 1) * local))
            parts, losses = mine.to(device).split(micro), []
            if s.carry_state and batches.begins(step):
                states = [None] * len(parts)
            for i, windows in enumerate(parts):
                # gradients of several parts add up here before the processes exchange them
                if s.fsdp:
                    model.set_requires_gradient_sync(i == len(parts) - 1)
                with net.no_sync() if world > 1 and not s.fsdp and i < len(parts) - 1 else contextlib.nullcontext():
                    with amp():
                        logits, state = net(windows[:, :-1], states[i] if states else None)
                        loss = F.cross_entropy(logits.float().flatten(0, 1), targets(windows).flatten())
                    ((loss + model.aux_loss()) * len(windows) / local).backward()
                losses.append(loss.detach() * len(windows) / local)
                if states:
                    states[i] = detached(state, device)
            norm, loss = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip), torch.stack(losses).sum()
            norm = norm.full_tensor() if s.fsdp else norm
            if world > 1:
                dist.all_reduce(loss)
            if torch.isfinite(norm + loss):             # the same for all processes: the gradient is their mean
                optimizer.step()
                pending.append(loss / world)
                in_a_row = 0
            else:                                       # nothing of it may reach the weights
                skipped, in_a_row, states = skipped + 1, in_a_row + 1, states and [None] * len(parts)
                say(f"skipped   step {step + 1}: loss {loss.item() / world:.4g}, norm of the gradient {norm.item():.4g}")
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if in_a_row == s.max_skipped:
                save()
                raise ValueError(f"the loss or its gradient was not finite in {in_a_row} steps in a row; {out} has "
                                 f"the weights from before them: --resume --lr {s.lr / 3:.1g} may go on from there")
            if (step % s.log_every == 0 or step == s.max_steps) and pending:
                mean, now = torch.stack(pending).mean().item(), time.perf_counter()
                smooth = mean if smooth is None else 0.8 * smooth + 0.2 * mean
                speed = (step - last_step) * s.batch_size * s.context / (now - last_time)
                share = max(step / s.max_steps, (elapsed_before + now - start) / s.seconds if s.seconds else 0)
                left = (elapsed_before + now - start) * (1 - share) / share
                bits = f" | {smooth * bits_per_byte:.3f} bits/byte" if bits_per_byte else ""
                say(f"step {step}/{s.max_steps} | loss {smooth:.4f}{bits} | lr {lr:.2e} | "
                    f"grad {norm.item():.2f} | {speed:,.0f} tokens/s | {left:.0f} s left")
                if rank == 0:
                    log.write(step=step, tokens=step * s.batch_size * s.context, seconds=elapsed_before + now - start,
                              train_loss=mean, lr=lr, grad_norm=norm.item(), tokens_per_second=speed, skipped=skipped)
                pending, last_step, last_time = [], step, now
            if step % s.eval_every == 0:
                validate_and_save()
                last_time = time.perf_counter()
            if s.keep_every and step % s.keep_every == 0:
                keep()
        if step % s.eval_every and not stopped:
            validate_and_save()
    if stopped:
        save()
        where = "" if out == Path("out") else f" --out {out}"
        say(f"stopped   after step {step}, saved; python train.py --resume{where} goes on")
    else:
        validate(None, "final")
        if rank == 0:
            log.draw(out / "loss.png")
            took, where = elapsed_before + time.perf_counter() - start, f" --checkpoint {out / 'best.pt'}"
            if task:
                say(f"done      {took:.0f} s; python eval.py {out / 'best.pt'} --recall says more")
            else:
                if not s.fsdp:                          # one process alone has no whole model
                    write_sample(model, enc, s.sample_tokens, device)
                say(f"done      {took:.0f} s; python sample.py{'' if out == Path('out') else where} writes more")
    if world > 1 or s.fsdp:
        # Freed while gloo's thread still lets go of the last result, DDP waits for that thread with Python's lock in hand,
        # which the thread waits for: forever. So give it a moment.
        time.sleep(0.5)
        dist.destroy_process_group()
    if rank == 0:
        return snapshot(model=None) if s.fsdp else snapshot()


def sharded():
    """The module for --fsdp, loaded only where it is used."""
    import sharded
    return sharded


def memory_of(device):
    """Bytes of memory of the GPU, or of the machine; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def write_sample(model, enc, n, device):
    model.eval()
    generator = torch.Generator(device).manual_seed(0)
    prompt = torch.tensor([[enc.eot_token]], device=device)
    pieces = prepare.token_strings(enc)
    text = b"".join(pieces[token.item()] for token in model.generate(prompt, n, 0.8, top_p=0.95, generator=generator))
    print("sample    " + prepare.printable(text.decode("utf-8", "replace")).replace("\n", "\n          "), flush=True)


def say_and_end(message):
    """At once: no destructor waits for a process that is no more."""
    print(f"train.py: error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # a console that cannot show a character must not end a run
    given = parse(argv)
    try:
        train(given)
    except (ValueError, OSError) as e:
        sys.exit(f"train.py: error: {prepare.one_line(e)}")
    except (MemoryError, RuntimeError) as e:
        if dist.is_available() and dist.is_initialized() and re.search("gloo|nccl|peer|socket", str(e), re.IGNORECASE):
            say_and_end(f"another process of this run has ended ({str(e).strip().splitlines()[-1][:200]}); "
                        f"--resume goes on from the last checkpoint, with any number of processes that divides --batch_size")
        if not isinstance(e, MemoryError | torch.OutOfMemoryError) and "allocate" not in str(e):
            raise
        why = (str(e).strip() or "Python has no more").splitlines()[0]
        sys.exit(f"train.py: error: out of memory ({why}); try a smaller --micro_batch, --context or model")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; what was saved before stays")


if __name__ == "__main__":
    main()
