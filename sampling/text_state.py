"""Texts to continue: prompts, and what sample.py --save-state keeps of a text (of no use to another model)."""
import codecs
import hashlib
import sys
from pathlib import Path

import torch

from data.messages import one_line
from training.checkpoint import check_state, load_checkpoint, save_checkpoint

FORMAT = "fmem state 1"


def read_prompt(prompt):
    """The prompt as text: itself, FILE:path, or - for standard input. Raises ValueError, OSError."""
    if prompt == "-":
        raw = sys.stdin.buffer.read()
    elif prompt.startswith("FILE:"):
        raw = Path(prompt[5:]).read_bytes()
    else:
        return prompt.encode("utf-8", "replace").decode("utf-8")    # bytes that were not UTF-8 arrive as surrogates
    return raw.decode("utf-8", "replace")


def save_state(after, path, model):
    """Write what texts.Writing.after gave. Raises OSError."""
    save_checkpoint({"format": FORMAT, "model": fingerprint(model), **after}, path)


def fingerprint(model):
    """sha256 of the weights."""
    total = hashlib.sha256()
    for name, weight in model.state_dict().items():
        total.update(name.encode() + weight.cpu().float().numpy().tobytes())
    return total.hexdigest()


def load_state(path, model, device):
    """What texts.Writing.after gave, from a file of `save_state`. Raises ValueError, one line, if it is not one of this model."""
    before = load_checkpoint(path, device, FORMAT, "sample.py --save-state")
    if before.get("model") != fingerprint(model):
        raise ValueError(f"{path} belongs to another model")
    try:
        if type(before["token"]) is not int or not 0 <= before["token"] < model.config.vocab_size:
            raise ValueError("its token is not in the vocabulary")
        torch.Generator(device).set_state(before["generator"].cpu())
        codecs.getincrementaldecoder("utf-8")(errors="replace").setstate((bytes(before["held"]), 0))
        state = before["state"]
    except Exception as e:                              # the fields can be anything
        raise ValueError(f"{path} does not hold a state of this model: {one_line(e)}") from None
    check_state(model, state, torch.tensor([before["token"]], device=device), path)
    return before
