"""The first-order recurrence of fmem.py in Triton: one launch instead of one per step.

    s_t = keep_t s_{t-1} + write_t

fmem.scan_chunked is matrix products, which cuBLAS does well, except for this recurrence: of the
memory over the chunks (m rows of d numbers, T / 32 steps), and of the squared lengths over the
tokens of a chunk (m rows of one number, 32 steps). A PyTorch loop launches two kernels for each
step, and each of them reads and writes all of s. Here a program takes up to 1,024 numbers of s,
keeps them in registers and walks through time: write is read once, the states are written once.
Nothing else is fused. The gradient is the same recurrence backwards in time, by the same kernel.

Cost, on paper. For the memory, T m d / 32 numbers are read and as many written, both forward and
backward: at B 8, T 4096, d 1024, m 64 in bf16, 134 MB and 134 MB, or 0.1 ms of an H100's bandwidth.
For the lengths it is T m numbers in float32, a sixteenth of that. Kernels that fuse the whole scan
would keep the memory of a chunk on the chip, and save about a third of the scan's time. The float64
part of scan_chunked runs at half the float32 rate on a data-centre card and at 1/64 of it on a
consumer card, where it costs about 2.5 ms per step of the GPU preset (RTX 4090). None of this is
measured: the kernel has run in Triton's interpreter and is compiled for NVIDIA's sm_80, sm_90 and
sm_100, but no GPU has run it.
"""

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # a clear message, since the wheel can be installed without it
    raise ImportError("it needs Triton: pip install triton") from None

BLOCK = 1024  # numbers of s per program, at most


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
    WIDE: tl.constexpr,
):
    """One program: BLOCK of the width = m D numbers of s in one of the G sequences, all steps."""
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    s = tl.load(first + sequence * width + column, mask=inside, other=0.0).to(WIDE)
    for i in range(steps):
        t = sequence * steps + (steps - 1 - i if REVERSE else i)
        tl.store(before + t * width + column, s, mask=inside)
        keep_t = tl.load(keep + t * (width // D) + column // D, mask=inside, other=0.0).to(WIDE)
        write_t = tl.load(write + t * width + column, mask=inside, other=0.0).to(WIDE)
        s = keep_t * s + write_t
    tl.store(last + sequence * width + column, s, mask=inside)


@torch.library.triton_op("fmem::recurrence", mutates_args={})
def recurrence_op(
    keep: torch.Tensor, write: torch.Tensor, first: torch.Tensor, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrence`, from the last step to the first if reverse; torch.compile sees through it."""
    sequences, steps, m, d = write.shape
    keep = keep.contiguous()
    write = write.contiguous()
    first = first.contiguous()
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    before = torch.empty_like(write)
    last = torch.empty_like(first, dtype=wide)
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
        WIDE=tl.float64 if wide == torch.float64 else tl.float32,
    )
    return before, last


def save_for_gradient(ctx, inputs, output):
    keep, _, first, reverse = inputs
    ctx.save_for_backward(keep, output[0])
    ctx.first_dtype = first.dtype
    ctx.reverse = reverse


@once_differentiable
def gradient(ctx, d_before, d_last):
    """Let g_t be the gradient of s_t, as what comes after step t passes it back. It obeys

        g_{t-1} = keep_t g_t + d_before_t

    which is the same recurrence backwards in time, from d_last. So the state before each of its
    steps is g_t, the gradient of write_t; that of keep_t is <g_t, s_{t-1}>, summed in float32.
    """
    keep, before = ctx.saved_tensors
    g, d_first = recurrence_op(keep, d_before, d_last, not ctx.reverse)
    d_keep = (g.to(d_first.dtype) * before.to(d_first.dtype)).sum(-1)
    return d_keep.to(keep.dtype), g, d_first.to(ctx.first_dtype), None


recurrence_op.register_autograd(gradient, setup_context=save_for_gradient)


def recurrence(keep, write, first):
    """fmem.recurrence on a GPU: s_t = keep_t s_{t-1} + write_t, from s_0 = first.

    keep [G, T, m], write [G, T, m, d], first [G, m, d], each of any floating-point type, on one
    device; any sizes, any strides. Returns the s before each step [G, T, m, d] in write's dtype,
    and the last one [G, m, d] in float32 (float64 if first is), the type in which s is carried.
    Differentiable in all three, once. Raises ValueError for what does not fit.
    """
    if write.dim() != 4 or keep.shape != write.shape[:3] or first.shape != write[:, 0].shape:
        shapes = ", ".join(str(tuple(v.shape)) for v in (keep, write, first))
        raise ValueError(f"shapes must be [G, T, m], [G, T, m, d] and [G, m, d], not {shapes}")
    if not all(v.is_floating_point() and v.device == write.device for v in (keep, write, first)):
        raise ValueError("keep, write and first must be floating-point tensors on one device")
    return recurrence_op(keep, write, first, False)
