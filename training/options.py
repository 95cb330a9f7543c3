"""The settings of a run: what they are, their presets, how they are read from a command line, which of them cannot work."""
import argparse
import dataclasses
import difflib
import math
import sys
from dataclasses import dataclass

from data.messages import one_line
from data.recall import TASKS
from data.token_files import DEFAULT
from variants.build import ModelConfig


def option(default, text):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """A run. "preset" as a default means: the value of the preset, PRESETS below."""
    # the run
    preset: str = option("auto", "values for the fields marked so: gpu, cpu, or auto (by the device)")
    out: str = option("out", "folder for checkpoints and log")
    data: str = option(str(DEFAULT), f"prepared folder (the default is made when missing), or: {', '.join(TASKS)}")
    resume: bool = option(False, "continue the run in --out; options given again replace the saved ones")
    overwrite: bool = option(False, "start again in a folder that holds a run, which is lost")
    device: str = option("auto", "cuda, mps, cpu, or auto")
    dtype: str = option("auto", "bf16 (autocast), float32, or auto: bf16 on a GPU that has it")
    fsdp: bool = option(False, "split weights, gradients and optimiser over the processes of torchrun: for models beyond one GPU")
    compile: bool | None = option(None, "torch.compile; falls back, saying why, where that fails (left out: on one GPU, if a "
                                        "trial says that it is faster)")
    threads: str = option("auto", "of a CPU: a number, or auto: one for each core, fewer while other programs are busy (each "
                                  "number rounds differently, so only a fixed one is sure to repeat a run bit for bit)")
    seed: int = option(1337, "of the weights, the order of the data and dropout")
    # the model
    n_layer: int = option("preset", "blocks")
    d_model: int = option("preset", "width")
    d_memory: int | None = option(None, "d, width of a memory row (none: d_model)")
    n_rows: int = option("preset", "m, memory rows")
    k_rows: int | None = option("preset", "k, rows a token writes and reads (none: all, the dense form)")
    tau: float = option(ModelConfig.tau, "temperature of the affinity")
    alpha_std: float = option(ModelConfig.alpha_std, "spread of the affinity's logits at initialisation")
    d_mlp: int | None = option(None, "hidden width of the MLP (none: 8/3 d_model, less what mixer, conv, gate ... add)")
    dropout: float = option("preset", "on the embedding and on what each layer adds")
    scan: str = option("auto", "form of the recurrence: auto, loop, chunked, fast or kernel")
    conv: int = option(0, "not in the paper: tokens of a short convolution before the projections (0: none)")
    gate: bool = option(False, "not in the paper: an output gate")
    shared_row: bool = option(False, "not in the paper: a row that every token writes and reads")
    shift: bool = option(False, "not in the paper: the token before has a part in the write's routing")
    read_rank: int = option(0, "not in the paper: rank of a difference between read and write affinities (0: none)")
    mixer: str = option("memory", "memory, or to compare with: attention, mamba2 (with --d_mlp none: as many parameters)")
    n_head: int | None = option(None, "heads of attention or Mamba-2 (none: of width 32, 64)")
    n_kv_head: int | None = option(None, "key and value heads of attention (none: n_head)")
    d_state: int = option(ModelConfig.d_state, "numbers per channel in Mamba-2's state")
    ablation: str = option("", "one change to the memory; variants/ablations.py has the list")
    # the training
    context: int = option("preset", "tokens per training window")
    batch_size: int = option("preset", "windows per step, over all processes")
    carry_state: bool = option(False, "each window continues the one of the step before, with its state (truncated "
                                      "backpropagation through time); else each starts from an empty memory")
    micro_batch: int | None = option(None, "windows per process that go through the model at once (none: all of them)")
    max_steps: int = option("preset", "optimiser steps")
    seconds: float | None = option(None, "finish the schedule in this time, the last evaluation not counted, if not before")
    lr: float = option("preset", "peak learning rate of AdamW")
    router_lr: float = option(1.0, "learning rate of W_alpha, times that of the rest")
    min_lr: float = option(0.05, "learning rate at the end, as a share of the peak")
    warmup: int = option(50, "steps of linear warm-up")
    beta2: float = option(0.95, "AdamW's second decay rate")
    weight_decay: float = option(0.1, "AdamW's decay of the matrices")
    clip: float = option(1.0, "largest norm of the gradient")
    max_skipped: int = option(20, "end the run after so many steps in a row whose loss or gradient was not finite")
    # the reports
    log_every: int = option(10, "steps between log lines")
    eval_every: int = option("preset", "steps between evaluations, each followed by a checkpoint")
    keep_every: int | None = option(None, "keep a checkpoint of every so many steps (none: only the last and the best)")
    eval_tokens: int = option(32768, "validation tokens of these evaluations; the one at the end takes all")
    log: str = option("csv", "csv: log.csv; tensorboard: also event files for it (pip install tensorboard)")
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
    """argv -> {name: value} of the options given. Exits with one line on an unknown name or a value of the wrong type."""
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
                                argument_default=argparse.SUPPRESS, description="Train a Factorization Memory language model.")
    p.error = lambda message: p.exit(2, f"train.py: error: {one_line(message)}\n")
    for f in dataclasses.fields(Settings):
        shown = f.default
        if shown == "preset":
            shown = ", ".join(f"{values[f.name]} on a {name.upper()}" for name, values in PRESETS.items())
        text = f"{f.metadata['help']} [{shown}]".replace("%", "%%")
        if f.type in (bool, bool | None):
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
    if s.log not in ("csv", "tensorboard"):
        raise ValueError(f"--log must be csv or tensorboard, not {s.log}")
    if s.resume and s.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")


def settle(given, device, saved):
    """Settings from defaults, preset, the resumed run and the command line, the later ones first. Raises ValueError."""
    preset = given.get("preset", "auto")
    if preset == "auto":
        preset = saved.get("preset", "gpu" if device.type == "cuda" else "cpu")
    if preset not in PRESETS:
        raise ValueError(f"--preset must be gpu, cpu or auto, not {preset}")
    kept = {k: v for k, v in saved.items() if k not in ("resume", "overwrite", "out")}
    s = Settings(**{**PRESETS[preset], **kept, **given, "preset": preset})
    check(s)
    return s


def check_together(s, processes, resumed):
    """Raises ValueError on settings that do not fit the processes or the run that is `resumed` (training/checkpoint.py).
    Returns the windows of a step that this process has, and how many of them go through the model at once."""
    if s.batch_size % processes.world:
        raise ValueError(f"--batch_size {s.batch_size} cannot be split evenly over {processes.world} processes")
    local = s.batch_size // processes.world
    micro = min(s.micro_batch or local, local)
    if local % micro:
        raise ValueError(f"--micro_batch {micro} must divide the {local} windows that a process has")
    if s.carry_state and (processes.world > 1 or s.data in TASKS or s.mixer == "attention"):
        raise ValueError("--carry_state is for text, one process, and a mixer whose state does not grow")
    if s.resume and s.fsdp != resumed.split:
        raise ValueError(f"--resume: the run in {resumed.out} was begun {'with' if resumed.split else 'without'} --fsdp; "
                         f"it can only be resumed so")
    if s.fsdp and not processes.torchrun:
        raise ValueError("--fsdp splits a model over processes; start them with torchrun --nproc_per_node 2 train.py --fsdp")
    if s.fsdp and s.carry_state:
        raise ValueError("--fsdp and --carry_state exclude each other")
    return local, micro
