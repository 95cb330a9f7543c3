"""Generation on a GPU: a step of the whole model in nine launches per layer, for at this size their number is the time.

The residual stream is added to and normed in one kernel; the affinities are chosen, renormalised and used where the memory's rows
are read and written, in another; W_alpha, w_eta and w_mu are one matrix, in float32 as in training, W_gate and W_up another.
graph.py records this step, and takes it only if its logits are those of single steps.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from kernel import MAX_D, MAX_M

from .step_gpu import step_tiles


@triton.jit
def add_norm_kernel(x, y, gain, total, wide, low, eps, d: constexpr, BD: constexpr, ADD: constexpr, LOW: constexpr):
    """total = x + y; its norm into wide, and into low in the dtype of that. One program per text."""
    b, e = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    at, mask = b * d + e, e < d
    v = tl.load(x + at, mask=mask, other=0.0)
    if ADD:
        v += tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + at, v, mask=mask)
    v = v * tl.rsqrt(tl.sum(v * v, 0) / d + eps) * tl.load(gain + e, mask=mask, other=0.0)
    tl.store(wide + at, v, mask=mask)
    if LOW:
        tl.store(low + at, v.to(low.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul_kernel(both, out, n: constexpr, BLOCK: constexpr):
    """out = silu(gate) up, where both [B, 2 n] holds them side by side."""
    b, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both + b * 2 * n + i, mask=i < n, other=0.0).to(tl.float32)
    up = tl.load(both + b * 2 * n + n + i, mask=i < n, other=0.0).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)     # rounded as PyTorch rounds it
    tl.store(out + b * n + i, (silu * up).to(out.dtype.element_ty), mask=i < n)


@triton.jit
def route_step_kernel(h, x, routing, y, tau, eps, m: constexpr, d: constexpr, k: constexpr, BM: constexpr, BK: constexpr,
                      BD: constexpr, PART: constexpr):
    """Eqs. 4 to 8 and 10 to 13 for one token: routing [B, m + 2] holds W_alpha x, w_eta x and w_mu x; h changes in place.
    A program does PART rows of a text; y [m / PART, B, d] gets what each adds to the read."""
    b, i, e = tl.program_id(0).to(tl.int64), tl.arange(0, BM), tl.arange(0, BD)
    logits = tl.load(routing + b * (m + 2) + i, mask=i < m, other=-float("inf")) / tau
    eta, mu = tl.load(routing + b * (m + 2) + m), tl.load(routing + b * (m + 2) + m + 1)
    alpha = tl.exp(logits - tl.max(logits, 0))
    rank = tl.zeros([BM], tl.int32)                     # rows that come before this one; of equal ones the first
    for start in range(0, m, 16):
        j = start + tl.arange(0, 16)
        other = tl.load(routing + b * (m + 2) + j, mask=j < m, other=-float("inf")) / tau
        before = (other[None, :] > logits[:, None]) | ((other[None, :] == logits[:, None]) & (j[None, :] < i[:, None]))
        rank += tl.sum(before.to(tl.int32), 1)
    chosen = (i < m) & (rank < k)
    alpha = tl.where(chosen, alpha, 0.0)
    alpha = alpha / tl.sum(alpha, 0)
    theta, phi = alpha / (1 + tl.exp(-eta)), alpha / (1 + tl.exp(-mu))
    xb, acc = tl.load(x + b * d + e, mask=e < d, other=0.0).to(tl.float32), tl.zeros([BD], tl.float32)
    for start in range(0, PART, BK):
        row = tl.program_id(1) * PART + start + tl.arange(0, BK)
        same = row[:, None] == i[None, :]               # theta and phi of these rows, out of those of all
        th, ph = tl.sum(tl.where(same, theta[None, :], 0.0), 1), tl.sum(tl.where(same, phi[None, :], 0.0), 1)
        mine = tl.sum((same & chosen[None, :]).to(tl.int32), 1) > 0
        p, mask = h + (b * m + row[:, None]) * d + e[None, :], mine[:, None] & (e < d)[None, :]
        s = tl.load(p, mask=mask, other=0.0)
        s += th[:, None] * (xb[None, :] - s)
        tl.store(p, s, mask=mask)
        q = ph * tl.rsqrt(tl.sum(tl.where(mask, s * s, 0.0), 1) / d + eps)
        acc += tl.sum(tl.where(mask, q[:, None] * s, 0.0), 0)
    tl.store(y + (tl.program_id(1) * tl.num_programs(0) + b) * d + e, acc.to(y.dtype.element_ty), mask=e < d)


class Layer:
    """A block, called with the residual stream x [B, d_model] in float32 and what is still to be added to it; returns both anew.
    Changes h [B, m, d] in place. low: the dtype of the products."""

    def __init__(self, block, h: Tensor, eps: float, low: torch.dtype):
        memory, config = block.memory, block.memory.config
        self.h, self.eps, self.config, self.low = h, eps, config, low
        self.memory_norm, self.mlp_norm = block.memory_norm.weight, block.mlp_norm.weight
        self.W_route = torch.cat([memory.W_alpha.weight, memory.w_eta.weight, memory.w_mu.weight])
        self.W_i, self.W_o, self.W_down = (W.weight.to(low) for W in (memory.W_i, memory.W_o, block.mlp.W_down))
        self.W_mlp = torch.cat([block.mlp.W_gate.weight, block.mlp.W_up.weight]).to(low)

    def __call__(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        x, wide, low = self.add_norm(x, y, self.memory_norm)
        y = self.step(F.linear(low, self.W_i), F.linear(wide, self.W_route))
        x, _, low = self.add_norm(x, F.linear(y, self.W_o), self.mlp_norm)
        both = F.linear(low, self.W_mlp)
        out = both.new_empty(len(x), both.shape[1] // 2)
        silu_mul_kernel[len(x), triton.cdiv(out.shape[1], 1024)](both, out, n=out.shape[1], BLOCK=1024)
        return x, F.linear(out, self.W_down)

    def add_norm(self, x: Tensor, y: Tensor | None, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x + y, and its norm in float32 and in the dtype of the products."""
        d, wide, total = x.shape[1], torch.empty_like(x), x if y is None else torch.empty_like(x)
        low = wide if self.low == torch.float32 else torch.empty_like(x, dtype=self.low)
        add_norm_kernel[len(x),](x, x if y is None else y, gain, total, wide, low, self.eps, d=d, BD=triton.next_power_of_2(d),
                                 ADD=y is not None, LOW=low is not wide)
        return total, wide, low

    def step(self, xbar: Tensor, routing: Tensor) -> Tensor:
        (B, m, d), k = self.h.shape, self.config.k_rows or self.config.n_rows
        t = step_tiles(B, m, d)
        if m < 16 * t["BK"]:                            # a sum of parts is two launches more; only a large memory is worth them
            t["PART"] = -(-m // t["BK"]) * t["BK"]
        parts = -(-m // t["PART"])
        y = xbar.new_empty(parts, B, d, dtype=torch.float32 if parts > 1 else xbar.dtype)
        route_step_kernel[B, parts](self.h, xbar, routing, y, self.config.tau, self.eps, m=m, d=d, k=k,
                                    BM=max(16, triton.next_power_of_2(m)), **t)
        return y.sum(0).to(xbar.dtype) if parts > 1 else y[0]


def fused_step(model, token: Tensor, state: list, sample: Callable, choice: tuple) -> Callable[[], Tensor] | None:
    """A function that does what `token.copy_(sample(model(token, state)[0], *choice))` does, up to rounding, moves the state on
    in place, and returns the logits. None for other layers than the paper's, weights not in float32, and shapes that the kernels
    are not built for."""
    config = model.config
    plain = all(type(block.memory).__name__ == "FactorizationMemory" for block in model.blocks) and not model.training
    too_large = config.n_rows > MAX_M or max(config.d_model, config.d_memory) > MAX_D
    if not plain or too_large or config.scan in ("loop", "chunked", "fast"):
        return None
    if any(v.dtype != torch.float32 for v in (*model.parameters(), *state)):
        return None
    kind = token.device.type
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    layers = [Layer(block, h, config.norm_eps, low) for block, h in zip(model.blocks, state, strict=True)]
    head = model.head.weight.to(low)

    def step():
        x, y = F.embedding(token, model.embed.weight), None
        with torch.autocast(kind, enabled=False):       # the layers have their dtypes
            for layer in layers:
                x, y = layer(x, y)
            logits = F.linear(model.norm(x + y).to(low), head)
        token.copy_(sample(logits, *choice))
        return logits

    return step
