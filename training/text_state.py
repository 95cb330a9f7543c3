"""A text in a file: what sample.py --save-state keeps and --load-state continues from. It is of no use to another model."""
import codecs
import hashlib

import torch

from data.messages import one_line
from training.checkpoint import check_state, load_checkpoint, save_checkpoint

FORMAT = "fmem state 1"


def save_state(after, path, model):
    """Write what `sample.stream` returned. Raises OSError."""
    save_checkpoint({"format": FORMAT, "model": fingerprint(model), **after}, path)


def fingerprint(model):
    """sha256 of the weights."""
    total = hashlib.sha256()
    for name, weight in model.state_dict().items():
        total.update(name.encode() + weight.cpu().float().numpy().tobytes())
    return total.hexdigest()


def load_state(path, model, device):
    """What `sample.stream` returned, from a file of `save_state`. Raises ValueError, one line, if it is not one of this model."""
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
