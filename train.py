"""Train a Factorization Memory language model.

    python train.py                                  # chooses device and preset, and says why
    python train.py --resume                         # continues the run in out/
    python train.py --data data/mine --out out/mine  # on a folder that data/prepare.py made
    torchrun --nproc_per_node 2 train.py             # the same batches, split over two processes
    torchrun --nproc_per_node 8 train.py --fsdp      # the model is sharded too

Every field of Settings is an option. A run writes into --out:

    last.pt    the newest checkpoint: all that --resume needs, on any number of processes
    best.pt    the weights with the lowest validation loss, for sample.py and look.py
    step-N.pt  with --keep_every: the checkpoint after N steps; renamed to last.pt it can be resumed
    log.csv    a row per log line and per evaluation
    loss.png   the losses, where matplotlib is installed

All randomness in a step is determined by the seed, the step, the position in the data and the
process. So a resumed run equals the unbroken one bit for bit, including log.csv (except its column
of seconds), given the same numbers of threads and processes, and no --seconds.
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


def option(default, text, gpu=None, least=1):
    """A field of Settings; gpu: its value in the preset "gpu", where that differs."""
    text += f" [{default}]" if gpu is None else f" [{default}, gpu: {gpu}]"
    return field(default=default, metadata=dict(help=text, gpu=gpu, least=least))


@dataclass
class Settings:
    """A run. Raises ValueError for values that cannot work; FMemConfig checks those of the model.

    The defaults are the preset "cpu": 1.7 M parameters, 1.5 epochs of the default corpus. The
    preset "gpu" has 12.4 M parameters and 6 epochs, few enough not to overfit, with dropout.
    """

    preset: str = option("auto", "gpu, cpu, or auto: by the device")
    out: str = option("out", "folder for checkpoints and log")
    data: str = option("data/default", "prepared folder; the default one is made if missing")
    resume: bool = option(False, "continue the run in --out; other options replace its settings")
    overwrite: bool = option(False, "delete the run that --out holds, and start a new one")
    device: str = option("auto", "cuda, cpu, mps, or auto: cuda if there is one")
    dtype: str = option("auto", "bf16 (autocast), float32, or auto")
    fsdp: bool = option(False, "shard weights and optimiser over torchrun's processes")
    compile: bool = option(False, "use torch.compile")
    threads: int | None = option(None, "CPU threads (None: PyTorch's choice)")
    seed: int = option(1337, "random seed of weights, data order and dropout", least=0)

    n_layer: int = option(4, "blocks", gpu=8)
    d_model: int = option(192, "width", gpu=384)
    d_memory: int | None = option(None, "d, width of a memory row (None: d_model)")
    n_rows: int = option(32, "m, memory rows", gpu=64)
    k_rows: int | None = option(8, "k, rows that a token writes to and reads (None: all)", gpu=16)
    tau: float = option(FMemConfig.tau, "temperature of the affinity", least=0)
    d_mlp: int | None = option(None, "hidden width of the MLP (None: 8/3 d_model)")
    dropout: float = option(0.0, "on the embedding and each layer's output", gpu=0.2, least=0)
    tie_embeddings: bool = option(True, "the output layer shares the embedding's weights")
    recompute: bool = option(False, "less memory, more time: compute the scan twice")

    context: int = option(256, "tokens per training window", gpu=1024)
    batch_size: int = option(8, "windows per step, over all processes", gpu=16)
    micro_batch: int | None = option(None, "windows per process and forward pass (None: all)")
    max_steps: int = option(1300, "optimiser steps", gpu=650)
    seconds: float = option(math.inf, "fit the run and its schedule into this many seconds")
    lr: float = option(4e-3, "peak learning rate of AdamW", gpu=3e-3, least=0)
    min_lr: float = option(0.05, "final learning rate, as a fraction of the peak", least=0)
    warmup: int = option(50, "steps of linear warm-up", least=0)
    beta2: float = option(0.95, "AdamW's second decay rate", least=0)
    weight_decay: float = option(0.1, "AdamW's weight decay, for matrices only", least=0)
    clip: float = option(1.0, "clip the gradient to this norm (0: never)", least=0)
    max_skipped: int = option(20, "give up after this many non-finite steps in a row")

    log_every: int = option(10, "steps between log lines")
    eval_every: int = option(200, "steps between evaluations, each with a checkpoint", gpu=50)
    eval_tokens: int = option(32768, "validation tokens per evaluation; the final one uses all")
    keep_every: int | None = option(None, "steps between step-N.pt checkpoints (None: none)")

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            least = f.metadata["least"]
            if type(value) in (int, float) and not value >= least:  # NaN fails too
                raise ValueError(f"--{f.name} must be at least {least}, not {value}")
        for name, values in (("preset", "auto gpu cpu"), ("dtype", "auto bf16 float32")):
            if getattr(self, name) not in values.split():
                raise ValueError(f"--{name} must be one of {values}, not {getattr(self, name)}")
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite cannot be combined")
        self.data = os.path.relpath(self.data)  # the checkout may be moved before a resume


# What a checkpoint does not keep: it may be resumed elsewhere, and in another way.
NOT_SAVED = ("out", "resume", "overwrite", "device", "fsdp")


def int_or_none(text):
    return None if text.lower() == "none" else int(text)


def make_parser(prog):
    """The command line: an option for every field of Settings, left out of the result if absent."""
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


def settle(given, saved, device):
    """Settings: the values given, else those of the run to resume, else the preset's."""
    preset = given.get("preset", saved.get("preset", "auto"))
    if preset == "auto":
        preset = "gpu" if device.type == "cuda" else "cpu"
    values = {}
    if preset == "gpu":
        values = {f.name: f.metadata["gpu"] for f in fields(Settings) if f.metadata["gpu"]}
    return Settings(**{**values, **saved, **given, "preset": preset})


def model_config(settings, vocab_size):
    """The settings of the model. Raises ValueError."""
    names = [f.name for f in fields(FMemConfig) if hasattr(settings, f.name)]
    return FMemConfig(vocab_size, **{name: getattr(settings, name) for name in names})


def pick_device(name):
    """The device and why. Raises ValueError for one that cannot be used."""
    why = "as given"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        why = "there is a GPU" if name == "cuda" else "there is no CUDA GPU"
    if name == "cuda":
        name += ":" + os.environ.get("LOCAL_RANK", "0")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:  # each kind of device raises its own
        raise ValueError(f"--device {name} cannot be used here: {one_line(error)}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        why += f", {torch.cuda.get_device_name(device)}"
    return device, why


class Text:
    """The default task: the next token of the text in a prepared folder.

    A task has vocab_size, tokenizer (its fields, or None), corpus (its name), about (a line to
    print), columns (its own in log.csv), and the methods windows, targets and validate.
    """

    columns = ("val_bpb", "val_tokens")

    def __init__(self, settings):
        folder = Path(settings.data)
        if folder == Path(Settings.data) and not folder.is_dir():
            folder = prepare.DEFAULT  # beside the code, whatever the working folder
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
        self.epoch = None  # for which `offset` and `order` were drawn
        self.offsets = min(self.context, len(self.tokens) - self.context)
        if self.offsets < 1:
            raise ValueError(f"--context must be below the text's {len(self.tokens)} tokens")
        if len(self.val) < 2:
            raise ValueError(f"{folder}: the text for validation has one token; there must be two")
        self.windows_per_epoch = (len(self.tokens) - self.offsets) // self.context

    def windows(self, first, count):
        """Windows number first, first + 1, ... of the run: int64 [count, context + 1].

        Each epoch cuts the text into windows from another offset, and takes them in another order.
        Both follow from the seed and the epoch, so a window depends on its number alone.
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
        """What the model is to predict: int64 [count, context], -100 where nothing is."""
        return windows[:, 1:]

    def validate(self, model, limit, count, processes, autocast):
        """The mean loss over the validation split, or its first `limit` tokens.

        The text is cut into windows of `context` tokens, each read from an empty memory; `count`
        windows go through the model at once, and the processes take turns. Padding at the end is
        not counted. Returns nats per token, the words to print, the columns for log.csv.
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
        words = f"{loss:.4f} nats per token, {bits:.4f} bits per byte ({number:,.0f} tokens)"
        return loss, words, {"val_bpb": bits, "val_tokens": round(number)}


def progress(settings, state):
    """The share of the run that is done, 1 at its end, and the name of the setting that ends it."""
    steps = state.step / settings.max_steps
    seconds = state.seconds / settings.seconds
    return max((steps, "max_steps"), (seconds, "seconds"))


def learning_rate(settings, step, done):
    """Linear warm-up, then a cosine down to min_lr; done: the share of the run, 0 to 1."""
    warmup = min(1, (step + 1) / (settings.warmup + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1)))
    return settings.lr * warmup * (settings.min_lr + (1 - settings.min_lr) * cosine)


def make_optimizer(model, settings, device):
    """AdamW that decays the matrices of the layers, not embedding, output layer and norms."""
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
    """Where a run is. With the weights and moments it is all that the next step depends on."""

    step: int = 0  # optimiser steps, the skipped ones too
    windows: int = 0  # position in the data
    seconds: float = 0.0
    losses: list = field(default_factory=list)  # of the steps since the last log line
    skipped: int = 0  # steps that were not finite
    val_loss: float = math.nan  # of the last evaluation
    best: float = math.inf  # the lowest of them
    log: str = ""  # log.csv


def save(checkpoint, path):
    """Write beside `path`, then rename: a whole file is there at any moment. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    buffer = io.BytesIO()  # torch.save to a full disk would not say that it is full
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
    """The checkpoints in a folder that a run wrote, and no other .pt file."""
    names = re.compile(r"(last|best|step-\d+)\.pt")
    return [path for path in out.glob("*.pt") if names.fullmatch(path.name)]


def check_same_run(now, saved):
    """Raises ValueError if the run to resume has another model, tokenizer or order of the data."""
    now = {**now["settings"], **now, **now["config"]}
    before = {**saved["settings"], **saved, **saved["config"]}
    names = ("preset", "context", "seed", "layer", "layer_arguments", "tokenizer")
    for name in (*names, *saved["config"]):
        if name not in ("dropout", "scan", "recompute") and now[name] != before[name]:
            raise ValueError(f"--resume: {name} differs from the run's; use another --out")


def start_log(path, log, columns):
    """Restore log.csv to the checkpoint's copy. A file that does not begin with it is renamed."""
    if path.exists() and not (log and path.read_bytes().startswith(log.encode())):
        aside = path.with_name(f"log-{time.time_ns()}.csv")
        path.replace(aside)
        print(f"log       {path} does not belong to this run; moved to {aside}")
    log = log or ",".join(columns) + "\n"
    path.write_bytes(log.encode())
    return log


def draw(log, path):
    """The losses in log.csv as curves, where matplotlib is installed."""
    with contextlib.suppress(ImportError, OSError):  # a picture never ends a run
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
    """This process, number `rank` of the `world` that torchrun started, or the only one."""

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

    def say(self, line):
        if self.first:
            print(printable(line), flush=True)

    def sum(self, *values):
        """The sum of each number over the processes, for which each waits."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.joined:
            total = total.to(self.device)
            dist.all_reduce(total)
        return total.tolist()

    def place(self, model, compiled):
        """Put the model, or its shard, on the device, and return the module to call."""
        if self.fsdp:
            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)  # the rest: embedding, last norm, output layer
        net = torch.compile(model.to(self.device)) if compiled else model.to(self.device)
        return net if self.fsdp or self.world == 1 else DistributedDataParallel(net)

    def gather(self, model, optimizer):
        """Weights and moments, whole and on the CPU, for the first process; all must call it."""
        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        return dcp.get_state_dict(model, optimizer, options=options)

    def restore(self, model, optimizer, weights, moments):
        """The reverse; the rates and decays of the optimiser stay those of the settings."""
        options = dcp.StateDictOptions(full_state_dict=True)
        groups = [dict(group) for group in optimizer.param_groups]
        dcp.set_state_dict(
            model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options
        )
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update(settings)

    def leave(self):
        if self.joined:
            # DDP, when freed, holds Python's lock while it waits for gloo's thread, which needs the
            # lock to let go of its last result. A moment for that thread avoids waiting forever.
            time.sleep(0.5)
            dist.destroy_process_group()


def note_signals(stack):
    """A list that collects Ctrl-C and SIGTERM until the stack closes; a second one ends the run."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.default_int_handler)
        print(
            "stopping  after this step or evaluation; the same signal again stops at once",
            flush=True,
        )

    for number in (signal.SIGINT, signal.SIGTERM):
        stack.callback(signal.signal, number, signal.signal(number, note))
    return received


def train(given, layer=FactorizationMemory, layer_arguments=None, task=Text, command="train.py"):
    """A training run. given: {name: value} of fields of Settings; the others have defaults.

    layer, layer_arguments: the layer in each block, passed on to FMem. task: a class like
    Text, called with the Settings. command: the program's name, for its hints. Returns the last
    checkpoint; in processes other than the first, a part of it. Raises ValueError or OSError, one
    line, for what the user can fix. A run that is resumed after its end returns None.
    """
    torch.set_flush_denormal(True)  # before the first threads: denormal decays are slow on a CPU
    device, why_device = pick_device(given.get("device", "auto"))
    processes = Processes(device, given.get("fsdp", False))
    first = processes.first
    say = processes.say
    out = Path(given.get("out", Settings.out))
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(FileLock(out / ".lock", timeout=0))
        # The run to continue, if there is one.
        saved = {}
        if given.get("resume"):
            saved_model, saved = load(out / "last.pt")
            if "optimizer" not in saved:
                raise ValueError(f"{out / 'last.pt'} holds weights alone: it cannot be resumed")
        elif checkpoints(out) and not given.get("overwrite"):
            raise ValueError(f"{out} holds another run; --resume, --overwrite, or --out DIR")
        settings = settle(given, saved.get("settings", {}), device)
        state = State(**{f.name: saved[f.name] for f in fields(State)}) if saved else State()

        # The data. The first process makes the default corpus, for which the others wait.
        if not first:
            processes.sum(0)
        task = task(settings)
        if first:
            processes.sum(0)
        local, rest = divmod(settings.batch_size, processes.world)  # windows of this process
        if rest:
            raise ValueError(f"--batch_size must be divisible by {processes.world}, the processes")
        micro = min(settings.micro_batch or local, local)

        # The precision. Under bf16 autocast TF32 loses nothing: its inputs are bf16 already. With
        # float32 it would make the squared lengths of the memory rows too inexact.
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
        net = processes.place(model, settings.compile)
        optimizer = make_optimizer(model, settings, device)
        if saved:
            processes.restore(model, optimizer, saved_model.state_dict(), saved.pop("optimizer"))
        say(f"device    {device} ({why_device}), {torch.get_num_threads()} threads")
        say(f"dtype     {dtype} (--dtype {settings.dtype})")
        say(f"data      {task.about}")
        say(f"settings  {' '.join(f'{k}={v}' for k, v in asdict(settings).items())}")
        say(f"model     {sum(p.numel() for p in model.parameters()):,} parameters")
        if saved:
            say(f"resumed   after step {state.step}")

        # The log.
        draws = first and (checkpoints(out) or not (out / "loss.png").exists())  # or it is not ours
        replaced = checkpoints(out) if first and settings.overwrite else []  # at the first save
        columns = ("step", "tokens", "train_loss", "lr", "grad_norm", "skipped", "val_loss")
        columns = (*columns, *task.columns, "seconds")
        if first:
            if replaced:
                (out / "log.csv").unlink(missing_ok=True)
            state.log = start_log(out / "log.csv", state.log, columns)

        def write_row(**row):
            row |= {"step": state.step, "tokens": state.windows * settings.context}
            row["seconds"] = f"{state.seconds:.1f}"
            line = ",".join(str(row.get(column, "")) for column in columns) + "\n"
            state.log += line
            if first:
                with open(out / "log.csv", "a", newline="") as file:
                    file.write(line)

        def validate(name, limit):
            model.eval()
            loss, words, row = task.validate(model, limit, micro, processes, autocast)
            model.train()
            say(f"{name:9s} step {state.step}: {words}")
            write_row(val_loss=loss, **row)
            return loss

        # The steps.
        received = note_signals(stack)
        begun = time.perf_counter() - state.seconds
        done, limiting = progress(settings, state)
        last = None
        not_finite = 0  # steps in a row
        stop = failed = False
        while done < 1 and not stop and not failed:
            lr = learning_rate(settings, state.step, done)
            for group in optimizer.param_groups:
                group["lr"] = lr
            seeds = np.random.SeedSequence([settings.seed, state.step, processes.rank])
            torch.manual_seed(int(seeds.generate_state(1)[0]))  # of dropout
            windows = task.windows(state.windows + processes.rank * local, local)
            targets = task.targets(windows)

            # The gradient of the mean over the targets that count, those of all processes together.
            count = max(processes.sum((targets != -100).sum().item())[0], 1)
            nats = torch.zeros((), device=device)
            for i in range(0, local, micro):
                net.require_backward_grad_sync = i + micro >= local  # DDP: once, with the last
                with autocast():
                    logits, _ = net(windows[i : i + micro, :-1].to(device))
                wanted = targets[i : i + micro].flatten().to(device)
                loss = F.cross_entropy(logits.float().flatten(0, 1), wanted, reduction="sum")
                (loss * processes.world / count).backward()  # DDP and FSDP divide by world
                nats += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip or math.inf)
            norm = (norm.full_tensor() if processes.fsdp else norm).item()
            loss = processes.sum(nats.item())[0] / count

            # The step. It is skipped if anything is not finite, so that nothing reaches a weight.
            if math.isfinite(loss) and math.isfinite(norm):
                optimizer.step()
                state.losses.append(loss)
                not_finite = 0
            else:
                say(f"skipped   step {state.step + 1}: loss {loss:.4g}, gradient {norm:.4g}")
                state.skipped += 1
                not_finite += 1
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.windows += settings.batch_size
            state.seconds = time.perf_counter() - begun
            failed = not_finite == settings.max_skipped
            done, limiting = progress(settings, state)
            done, stop = processes.sum(done if first else 0, len(received))  # the same in all

            # What is due after it: a log line, an evaluation, checkpoints.
            if state.losses and (state.step % settings.log_every == 0 or done >= 1):
                loss = sum(state.losses) / len(state.losses)
                state.losses.clear()
                speed = state.windows * settings.context / state.seconds
                left = timedelta(seconds=round(state.seconds * (1 / min(done, 1) - 1)))
                say(
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
                sampled = {**about, "model": weights, "step": state.step}
                sampled["val_loss"] = state.val_loss
                last = {**sampled, "optimizer": moments, **asdict(state)}
                while replaced:
                    replaced.pop().unlink(missing_ok=True)
                if first and keep:
                    save(last, out / f"step-{state.step}.pt")
                if first and better:
                    save(sampled, out / "best.pt")
                # last.pt comes last: a run that is killed before it writes the others again.
                if first:
                    save(last, out / "last.pt")

        # The end.
        launcher = f"torchrun --nproc_per_node {processes.world}" if processes.joined else "python"
        fsdp = " --fsdp" * processes.fsdp
        again = f"{launcher} {command} --resume{fsdp} --out {shlex.quote(str(out))}"
        if failed:
            reason = f"{not_finite} steps in a row were not finite"
            raise ValueError(f"{reason}; try {again} --lr {settings.lr / 3}")
        if stop:
            say(f"stopped   after step {state.step}, saved; to continue: {again}")
        else:
            validate("final", None)
            reached = f"--{limiting} {getattr(settings, limiting)} is reached"
            say(f"done      {state.step} steps, {reached}; to continue: {again} --{limiting} N")
            if task.tokenizer:
                say(f"next      python sample.py --checkpoint {shlex.quote(str(out / 'best.pt'))}")
        if draws:
            draw(state.log, out / "loss.png")
        processes.leave()
        return last


@contextlib.contextmanager
def one_line_errors(program):
    """End the program with one line for what the user can fix."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted; earlier checkpoints are kept")
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        message = one_line(error)
        if isinstance(error, Timeout):
            message = "another run is writing into this folder; choose another --out"
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
