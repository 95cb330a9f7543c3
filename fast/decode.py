"""Generation on a CPU: a step of the whole model in a third of the calls, for without it the calls cost more than the work.

What is multiplied by the same vector is one matrix (W_alpha, w_eta, w_mu and W_i; W_gate and W_up), with the gain of the norm
before it and 1 / tau in it. The norm itself is a number by which the product is scaled; sums with the residual stream are part of
the product before them; and since alpha is rescaled over the rows that are chosen, it is the softmax of their logits alone.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def joined_step(model, token: Tensor, state: list, sample: Callable, choice: tuple) -> Callable[[], Tensor] | None:
    """`capture_step` for the paper's layer in float32: as `model(token, state)` and `sample` would do it, up to rounding."""
    plain = all(type(block.memory).__name__ == "FactorizationMemory" for block in model.blocks) and not model.training
    if not plain or model.config.scan in ("loop", "chunked") or torch.is_autocast_enabled("cpu"):
        return None
    if any(v.dtype != torch.float32 or v.device.type != "cpu" for v in (*model.parameters(), *state)):
        return None
    state[:] = [h.contiguous() for h in state]
    B, eps, token = len(token), model.config.norm_eps, token.clone()
    layers = [Layer(block, h, eps) for block, h in zip(model.blocks, state, strict=True)]

    def step():
        x = F.embedding(token, model.embed.weight)
        if B == 1:
            x = x[0]
        for layer in layers:
            layer(x)
        logits = F.linear(model.norm(x), model.head.weight)
        token.copy_(sample(logits[None] if B == 1 else logits, *choice))
        return token.clone()

    return step


def normed(x: Tensor, W: Tensor, eps: float) -> Tensor:
    """W norm(x) without the gain: x [d] -> [n], or x [B, d] -> [B, n]; W [n, d]."""
    if x.dim() == 1:
        scale = 1 / math.sqrt(torch.dot(x, x).item() / len(x) + eps)
        return torch.addmv(x.new_empty(len(W)), W, x, beta=0, alpha=scale)
    return torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * (x @ W.T)


def add(x: Tensor, W: Tensor, y: Tensor):
    """x += W y, in place."""
    x.addmv_(W, y) if x.dim() == 1 else x.addmm_(y, W.T)


class Layer:
    """A block, called with the residual stream [d_model] or [B, d_model]; it changes that and h [B, m, d] in place."""

    def __init__(self, block, h: Tensor, eps: float):
        memory, config = block.memory, block.memory.config
        self.h, self.eps, self.m, self.k = h, eps, config.n_rows, config.k_rows or config.n_rows
        weights = memory.W_alpha.weight / config.tau, memory.w_eta.weight, memory.w_mu.weight, memory.W_i.weight
        self.W_in = torch.cat(weights) * block.memory_norm.weight
        self.W_mlp = torch.cat([block.mlp.W_gate.weight, block.mlp.W_up.weight]) * block.mlp_norm.weight
        self.W_o, self.W_down = memory.W_o.weight, block.mlp.W_down.weight
        self.first = torch.arange(len(h))[:, None] * self.m

    def __call__(self, x: Tensor):
        logits, rates, xbar = normed(x, self.W_in, self.eps).tensor_split((self.m, self.m + 2), -1)
        if self.k < self.m:
            logits, rows = logits.topk(self.k, -1)                                      # eq. 12
        alpha = torch.softmax(logits, -1)                                               # eqs. 4 and 13
        theta, phi = (torch.sigmoid(rates)[..., None] * alpha[..., None, :]).unbind(-2)        # eqs. 5 to 8
        h, chosen = self.h.view(-1, self.h.shape[-1]), self.k < self.m
        if chosen:
            rows = (rows + self.first).flatten() if x.dim() == 2 else rows
            part = h.index_select(0, rows)
        else:
            part = h
        part = part.view(*alpha.shape, -1)
        part = part.lerp_(xbar[..., None, :], theta[..., None])                         # eq. 10
        q = phi * torch.rsqrt(torch.linalg.vector_norm(part, dim=-1).square_().div_(part.shape[-1]).add_(self.eps))
        y = q @ part if x.dim() == 1 else (q[:, None] @ part)[:, 0]                     # eq. 11
        if chosen:
            h.index_copy_(0, rows, part.view(len(rows), -1))
        add(x, self.W_o, y)
        gate, up = normed(x, self.W_mlp, self.eps).tensor_split(2, -1)
        add(x, self.W_down, F.silu(gate).mul_(up))
