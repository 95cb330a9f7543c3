"""One step of generation in Triton: equations 10 and 11 for a single token, on the rows that it is routed to.

It works in place, so it loads and stores the same addresses, with so few warps that no two hold the same numbers.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr


@triton.jit
def step_kernel(h, x, rows, theta, phi, y, eps, m: constexpr, d: constexpr, k: constexpr, BK: constexpr, BD: constexpr,
                PART: constexpr, DENSE: constexpr):
    """Eqs. 10 and 11 for one token: of h[b] only the k rows in `rows` (DENSE: all) are read and written, in place.
    A program does PART of them; y [k / PART, B, d] gets what each adds to the read."""
    b, e = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    xb, acc = tl.load(x + b * d + e, mask=e < d, other=0.0).to(tl.float32), tl.zeros([BD], tl.float32)
    for start in range(0, PART, BK):
        i = tl.program_id(1) * PART + start + tl.arange(0, BK)
        chosen = i < k
        row = i.to(tl.int64) if DENSE else tl.load(rows + b * k + i, mask=chosen, other=0).to(tl.int64)
        th = tl.load(theta + b * k + i, mask=chosen, other=0.0)
        p, mask = h + (b * m + row[:, None]) * d + e[None, :], chosen[:, None] & (e < d)[None, :]
        s = tl.load(p, mask=mask, other=0.0)
        s += th[:, None] * (xb[None, :] - s)
        tl.store(p, s, mask=mask)
        q_t = tl.load(phi + b * k + i, mask=chosen, other=0.0) * tl.rsqrt(tl.sum(tl.where(mask, s * s, 0.0), 1) / d + eps)
        acc += tl.sum(q_t[:, None] * s, 0)
    tl.store(y + (tl.program_id(1) * tl.num_programs(0) + b) * d + e, acc.to(y.dtype.element_ty), mask=e < d)


def step_triton(h: Tensor, x: Tensor, theta: Tensor, phi: Tensor, rows: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """One token, eqs. 10 and 11: changes h [B, m, d] (float32, contiguous) in place and returns y [B, d] in x's dtype.

    theta, phi [B, k] are the weights of the rows [B, k], which must differ within a text; rows None: of all m. Of h only
    these rows are read and written. No gradient. Raises ValueError for a state that cannot be changed in place.
    """
    (B, m, d), k = h.shape, theta.shape[1]
    if h.dtype != torch.float32 or not h.is_contiguous():
        raise ValueError(f"the state must be float32 and contiguous, not {h.dtype} with strides {h.stride()}")
    x, theta, phi, t = x.contiguous(), theta.float().contiguous(), phi.float().contiguous(), step_tiles(B, k, d)
    parts = -(-k // t["PART"])
    y = x.new_empty(parts, B, d, dtype=torch.float32 if parts > 1 else x.dtype)
    with torch.cuda.device_of(x):
        step_kernel[B, parts](h, x, theta if rows is None else rows.contiguous(), theta, phi, y, eps, m=m, d=d, k=k,
                              DENSE=rows is None, **t)
    return y.sum(0).to(x.dtype) if parts > 1 else y[0]


def step_tiles(B: int, k: int, d: int) -> dict:
    """The whole width of a row, as many rows at once as registers hold, and no more warps than have numbers of their own. With
    many rows and few texts they are divided among programs, about 128 in all, or most of the GPU would be idle."""
    BD = max(16, triton.next_power_of_2(d))
    BK = max(1, min(triton.next_power_of_2(k), 8192 // BD))
    turns = -(-k // BK)
    PART = BK * (-(-turns // max(1, 128 // B)) if turns >= 4 else turns)
    return dict(BK=BK, BD=BD, PART=PART, num_warps=max(1, min(8, BK * BD // 1024)))
