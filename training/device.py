"""Which device and dtype a run takes, and why; whether its model fits; torch.compile, tried out first."""
import contextlib
import os

import torch

from variants.build import n_parameters


def pick_device(name, local_rank=0):
    """-> torch.device, reason. Raises ValueError when it is not available."""
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
    return device, why


def pick_dtype(name, device):
    """-> torch.dtype, reason."""
    if name != "auto":
        return (torch.bfloat16 if name == "bf16" else torch.float32), "as asked"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16, "autocast; this GPU has it"
    return torch.float32, "no fast bf16 on this GPU" if device.type == "cuda" else "bf16 is for NVIDIA GPUs"


def autocast(device, dtype):
    """A function that makes the context in which the model computes."""
    return lambda: torch.autocast(device.type, torch.bfloat16) if dtype == torch.bfloat16 else contextlib.nullcontext()


def check_memory(config, device, shares=1):
    """Raises ValueError for a model that cannot be trained in this memory. shares: devices that it is split over."""
    room, needed = memory_of(device), 16 * n_parameters(config)     # float32 weights, gradients and two moments
    if room and needed > room * shares:
        raise ValueError(f"a model of {n_parameters(config):,} parameters needs 16 bytes for each to train, and {device} has "
                         f"{room / 2**30:.0f} GB; try a smaller --d_model, --n_layer, --n_rows or --d_mlp")


def out_of_memory(error):
    """Whether an exception says that there is too little memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate" in str(error)


def memory_of(device):
    """Bytes of memory of the GPU, or of the machine; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def try_compile(model, batch, amp, say):
    """torch.compile, tried out on one batch; the model itself, with the reason, where that fails."""
    compiled = torch.compile(model)
    try:
        with amp():
            compiled(batch)[0].sum().backward()
    except Exception as e:                                          # a compiler can raise anything
        say(f"compile   no: {type(e).__name__}: {str(e).strip().splitlines()[0][:160]}")
        compiled = model
    else:
        say("compile   yes")
    model.zero_grad(set_to_none=True)
    return compiled
