"""Checkpoints: written whole, checked when read, turned back into models."""
import dataclasses
import os
import shutil
import zipfile

import torch

from data.messages import one_line
from data.tokenizer import load_tokenizer
from fmem import copy_state
from training.batches import detached
from training.optimizer import load_moments
from training.options import Settings
from variants.build import ModelConfig, build, n_parameters

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
    """Raises ValueError if a checkpoint lacks something beside the weights that training saves."""
    for name, kind in CONTENT.items():
        if not isinstance(checkpoint.get(name, ...), kind):
            raise ValueError(f"it has no {name}, or one of another kind")
    kinds = {f.name: f.type | int if isinstance(0.0, f.type) else f.type for f in dataclasses.fields(Settings)}
    wrong = [name for name, value in checkpoint["settings"].items() if not isinstance(value, kinds.get(name, ()))]
    if wrong or not {"context", "data"} <= checkpoint["settings"].keys():
        what = ", ".join(map(str, wrong)) or "some are missing"
        raise ValueError(f"its settings are not those of this version of train.py ({what})")


def load_checkpoint(path, device="cpu", form=FORMAT, maker="train.py"):
    """The dict that training saved; no code in the file is run. Raises ValueError, one line, on any other file."""
    try:
        with zipfile.ZipFile(path) as parts:            # torch.load does not look at the checksums
            if parts.testzip() is not None:
                raise ValueError("it is damaged, a checksum differs")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        if checkpoint.get("format") != form:
            raise ValueError(f"it was not written by this version of {maker}")
        if form == FORMAT:
            check_content(modernised(checkpoint))
        return checkpoint
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; python {maker} makes one") from None
    except Exception as e:                              # a damaged or hostile file can make a reader raise anything
        raise ValueError(f"{path} cannot be read as a checkpoint: {one_line(e)}") from None


def config_of(checkpoint, **changes):
    """The ModelConfig in a checkpoint, fields that are younger than it with their defaults. Raises ValueError, TypeError."""
    return ModelConfig(**{**checkpoint["config"], **changes})


def modernised(checkpoint):
    """A checkpoint as it would be written now. Those that have a chunk_size called the form "fast" "chunked"."""
    if isinstance(checkpoint.get("config"), dict) and "chunk_size" in checkpoint["config"]:
        del checkpoint["config"]["chunk_size"]
        for part in ("config", "settings"):
            if isinstance(checkpoint.get(part), dict) and checkpoint[part].get("scan") == "chunked":
                checkpoint[part]["scan"] = "fast"
    return checkpoint


def model_from(checkpoint, device, **changes):
    """The trained model of a checkpoint, in evaluation mode; `changes` replace fields of its config (scan, say).

    Raises ValueError, one line, if the checkpoint's parts do not make one.
    """
    try:
        config, weights = config_of(checkpoint, **changes), checkpoint["model"]
        if not all(torch.isfinite(weight).all() for weight in weights.values()):
            raise TypeError("a weight is not a finite number")
        asked = n_parameters(config)
        if 2 * asked > sum({w.data_ptr(): w.untyped_storage().nbytes() for w in weights.values()}.values()):
            raise TypeError(f"its config asks for {asked:,} parameters, which it does not have")
        model = build(config).to(device)
        model.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f"the checkpoint does not hold a model: {one_line(e)}") from None
    return model.eval()


@torch.no_grad()
def check_state(model, state, tokens, path):
    """Raises ValueError if the model cannot continue with tokens [B] from `state`, which was read from the file `path`."""
    def shapes(part):
        return list(map(shapes, part)) if isinstance(part, (list, tuple)) else getattr(part, "shape", None)

    try:
        logits, after = model(tokens, None if state is None else copy_state(state))
        if not logits.isfinite().all():
            raise ValueError("it leads to numbers that are not finite")
        if model.config.mixer != "attention" and shapes(after) != shapes(model(tokens)[1]):    # its state grows
            raise ValueError("its shape is wrong")
    except Exception as e:                              # a state of the wrong shape can make the model raise anything
        raise ValueError(f"{path} does not hold a state of this model: {one_line(e)}") from None


def tokenizer_of(checkpoint):
    """The tiktoken.Encoding in a checkpoint. Raises ValueError if there is none that goes with the model."""
    if checkpoint["tokenizer"] is None:
        raise ValueError(f"the checkpoint was trained on {checkpoint['corpus']}, not on text; "
                         f"python -m experiments.evaluate CHECKPOINT --recall tests it")
    enc, n = load_tokenizer(checkpoint["tokenizer"]), checkpoint["config"].get("vocab_size")
    if enc.n_vocab != n:
        raise ValueError(f"the checkpoint's tokenizer has {enc.n_vocab} tokens, its model {n}")
    return enc


class Saved:
    """The run that --resume continues, out of its newest checkpoint; or, without --resume, none.

    Raises ValueError, one line, where --resume finds none or a damaged one.
    """

    def __init__(self, out, resume):
        self.out, self.file, self.checkpoint, self.settings = out, out / "last.pt", None, {}
        # A run with --fsdp has folders instead, of which the newest complete one counts.
        self.folder = sharded().newest(out) if any(out.glob("step-*/run.pt")) else None
        self.split = bool(self.folder)
        if resume:
            if not self.exists():
                raise ValueError(f"--resume: there is no {self.file}; leave --resume out to start a run")
            self.checkpoint = load_checkpoint(self.folder / "run.pt" if self.split else self.file)
            self.settings = self.checkpoint["settings"]

    def exists(self):
        return self.split or self.file.exists()

    def check(self, config, task):
        """Raises ValueError if a config or task is not that of this run, which could then not be continued."""
        if not self.checkpoint:
            return
        try:
            before = dataclasses.asdict(config_of(self.checkpoint))
        except TypeError as e:
            raise ValueError(f"--resume: {self.file} is from another version of fmem.py: {e}") from None
        free = "scan", "dropout", "recompute"
        differs = [k for k, v in dataclasses.asdict(config).items() if k not in free and before[k] != v]
        if differs or self.checkpoint["tokenizer"] != task.tokenizer:
            what = f"--{differs[0]}" if differs else "the tokenizer of --data"
            raise ValueError(f"--resume: {what} is not that of the run in {self.out}; start another with --out DIR")

    def restore(self, model, optimizer):
        """Put its weights and the optimiser's moments into these. All processes must call it. Raises ValueError, OSError."""
        if self.checkpoint and self.split:
            sharded().load(self.folder, model, optimizer)
        elif self.checkpoint:
            try:
                model.load_state_dict(self.checkpoint["model"])
                load_moments(optimizer, self.checkpoint["optimizer"])
            except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as e:
                raise ValueError(f"--resume: {self.file} is not whole: {one_line(e)}") from None

    def states(self, model, parts, windows, device):
        """The memories that --carry_state had at its end, for parts of so many windows; empty ones if those do not fit."""
        kept = self.checkpoint and self.checkpoint.get("states")
        if not isinstance(kept, list) or len(kept) != parts:         # as when --micro_batch has changed
            return [None] * parts
        kept = detached(kept, device)
        for state in kept:
            check_state(model, state, torch.zeros(windows, dtype=torch.long, device=device), self.file)
        return kept

    def remove(self):
        """All its checkpoints, for --overwrite."""
        for path in [self.file, self.out / "best.pt", *self.out.glob("step-*.pt"), *self.out.glob("step-*/run.pt")]:
            path.unlink(missing_ok=True)
            if path.name == "run.pt":
                shutil.rmtree(path.parent)


def sharded():
    """The module for --fsdp, loaded only where it is used."""
    from training import sharded
    return sharded
