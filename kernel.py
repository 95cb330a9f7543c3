"""The first-order recurrence of fmem.py in Triton: one launch for all steps.

    s_t = keep_t s_{t-1} + write_t

The rest of fmem.scan_chunked is matrix products, for which cuBLAS is fast. The recurrence runs
twice: for the memory, over the chunks (m rows of d numbers, T / 32 steps), and for the squared
norms, over the tokens of a chunk (m rows of one number, 32 steps). A PyTorch loop launches two
kernels per step, and each reads and writes all of s. Here, a program keeps up to 1,024 numbers of s
in registers and loops over all steps: it reads write once and writes the states once. Nothing else
is fused. The gradient is the same recurrence backwards in time, and uses the same kernel.

Estimated cost. For the memory, the forward pass reads T m d / 32 numbers and writes as many, and so
does the backward pass. With B 8, T 4096, d 1024, m 64 in bf16, this is 134 MB and 134 MB, or 0.1 ms
of an H100's bandwidth. The squared norms are T m numbers in float32, a sixteenth of that. Fusing
the whole scan would keep a chunk's memory on chip and save about a third of the scan's time. The
float64 part of scan_chunked runs at half the float32 rate on a data-centre card. On a consumer card
it runs at 1/64 of that rate: about 2.5 ms per step of the GPU preset (RTX 4090). None of this is
measured. The kernel has run in Triton's interpreter and compiles for NVIDIA's sm_80, sm_90 and
sm_100, but it has not run on a GPU.
"""

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # the wheel can be installed without Triton
    raise ImportError("Triton is not installed; run pip install triton") from None

BLOCK = 1024  # maximum number of elements of s per program


@triton.jit
def recurrence_kernel(
    keep,
    write,
    first,
    before,
    last,
    steps,
    width,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program: all steps for BLOCK of the width = m D numbers of s in one of B sequences."""
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    s = tl.load(first + sequence * width + column, mask=mask, other=0.0).to(DTYPE)
    for i in range(steps):
        t = sequence * steps + (steps - 1 - i if REVERSE else i)
        tl.store(before + t * width + column, s, mask=mask)
        keep_t = tl.load(keep + t * (width // D) + column // D, mask=mask, other=0.0).to(DTYPE)
        write_t = tl.load(write + t * width + column, mask=mask, other=0.0).to(DTYPE)
        s = keep_t * s + write_t
    tl.store(last + sequence * width + column, s, mask=mask)


@torch.library.triton_op("fmem::recurrence", mutates_args={})
def recurrence_op(
    keep: torch.Tensor, write: torch.Tensor, first: torch.Tensor, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrence`; reverse: from the last step to the first. torch.compile can trace it."""
    sequences, steps, m, d = write.shape
    keep = keep.contiguous()
    write = write.contiguous()
    first = first.contiguous()
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    before = torch.empty_like(write)
    last = torch.empty_like(first, dtype=dtype)
    block = min(BLOCK, triton.next_power_of_2(m * d))
    grid = (sequences, triton.cdiv(m * d, block))
    kernel = recurrence_kernel
    if isinstance(kernel, triton.JITFunction):  # false in Triton's interpreter
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](
        keep,
        write,
        first,
        before,
        last,
        steps,
        m * d,
        D=d,
        BLOCK=block,
        REVERSE=reverse,
        DTYPE=tl.float64 if dtype == torch.float64 else tl.float32,
    )
    return before, last


def save_for_gradient(ctx, inputs, output):
    keep, _, first, reverse = inputs
    ctx.save_for_backward(keep, output[0])
    ctx.first_dtype = first.dtype
    ctx.reverse = reverse


@once_differentiable
def gradient(ctx, d_before, d_last):
    """Let g_t be the gradient with respect to s_t, through all that follows step t. It obeys

        g_{t-1} = keep_t g_t + d_before_t

    which is the same recurrence backwards in time, from d_last. Its state before each step is g_t,
    the gradient of write_t. The gradient of keep_t is <g_t, s_{t-1}>, summed in float32.
    """
    keep, before = ctx.saved_tensors
    g, d_first = recurrence_op(keep, d_before, d_last, not ctx.reverse)
    d_keep = (g.to(d_first.dtype) * before.to(d_first.dtype)).sum(-1)
    return d_keep.to(keep.dtype), g, d_first.to(ctx.first_dtype), None


recurrence_op.register_autograd(gradient, setup_context=save_for_gradient)


def recurrence(keep, write, first):
    """fmem.recurrence on a GPU: s_t = keep_t s_{t-1} + write_t, from s_0 = first.

    keep [B, T, m], write [B, T, m, d], first [B, m, d]: on one device, of any floating-point types,
    sizes and strides. Returns s before each step [B, T, m, d] in write's dtype, and s after the
    last step [B, m, d] in float32 (float64 if first is float64), the type in which s is computed.
    Only first derivatives are supported. Raises ValueError if the arguments do not match.
    """
    if write.dim() != 4 or keep.shape != write.shape[:3] or first.shape != write[:, 0].shape:
        shapes = ", ".join(str(tuple(v.shape)) for v in (keep, write, first))
        raise ValueError(f"shapes must be [B, T, m], [B, T, m, d] and [B, m, d], not {shapes}")
    if not all(v.is_floating_point() and v.device == write.device for v in (keep, write, first)):
        raise ValueError("keep, write and first must be floating-point tensors on one device")
    return recurrence_op(keep, write, first, False)
