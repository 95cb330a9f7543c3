"""Train a Factorization Memory language model.

    python train.py                                  # chooses device and preset, and prints why
    python train.py --resume                         # continues the run in out/
    python train.py --data data/mine --out out/mine  # on a folder from data/prepare.py
    torchrun --nproc_per_node 2 train.py             # the same batches, split over two processes
    torchrun --nproc_per_node 8 train.py --fsdp      # also shards the model

Every field of Settings is an option. A run writes these files to --out:

    last.pt    the latest checkpoint: all that --resume needs, on any number of processes
    best.pt    the weights with the lowest validation loss, for sample.py and look.py
    step-N.pt  with --keep_every: the checkpoint after N steps; to resume it, rename it to last.pt
    log.csv    one row per log line and per evaluation
    loss.png   the loss curves, if matplotlib is installed

All randomness in a step is derived from the seed, the step, the position in the data and the
process. So on a CPU a resumed run matches an uninterrupted one bit for bit, including log.csv
except its column seconds. This requires the same number of threads and processes, and no --seconds.
"""

import argparse
import contextlib
import io
import math
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from data import prepare
from data.tokenizer import load_tokenizer, one_line, printable, token_bytes
from fmem import FORMAT, FactorizationMemory, FMem, FMemConfig, load


def option(default, text, gpu=None, minimum=1):
    """A field of Settings. gpu: its value in the preset "gpu", if that differs."""
    text += f" [{default}]" if gpu is None else f" [{default}, gpu: {gpu}]"
    return field(default=default, metadata=dict(help=text, gpu=gpu, minimum=minimum))


@dataclass
class Settings:
    """The settings of a run. Raises ValueError for invalid ones; FMemConfig checks the model's.

    The defaults are the preset "cpu": 1.7 M parameters, 1.5 epochs of the default corpus. The
    preset "gpu" has 12.4 M parameters and 6 epochs, few enough not to overfit with dropout.
    """

    preset: str = option("auto", "gpu, cpu, or auto (depends on the device)")
    out: str = option("out", "folder for checkpoints and the log")
    data: str = option("data/default", "prepared folder; the default one is created if missing")
    resume: bool = option(False, "continue the run in --out; other options override its settings")
    overwrite: bool = option(False, "delete the run in --out and start a new one")
    device: str = option("auto", "cuda, cpu, mps, or auto (cuda if available)")
    dtype: str = option("auto", "bf16 (autocast), float32, or auto")
    fsdp: bool = option(False, "shard weights and optimiser state across torchrun's processes")
    compile: bool = option(False, "use torch.compile")
    threads: int | None = option(None, "CPU threads (None: PyTorch's default)")
    seed: int = option(1337, "random seed for weights, data order and dropout", minimum=0)

    n_layer: int = option(4, "number of blocks", gpu=8)
    d_model: int = option(192, "width of the residual stream", gpu=384)
    d_memory: int | None = option(None, "d, width of a memory row (None: d_model)")
    n_rows: int = option(32, "m, number of memory rows", gpu=64)
    k_rows: int | None = option(8, "k, rows that a token writes and reads (None: all)", gpu=16)
    tau: float = option(FMemConfig.tau, "temperature of the affinity", minimum=0)
    d_mlp: int | None = option(None, "hidden width of the MLP (None: 8/3 d_model)")
    dropout: float = option(0.0, "on the embedding and each branch's output", gpu=0.2, minimum=0)
    tie_embeddings: bool = option(True, "the output layer shares the embedding's weights")
    recompute: bool = option(False, "to save memory, recompute the scan in the backward pass")

    context: int = option(256, "tokens per training window", gpu=1024)
    batch_size: int = option(8, "windows per step, across all processes", gpu=16)
    micro_batch: int | None = option(None, "windows per process and forward pass (None: all)")
    max_steps: int = option(1300, "optimiser steps", gpu=650)
    seconds: float = option(math.inf, "wall-clock limit; the learning rate schedule adapts to it")
    lr: float = option(4e-3, "AdamW's peak learning rate", gpu=3e-3, minimum=0)
    min_lr: float = option(0.05, "final learning rate, as a fraction of the peak", minimum=0)
    warmup: int = option(50, "steps of linear warm-up", minimum=0)
    beta2: float = option(0.95, "AdamW's beta2", minimum=0)
    weight_decay: float = option(0.1, "AdamW's weight decay, on matrices in the blocks", minimum=0)
    clip: float = option(1.0, "clip the gradient to this norm (0: no clipping)", minimum=0)
    max_skipped: int = option(20, "stop after this many non-finite steps in a row")

    log_every: int = option(10, "steps between log lines")
    eval_every: int = option(200, "steps between evaluations; each writes a checkpoint", gpu=50)
    eval_tokens: int = option(32768, "validation tokens per evaluation; the final one uses all")
    keep_every: int | None = option(None, "steps between step-N.pt checkpoints (None: none)")

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            minimum = f.metadata["minimum"]
            infinite = value == math.inf and f.name != "seconds"
            if type(value) in (int, float) and (infinite or not value >= minimum):  # or NaN
                raise ValueError(f"--{f.name} must be finite and at least {minimum}, not {value}")
        for name, values in (("preset", "auto gpu cpu"), ("dtype", "auto bf16 float32")):
            if getattr(self, name) not in values.split():
                raise ValueError(f"--{name} must be one of {values}, not {getattr(self, name)}")
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite cannot be combined")
        self.data = os.path.relpath(self.data)  # so that a moved checkout can be resumed


# Not stored in a checkpoint, so that it can be resumed on another machine or in another way.
NOT_SAVED = ("out", "resume", "overwrite", "device", "fsdp")


def int_or_none(text):
    return None if text.lower() == "none" else int(text)


def make_parser(prog):
    """A parser with an option per field of Settings. Its result has only the options given."""
    parser = argparse.ArgumentParser(
        prog, argument_default=argparse.SUPPRESS, allow_abbrev=False, description=__doc__[:50]
    )
    parser.error = lambda message: parser.exit(2, f"{prog}: error: {printable(message)}\n")
    for f in fields(Settings):
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": f.type if isinstance(f.type, type) else int_or_none, "metavar": ""}
        parser.add_argument(f"--{f.name}", help=f.metadata["help"], **kind)
    return parser


def resolve(given, saved, device):
    """The Settings: the given values first, then those of the resumed run, then the preset's."""
    preset = given.get("preset", saved.get("preset", "auto"))
    if preset == "auto":
        preset = "gpu" if device.type == "cuda" else "cpu"
    values = {}
    if preset == "gpu":
        values = {f.name: f.metadata["gpu"] for f in fields(Settings) if f.metadata["gpu"]}
    return Settings(**{**values, **saved, **given, "preset": preset})


def model_config(settings, vocab_size):
    """The config of the model. Raises ValueError if a setting is invalid."""
    names = [f.name for f in fields(FMemConfig) if hasattr(settings, f.name)]
    return FMemConfig(vocab_size, **{name: getattr(settings, name) for name in names})


def pick_device(name):
    """The device, and why it was chosen. Raises ValueError if it is not available."""
    why = "as given"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        why = "a GPU is available" if name == "cuda" else "no CUDA GPU is available"
    if name == "cuda":
        name += ":" + os.environ.get("LOCAL_RANK", "0")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:  # each device type raises a different one
        raise ValueError(f"--device {name} is not available: {one_line(error)}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        why += f", {torch.cuda.get_device_name(device)}"
    return device, why


class Corpus:
    """The default task: predict the next token of the text in a prepared folder.

    A task has vocab_size, tokenizer (its fields, or None), corpus (its name), about (a line to
    print), columns (extra ones in log.csv), and the methods windows, targets and validate.
    """

    columns = ("val_bpb", "val_tokens")

    def __init__(self, settings):
        folder = Path(settings.data)
        if folder == Path(Settings.data) and not folder.is_dir():
            folder = prepare.DEFAULT  # next to the code, in any working directory
            if not (folder / "meta.json").is_file():
                prepare.prepare(folder)
        self.tokens, self.val, self.tokenizer, meta = prepare.load(folder)
        encoding = load_tokenizer(self.tokenizer)
        self.bytes_of = np.array([len(token) for token in token_bytes(encoding)])
        self.vocab_size = encoding.n_vocab
        self.corpus = meta["corpus"]
        self.about = f"{self.corpus}: {len(self.tokens):,} tokens to train on"
        self.context = settings.context
        self.seed = settings.seed
        self.epoch = None  # the one that `offset` and `order` belong to
        self.offsets = min(self.context, len(self.tokens) - self.context)
        if self.offsets < 1:
            raise ValueError(f"--context must be below the {len(self.tokens)} training tokens")
        if len(self.val) < 2:
            raise ValueError(f"{folder}: the validation split needs at least two tokens")
        self.windows_per_epoch = (len(self.tokens) - self.offsets) // self.context

    def windows(self, first, count):
        """Windows `first` to `first + count - 1` of the run: int64 [count, context + 1].

        Each epoch cuts the text into windows from a new offset and reads them in a new order. Both
        depend only on the seed and the epoch, so a window depends only on its number.
        """
        windows = []
        for number in range(first, first + count):
            epoch, i = divmod(number, self.windows_per_epoch)
            if epoch != self.epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self.epoch = epoch
                self.offset = rng.integers(self.offsets)
                self.order = rng.permutation(self.windows_per_epoch)
            start = self.offset + self.order[i] * self.context
            windows.append(self.tokens[start : start + self.context + 1])
        return torch.from_numpy(np.stack(windows).astype(np.int64))

    def targets(self, windows):
        """The tokens to predict: int64 [count, context], -100 at positions that do not count."""
        return windows[:, 1:]

    def validate(self, model, limit, count, processes, autocast):
        """The mean loss over the validation split, or its first `limit` tokens.

        The text is cut into windows of `context` tokens, each starting from an empty memory. A
        batch has `count` windows, and the processes take turns. Padding at the end is not counted.
        Returns nats per token, the message to print, and the columns for log.csv.
        """
        tokens = self.val[: limit + 1] if limit else self.val
        at_once = count * self.context
        total = np.zeros(3)
        for start in range(0, len(tokens) - 1, at_once * processes.world):
            piece = tokens[start + at_once * processes.rank :][: at_once + 1]
            padded = torch.full([at_once + 1], -100)
            padded[: len(piece)] = torch.from_numpy(piece.astype(np.int64))
            inputs = padded[:-1].clamp_min(0).view(count, self.context).to(processes.device)
            targets = padded[1:]
            with torch.no_grad(), autocast():
                logits = model(inputs)[0].float().flatten(0, 1)
            nats = F.cross_entropy(logits, targets.to(processes.device), reduction="sum")
            counted = targets[targets >= 0]
            total += nats.item(), len(counted), self.bytes_of[counted].sum()
        nats, number, n_bytes = processes.sum(*total)
        bits = nats / math.log(2) / max(n_bytes, 1)
        loss = nats / number
        message = f"{loss:.4f} nats per token, {bits:.4f} bits per byte ({number:,.0f} tokens)"
        return loss, message, {"val_bpb": bits, "val_tokens": round(number)}


def progress(settings, state):
    """The fraction of the run that is done (1: all), and the name of the setting that ends it."""
    steps = state.step / settings.max_steps
    seconds = state.seconds / settings.seconds
    return max((steps, "max_steps"), (seconds, "seconds"))


def learning_rate(settings, step, done):
    """Linear warm-up times a cosine from 1 to min_lr. done: the fraction of the run, 0 to 1."""
    warmup = min(1, (step + 1) / (settings.warmup + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1)))
    return settings.lr * warmup * (settings.min_lr + (1 - settings.min_lr) * cosine)


def make_optimizer(model, settings, device):
    """AdamW with weight decay on the blocks' matrices, not on embedding, output layer and norms."""
    matrices = [p for block in model.blocks for p in block.parameters() if p.dim() > 1]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    decayed = {"params": matrices, "weight_decay": settings.weight_decay}
    others = {"params": rest, "weight_decay": 0.0}
    betas = (0.9, settings.beta2)
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW([decayed, others], lr=settings.lr, betas=betas, fused=fused)


@dataclass
class State:
    """The progress of a run. The next step depends only on this, the weights and the moments."""

    step: int = 0  # optimiser steps, including skipped ones
    windows: int = 0  # position in the data
    seconds: float = 0.0
    losses: list = field(default_factory=list)  # of the steps since the last log line
    skipped: int = 0  # steps with a non-finite loss or gradient
    val_loss: float = math.nan  # of the last evaluation
    best: float = math.inf  # the lowest val_loss so far
    log: str = ""  # contents of log.csv


def save(checkpoint, path):
    """Write a temporary file and rename it, so `path` is always complete. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    buffer = io.BytesIO()  # torch.save does not report a full disk clearly
    torch.save(checkpoint, buffer)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}; earlier checkpoints are kept") from None
    finally:
        temporary.unlink(missing_ok=True)


def checkpoints(out):
    """The checkpoints that a run wrote to this folder, without other .pt files."""
    names = re.compile(r"(last|best|step-\d+)\.pt")
    return [path for path in out.glob("*.pt") if names.fullmatch(path.name)]


def check_same_run(now, saved):
    """Raise ValueError if the resumed run has another model, tokenizer or order of windows."""
    now = {**now["settings"], **now, **now["config"]}
    before = {**saved["settings"], **saved, **saved["config"]}
    names = ("preset", "context", "seed", "layer", "layer_arguments", "tokenizer")
    for name in (*names, *saved["config"]):
        if name not in ("dropout", "scan", "recompute") and now[name] != before[name]:
            raise ValueError(f"--resume: {name} differs from the saved run; use another --out")


def start_log(path, log, columns):
    """Restore log.csv from the checkpoint's copy. A file that does not start with it is renamed."""
    if path.exists() and not (log and path.read_bytes().startswith(log.encode())):
        aside = path.with_name(f"log-{time.time_ns()}.csv")
        path.replace(aside)
        print(f"log       {path} does not belong to this run; moved to {aside}")
    log = log or ",".join(columns) + "\n"
    path.write_bytes(log.encode())
    return log


def plot_losses(log, path):
    """Plot the losses in log.csv, if matplotlib is installed."""
    with contextlib.suppress(ImportError, OSError):  # a failed plot must not end a run
        from matplotlib.figure import Figure

        table = np.genfromtxt(log.splitlines(), delimiter=",", names=True)
        axes = Figure(figsize=(7, 4)).subplots()
        for column in ("train_loss", "val_loss"):
            rows = table[np.isfinite(table[column])]
            axes.plot(rows["step"], rows[column], label=column)
        axes.set(xlabel="step", ylabel="nats per token")
        axes.legend()
        axes.figure.savefig(path, dpi=120)


class Processes:
    """This process: number `rank` of the `world` that torchrun started, or the only one."""

    def __init__(self, device, fsdp):
        self.device = device
        self.fsdp = fsdp
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.first = self.rank == 0
        self.joined = self.world > 1 or fsdp
        if fsdp and "RANK" not in os.environ:
            raise ValueError("--fsdp needs torchrun: torchrun --nproc_per_node N train.py --fsdp")
        if self.joined:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def log(self, line):
        if self.first:
            print(printable(line), flush=True)

    def sum(self, *values):
        """Sum each number over all processes. All must call it, and each waits for the others."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.joined:
            total = total.to(self.device)
            dist.all_reduce(total)
        return total.tolist()

    def wrap(self, model, compiled):
        """Move the model, or its shard, to the device, and return the module to call."""
        if self.fsdp:
            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)  # the rest: embedding, last norm, output layer
        net = torch.compile(model.to(self.device)) if compiled else model.to(self.device)
        return net if self.fsdp or self.world == 1 else DistributedDataParallel(net)

    def gather(self, model, optimizer):
        """Gather full weights and moments on the first process's CPU. All processes call it."""
        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        return dcp.get_state_dict(model, optimizer, options=options)

    def restore(self, model, optimizer, weights, moments):
        """The reverse of `gather`. The optimiser keeps the rates and decays of the settings."""
        options = dcp.StateDictOptions(full_state_dict=True)
        groups = [dict(group) for group in optimizer.param_groups]
        dcp.set_state_dict(
            model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options
        )
        for group, kept in zip(optimizer.param_groups, groups, strict=True):
            group.update(kept)

    def close(self):
        if self.joined:
            # When freed, DDP holds the GIL and waits for gloo's thread. That thread needs the GIL
            # to release its last result. A short sleep lets it finish and avoids a deadlock.
            time.sleep(0.5)
            dist.destroy_process_group()


def note_signals(stack):
    """Collect Ctrl-C and SIGTERM in a list until the stack closes. A second one ends the run."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.default_int_handler)
        print("stopping  after this step; the same signal again stops at once", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        stack.callback(signal.signal, number, signal.signal(number, note))
    return received


def train(given, layer=FactorizationMemory, layer_arguments=None, task=Corpus, command="train.py"):
    """Train a model. given: {name: value} for fields of Settings; the others have defaults.

    layer, layer_arguments: the layer in each block, passed on to FMem. task: a class like
    Corpus, called with the Settings. command: the program's name, for its hints. Returns the last
    checkpoint (in processes other than the first, a part of it), or None if the resumed run had
    already ended. Raises a one-line ValueError or OSError for errors that the user can fix.
    """
    torch.set_flush_denormal(True)  # before any threads start; denormal decays are slow on a CPU
    device, why_device = pick_device(given.get("device", "auto"))
    processes = Processes(device, given.get("fsdp", False))
    first = processes.first
    log = processes.log
    out = Path(given.get("out", Settings.out))
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(FileLock(out / ".lock", timeout=0))
        # The run to resume, if any.
        saved = {}
        if given.get("resume"):
            saved_model, saved = load(out / "last.pt")
            if "optimizer" not in saved:
                raise ValueError(f"{out / 'last.pt'} has only weights and cannot be resumed")
        elif checkpoints(out) and not given.get("overwrite"):
            raise ValueError(f"{out} contains another run; use --resume, --overwrite or --out DIR")
        for path in checkpoints(out):
            with open(path, "rb") as file:
                if FORMAT.encode() not in file.read(4096):
                    raise ValueError(f"{path} was not written by train.py; choose another --out")
        settings = resolve(given, saved.get("settings", {}), device)
        state = State(**{f.name: saved[f.name] for f in fields(State)}) if saved else State()

        # The data. The first process creates the default corpus, and the others wait for it.
        if not first:
            processes.sum(0)
        task = task(settings)
        if first:
            processes.sum(0)
        local, remainder = divmod(settings.batch_size, processes.world)  # windows per process
        if remainder:
            raise ValueError(f"--batch_size must be divisible by the {processes.world} processes")
        micro = min(settings.micro_batch or local, local)

        # The precision. Under bf16 autocast, the few float32 products may use TF32. Otherwise they
        # must not: the squared norms of the memory rows would be too inaccurate.
        dtype = settings.dtype
        if dtype == "auto":
            bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = "bf16" if bf16 else "float32"
        torch.set_float32_matmul_precision("high" if dtype == "bf16" else "highest")
        autocast = partial(torch.autocast, device.type, torch.bfloat16, dtype == "bf16")
        if settings.threads:
            torch.set_num_threads(settings.threads)

        # The model and the optimiser.
        torch.manual_seed(settings.seed)
        model = FMem(model_config(settings, task.vocab_size), layer, layer_arguments)
        about = {
            "format": FORMAT,
            "config": asdict(model.config),
            "layer": model.layer_name,
            "layer_arguments": model.layer_arguments,
            "tokenizer": task.tokenizer,
            "corpus": task.corpus,
            "settings": {k: v for k, v in asdict(settings).items() if k not in NOT_SAVED},
        }
        if saved:
            check_same_run(about, saved)
        net = processes.wrap(model, settings.compile)
        optimizer = make_optimizer(model, settings, device)
        if saved:
            processes.restore(model, optimizer, saved_model.state_dict(), saved.pop("optimizer"))
        log(f"device    {device} ({why_device}), {torch.get_num_threads()} threads")
        log(f"dtype     {dtype} (--dtype {settings.dtype})")
        log(f"data      {task.about}")
        log(f"settings  {' '.join(f'{k}={v}' for k, v in asdict(settings).items())}")
        log(f"model     {sum(p.numel() for p in model.parameters()):,} parameters")
        if saved:
            log(f"resumed   after step {state.step}")

        # The log.
        plot = first and (checkpoints(out) or not (out / "loss.png").exists())  # keep others' files
        old = set(checkpoints(out)) if settings.overwrite else set()  # until the first save
        columns = ("step", "tokens", "train_loss", "lr", "grad_norm", "skipped", "val_loss")
        columns = (*columns, *task.columns, "seconds")
        if first:
            if old:
                (out / "log.csv").unlink(missing_ok=True)
            state.log = start_log(out / "log.csv", state.log, columns)

        def write_row(**row):
            row |= {"step": state.step, "tokens": state.windows * settings.context}
            row["seconds"] = f"{state.seconds:.1f}"
            line = ",".join(str(row.get(column, "")) for column in columns) + "\n"
            state.log += line
            if first:
                # The checkpoint has the row too, so a log that cannot be written ends no run.
                with contextlib.suppress(OSError), open(out / "log.csv", "a", newline="") as file:
                    file.write(line)

        def validate(name, limit):
            model.eval()
            loss, message, row = task.validate(model, limit, micro, processes, autocast)
            model.train()
            log(f"{name:9s} step {state.step}: {message}")
            write_row(val_loss=loss, **row)
            return loss

        # The steps.
        received = note_signals(stack)
        start = time.perf_counter() - state.seconds
        done, limiting = progress(settings, state)
        last = None
        not_finite = 0  # consecutive steps
        stop = failed = False
        while done < 1 and not stop and not failed:
            lr = learning_rate(settings, state.step, done)
            for group in optimizer.param_groups:
                group["lr"] = lr
            seeds = np.random.SeedSequence([settings.seed, state.step, processes.rank])
            torch.manual_seed(int(seeds.generate_state(1)[0]))  # for dropout
            windows = task.windows(state.windows + processes.rank * local, local)
            targets = task.targets(windows)

            # The gradient of the mean loss over the targets that count, across all processes.
            count = max(processes.sum((targets != -100).sum().item())[0], 1)
            nats = torch.zeros((), device=device)
            for i in range(0, local, micro):
                net.require_backward_grad_sync = i + micro >= local  # for DDP: sync with the last
                with autocast():
                    logits, _ = net(windows[i : i + micro, :-1].to(device))
                wanted = targets[i : i + micro].flatten().to(device)
                loss = F.cross_entropy(logits.float().flatten(0, 1), wanted, reduction="sum")
                (loss * processes.world / count).backward()  # DDP and FSDP average over world
                nats += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip or math.inf)
            norm = (norm.full_tensor() if processes.fsdp else norm).item()
            loss = processes.sum(nats.item())[0] / count

            # The step. A non-finite loss or gradient skips it and so never reaches the weights.
            if math.isfinite(loss) and math.isfinite(norm):
                optimizer.step()
                state.losses.append(loss)
                not_finite = 0
            else:
                log(f"skipped   step {state.step + 1}: loss {loss:.4g}, gradient {norm:.4g}")
                state.skipped += 1
                not_finite += 1
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.windows += settings.batch_size
            state.seconds = time.perf_counter() - start
            failed = not_finite == settings.max_skipped
            done, limiting = progress(settings, state)
            done, stop = processes.sum(done if first else 0, len(received))  # the same in all

            # After the step, if due: a log line, an evaluation, checkpoints.
            if state.losses and (state.step % settings.log_every == 0 or done >= 1):
                loss = sum(state.losses) / len(state.losses)
                state.losses.clear()
                speed = state.windows * settings.context / state.seconds
                left = timedelta(seconds=round(state.seconds * (1 / min(done, 1) - 1)))
                log(
                    f"step {state.step}/{settings.max_steps} | loss {loss:.4f} | lr {lr:.2e} | "
                    f"grad {norm:.2f} | {speed:,.0f} tokens/s | {left} left"
                )
                write_row(train_loss=loss, lr=lr, grad_norm=norm, skipped=state.skipped)
            due = state.step % settings.eval_every == 0 or done >= 1
            keep = settings.keep_every and state.step % settings.keep_every == 0
            better = False
            if due:
                state.val_loss = validate("eval", settings.eval_tokens)
                better = state.val_loss < state.best
                state.best = min(state.best, state.val_loss)
            if due or keep or stop or failed:
                weights, moments = processes.gather(model, optimizer)
                inference = {**about, "model": weights, "step": state.step}
                inference["val_loss"] = state.val_loss
                last = {**inference, "optimizer": moments, **asdict(state)}
                files = {}
                if keep:
                    files[out / f"step-{state.step}.pt"] = last
                if better:
                    files[out / "best.pt"] = inference
                # last.pt comes last: if killed before it, a resumed run writes the others again.
                files[out / "last.pt"] = last
                if first:
                    for path, checkpoint in files.items():
                        save(checkpoint, path)
                    for path in old - files.keys():
                        path.unlink(missing_ok=True)
                    old = set()

        # The end.
        launcher = f"torchrun --nproc_per_node {processes.world}" if processes.joined else "python"
        fsdp = " --fsdp" * processes.fsdp
        again = f"{launcher} {command} --resume{fsdp} --out {shlex.quote(str(out))}"
        if failed:
            reason = f"{not_finite} steps in a row had a non-finite loss or gradient"
            raise ValueError(f"{reason}; try {again} --lr {settings.lr / 3:.2g}")
        if stop:
            log(f"stopped   after step {state.step}, checkpoint saved; to continue: {again}")
        else:
            validate("final", None)  # of the last weights, which need not be those of best.pt
            reached = f"--{limiting} {getattr(settings, limiting)} is reached"
            log(f"done      {state.step} steps, {reached}; to continue: {again} --{limiting} N")
            if task.tokenizer and state.best < math.inf:
                log(f"next      python sample.py --checkpoint {shlex.quote(str(out / 'best.pt'))}")
        if plot:
            plot_losses(state.log, out / "loss.png")
        processes.close()
        return last


@contextlib.contextmanager
def one_line_errors(program):
    """Exit with a one-line message for errors that the user can fix."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted; earlier checkpoints, if any, are kept")
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        message = one_line(error)
        if isinstance(error, Timeout):
            message = "another run is writing to this folder; choose another --out"
        elif isinstance(error, MemoryError) or "allocate" in message or "out of memory" in message:
            message = f"out of memory ({message}); try --micro_batch 1, --recompute, less --context"
        elif not isinstance(error, ValueError | OSError):
            raise
        sys.exit(printable(f"{program}: error: {message}"))


def main(argv=None):
    given = vars(make_parser("train.py").parse_args(argv))
    with one_line_errors("train.py"):
        train(given)


if __name__ == "__main__":
    main()
