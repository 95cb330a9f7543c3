"""The memory's scan and step, faster than fmem.py's plain forms: which form runs on this machine, and why.

    chunked.py    the chunked form as one operator with a gradient of its own: form "fast", on any device with float64
    ../kernel.py  Triton kernels: form "kernel", on NVIDIA GPUs
    step_gpu.py   one step of it
    graph.py      generation as a CUDA graph
    decode_gpu.py what the graph holds: a step in few launches
    decode.py     generation on a CPU, in fewer calls
    check.py      whether the kernels are right here, before they are trusted

fmem.py works without this folder. Nothing here imports it: its callers check the shapes.
"""
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from . import check
from .chunked import scan_fast
from .decode import joined_step
from .graph import record_step

FASTEST = "matrix products, the fastest form here"


def choose(form: str, device: torch.device | str, m: int = 1, d: int = 1,
           dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The form that `form` means for m rows of d numbers on a device, "loop", "chunked", "fast" or "kernel", and why.

    Where the kernels would be taken but cannot be, one line on stderr says why not. (A compiled model has the answer as a
    constant.)
    """
    device = torch.device(device)
    if form in ("loop", "chunked"):
        return form, "as asked"
    if device.type == "mps":
        return "chunked", "plain PyTorch; the faster forms need float64 or an NVIDIA GPU"
    if form == "kernel" or (form == "auto" and device.type == "cuda"):
        if no_kernel(device, m, d, dtype) is None:
            return "kernel", "as asked" if form == "kernel" else "Triton kernels"
        return "fast", "matrix products"
    return "fast", "as asked" if form == "fast" else FASTEST


# What torch.compiler.assume_constant_result does, without importing the compiler, which takes a second at every start.
choose._dynamo_marked_constant = True


@functools.cache
def no_kernel(device: torch.device, m: int, d: int, dtype: torch.dtype) -> str | None:
    """Why kernel.py cannot be used, or should not, or None. Imported only here and below: all else works without Triton."""
    try:
        import kernel

        from .step_gpu import step_triton
        reason = kernel.why_not(device, m, d, dtype)
        if not reason and check.WANTED:
            reason = check.wrong(kernel, step_triton, device, m, d, dtype)
    except ImportError as e:
        reason = f"{e.name or e} is not installed"
    if reason:
        print(f'fmem: form "fast" instead of the Triton kernels: {reason}', file=sys.stderr, flush=True)
    return reason


def scan(theta: Tensor, phi: Tensor, xbar: Tensor, h0: Tensor, eps: float, form: str, recompute: bool) -> tuple[Tensor, Tensor]:
    """`fmem.scan` in form "fast" or "kernel", for shapes that fit."""
    if form == "kernel":
        from kernel import scan_triton
        return scan_triton(theta, phi, xbar, h0, eps, recompute)
    return scan_fast(theta, phi, xbar, h0, eps, recompute)


def capture_step(model, token: Tensor, state: list, sample: Callable, choice: tuple) -> Callable[[], Tensor] | None:
    """A step of the whole model and the choice of the next token, faster: a function that returns the next token [B] and moves
    the state on, in place; or None where there is none. token [B]: the last one chosen. sample(logits, *choice) chooses; the last
    entry of choice is its generator, a list of one per text, or None."""
    return (record_step if token.is_cuda else joined_step)(model, token, state, sample, choice)


def step(h: Tensor, xbar: Tensor, theta: Tensor, phi: Tensor, rows: Tensor | None, eps: float,
         form: str) -> tuple[Tensor, Tensor]:
    """Equations 10 and 11 for one token without gradients: changes h [B, m, d] in place where it can; returns y [B, d] and h.

    theta, phi [B, k] are the weights of the rows [B, k]; rows None: of all m. Of h only these rows are read and written.
    """
    if h.dtype == torch.float32 and h.is_contiguous() and choose(form, h.device, *h.shape[1:], xbar.dtype)[0] == "kernel":
        from .step_gpu import step_triton
        return step_triton(h, xbar, theta, phi, rows, eps), h
    part = h
    if rows is not None:
        table = h.contiguous().flatten(0, 1)                                        # the rows of all texts
        at = (rows + torch.arange(len(h), device=h.device)[:, None] * h.shape[1]).flatten()
        part = table.index_select(0, at).unflatten(0, rows.shape)
    with torch.autocast(xbar.device.type, enabled=False):
        part = part.lerp_(xbar.to(h.dtype)[:, None].expand_as(part), theta[..., None])      # eq. 10
        q = phi * torch.rsqrt(torch.linalg.vector_norm(part, dim=-1).square() / part.shape[-1] + eps)
        y = (q[:, None] @ part)[:, 0]                                                       # eq. 11
    if rows is not None:
        h = table.index_copy_(0, at, part.flatten(0, 1)).view_as(h)
    return y.to(xbar.dtype), h
