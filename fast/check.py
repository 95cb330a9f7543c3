"""Are the Triton kernels right on this machine? A small scan and a step beside plain PyTorch, before they are trusted.

A compiler can be wrong on one kind of GPU and say nothing. So the first use of a shape and dtype in a process runs the kernels on
an input that has all the cases (a part of a chunk, theta of exactly 0 and 1, a state before and after, all gradients), beside
chunked.py in float64. FMEM_CHECK=0 leaves it out.
"""
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .chunked import scan_fast

# Relative root mean square errors that are refused: some ten times those of the tests, a hundredth of any mistake worth the name.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
WANTED = os.environ.get("FMEM_CHECK") != "0"


def wrong(kernel, step: Callable, device: torch.device, m: int, d: int, dtype: torch.dtype) -> str | None:
    """What the kernels of the module `kernel` and `step` get wrong for m rows of d numbers, in a few words; None if nothing."""
    try:
        for name, error in errors(kernel, step, device, m, d, dtype):
            if not error <= TOLERANCE[dtype]:               # NaN is not
                return f"{name} is wrong here by {error:.1e} of its size; please report it, with GPU and Triton version"
    except Exception as e:                                  # compilers, drivers and launches raise all sorts
        return f"they fail here ({type(e).__name__}: {(str(e).strip() or 'no reason given').splitlines()[0][:200]})"
    return None


def errors(kernel, step: Callable, device: torch.device, m: int, d: int, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Names and relative root mean square errors of all outputs, gradients and steps; also where no gradients are kept."""
    # One text of more chunks: for few long texts the kernels have other tiles.
    for part, of, texts, chunks in ((scans, kernel, 2, 2), (steps, step, 2, 0), (scans, kernel, 1, 5)):
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            found = [(name, ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item())
                     for name, got, want in part(of, device, m, d, dtype, texts, chunks)]
        yield from found


def inputs(T: int, m: int, d: int) -> list[Tensor]:
    """theta, phi, x, h0 of two texts and the gradients of y and hT, the same for everyone. The second has every case."""
    g = torch.Generator().manual_seed(0)
    alpha = torch.softmax(3 * torch.randn(2, T, m, generator=g), -1)
    theta, phi = torch.rand(2, T, 1, generator=g) * alpha, torch.rand(2, T, 1, generator=g) * alpha
    theta[0, ::7, 0], theta[1, T // 2:T // 2 + 20, m // 2], theta[1, ::5] = 1.0, 1.0, 0.0
    return [theta, phi, *(torch.randn(2, *shape, generator=g) for shape in ((T, d), (m, d), (T, d), (m, d)))]


def scans(kernel, device, m, d, dtype, texts, chunks):
    """(name, what the kernels give, what is right) of both outputs and the four gradients."""
    T = chunks * kernel.tiles(m, d, dtype)["C"] + 3
    theta, phi, x, h0, dy, dhT = (v[-texts:].to(device) for v in inputs(T, m, d))
    x, dy, results = x.to(dtype), dy.to(dtype), []
    for scan, kind in ((kernel.scan_triton, lambda v: v), (scan_fast, Tensor.double)):
        leaves = [kind(v).detach().requires_grad_() for v in (theta, phi, x, h0)]
        out = scan(*leaves, 1e-5)
        results.append([*out, *torch.autograd.grad(out, leaves, [kind(dy), kind(dhT)])])
    names = "y", "the last state", *(f"the gradient of {name}" for name in ("theta", "phi", "x", "the first state"))
    return list(zip((f"{name}{' of a single text' if texts == 1 else ''}" for name in names), *results, strict=True))


def steps(step, device, m, d, dtype, *_):
    """The same of a step that takes all rows, and of one that takes some."""
    theta, phi, x, h, *_ = (v.to(device) for v in inputs(1, m, d))
    theta, phi, x, found = theta[:, 0] + 0.1 / m, phi[:, 0], x[:, 0].to(dtype), []
    for k in dict.fromkeys((m, max(m // 4, 1))):
        rows = None if k == m else torch.stack([torch.arange(k), m - 1 - torch.arange(k)]).to(device)
        mine, some = h.clone(), torch.arange(m, device=device).expand(2, m) if rows is None else rows
        th, ph = (v.gather(1, some).contiguous() for v in (theta, phi))
        y = step(mine, x, th, ph, rows, 1e-5)
        at = some[..., None].expand(-1, -1, d)
        part = torch.lerp(h.double().gather(1, at), x.double()[:, None].expand(-1, k, -1), th.double()[..., None])      # eq. 10
        want = torch.einsum("bk,bkd->bd", ph.double() * torch.rsqrt(part.square().mean(-1) + 1e-5), part)               # eq. 11
        name = f"a step of {k} of {m} rows"
        found += [(f"{name}, its read,", y, want), (f"{name}, its write,", mine, h.double().scatter(1, at, part))]
    return found
