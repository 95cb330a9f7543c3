"""Which device and dtype a run takes, and why; whether its model fits; torch.compile, tried out first."""
import contextlib
import os
import statistics
import time

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


# Dense bf16 products, FLOP/s with sums in float32, as the maker gives them; the first name that is part of the device's.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12,
         "RTX 3090": 71e12}


def flops_per_token(config, context):
    """Of training, forward and backward: 6 per parameter (as docs/scaling.md has it), and what the layer computes between tokens:
    the scan in chunks of 32, attention's products with half of the context on average, Mamba-2's scan in chunks of 64."""
    d, mixer = config.d_model, config.mixer
    between = {"memory": 2 * config.d_memory * (9 * config.n_rows + 5 * 32), "attention": 6 * d * context,
               "mamba2": 12 * d * (config.d_state + 64)}[mixer]
    return 6 * n_parameters(config) + config.n_layer * between


class Meter:
    """What of a GPU a run uses, in words for its progress line; nothing elsewhere."""

    def __init__(self, device, dtype, config, context, processes=1):
        self.device, self.on = device, device.type == "cuda"
        self.flops = flops_per_token(config, context) / processes
        name = torch.cuda.get_device_name(device) if self.on else ""
        known = dtype == torch.bfloat16                 # peaks of other dtypes are not in the table
        self.peak = next((peak for part, peak in PEAKS.items() if part in name), None) if known else None

    def __call__(self, tokens_per_second):
        if not self.on:
            return ""
        share = f" | {tokens_per_second * self.flops / self.peak:.1%} of the peak" if self.peak else ""
        return f"{share} | {torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} GB at most"


def try_compile(model, batch, amp, say, asked=True):
    """torch.compile, tried out on one batch; the model itself, with the reason, where that fails. asked: it was asked for, so it
    is taken if it works; else only if it is faster."""
    def seconds(net, times):
        """Of a pass forward and backward: the median."""
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            with amp():
                loss = net(batch)[0].sum()
            loss.backward()
            if batch.is_cuda:
                torch.cuda.synchronize(batch.device)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    compiled, reason = torch.compile(model), "yes"
    try:
        seconds(compiled, 1)                                        # compiles
        if not asked:
            seconds(model, 1)
            plain, faster = seconds(model, 5), seconds(compiled, 5)
            reason = f"{'yes' if faster < plain else 'no'}: {plain / faster:.2f} times as fast as without, in a trial"
            compiled = compiled if faster < plain else model
    except Exception as e:                                          # a compiler can raise anything
        reason, compiled = f"no: {type(e).__name__}: {str(e).strip().splitlines()[0][:160]}", model
    say(f"compile   {reason}")
    model.zero_grad(set_to_none=True)
    return compiled
