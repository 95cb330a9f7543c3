"""Mamba-2 in the memory's place, to compare with: `python train.py --mixer mamba2`.

It has the interface of `FactorizationMemory` in fmem.py, so that block, model, trainer and sampler are shared. Tested against a
loop over its own equations in float64, and against the transformers package with the same weights.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmem import wide
from variants.extended import ShortConv


class Mamba2(nn.Module):
    """Mamba-2 (Dao and Gu, arXiv 2405.21060), with the initialisation of its authors. H heads of P channels, N numbers each:

        z, u, delta = W_in x;    X, B, C = silu(conv(u));    delta = softplus(delta + bias)      one delta per head
        S_t = exp(delta_t A) S_{t-1} + delta_t X_t B_t^T          [P, N], A < 0 one number per head
        Y_t = S_t C_t + D X_t
        y   = W_o (norm(Y * silu(z)))

    State: (S [B, H, P, N] in float32, the last 3 inputs of the convolution [B, 3, channels]).
    """
    WIDTH, CHUNK = 4, 64

    def __init__(self, config):
        super().__init__()
        self.config, inner = config, 2 * config.d_model
        self.H, self.N = config.n_head or max(inner // 64, 1), config.d_state
        if inner % self.H:
            raise ValueError(f"mamba2 needs an n_head that divides 2 d_model ({inner}), not {self.H}")
        self.P = inner // self.H
        self.split = [inner, inner + 2 * self.N, self.H]
        self.W_in = nn.Linear(config.d_model, sum(self.split), bias=False)
        self.conv = ShortConv(inner + 2 * self.N, self.WIDTH)
        self.delta_bias = nn.Parameter(torch.empty(self.H))
        self.A_log = nn.Parameter(torch.empty(self.H))
        self.D = nn.Parameter(torch.ones(self.H))
        self.norm = nn.RMSNorm(inner, eps=config.norm_eps)
        self.W_o = nn.Linear(inner, config.d_model, bias=False)

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """x [B, T, d_model] -> y [B, T, d_model], state."""
        S, last = state or (None, None)
        z, u, delta = self.W_in(x).split(self.split, -1)
        u, last = self.conv(u, last)
        X, B, C = u.split([self.split[0], self.N, self.N], -1)
        X = X.unflatten(-1, (self.H, self.P))
        with torch.autocast(x.device.type, enabled=False):
            delta = F.softplus(wide(delta) + self.delta_bias)
            Y, S = scan_ssd(wide(X), delta, -wide(self.A_log).exp(), wide(B), wide(C), S, self.CHUNK)
            Y = (Y + self.D[:, None] * X).flatten(-2)
        return self.W_o(self.norm((Y * F.silu(z)).to(x.dtype))), (S, last)

    def step(self, x_t: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """x_t [B, d_model] -> y_t [B, d_model], state: a scan of one token."""
        y, state = self.forward(x_t[:, None], state)
        return y[:, 0], state

    def init_weights(self, init, add):
        init(self.W_in.weight)
        self.conv.init_weights()
        delta = torch.exp(torch.empty_like(self.delta_bias).uniform_(math.log(1e-3), math.log(0.1))).clamp(min=1e-4)
        with torch.no_grad():
            self.delta_bias.copy_(delta + torch.log(-torch.expm1(-delta)))          # softplus gives delta back
            self.A_log.uniform_(1, 16).log_()
        nn.init.ones_(self.D)
        init(self.W_o.weight, add)


def scan_ssd(X: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, S: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """Mamba-2's recurrence by matrix products, any T (its paper's section 6): inside a chunk like attention, with the
    decays for a mask; from chunk to chunk through the state.

    X [b, T, H, P], delta [b, T, H], A [H], B and C [b, T, N], S [b, H, P, N] or None for zeros -> Y like X, and the last S.
    On a GPU the authors' Triton kernel is used where the mamba_ssm package is installed.
    """
    b, T, H, P = X.shape
    if X.is_cuda and T > 1:
        try:
            from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as combined
            return combined(X, delta, A, B[:, :, None], C[:, :, None], chunk, initial_states=S, return_final_states=True)
        except ImportError:
            pass
    S = X.new_zeros(b, H, P, B.shape[-1]) if S is None else S
    if T == 1:
        S = S * (delta[:, 0] * A).exp()[..., None, None] + (delta[..., None] * X)[:, 0, ..., None] * B[:, :, None]
        return (S @ C[:, 0, None, :, None])[:, None, ..., 0], S
    c, n = min(chunk, T), -(-T // min(chunk, T))        # filled up with tokens of delta 0, which change nothing
    X, delta, B, C = (F.pad(v, (0, 0) * (v.dim() - 2) + (0, n * c - T)).unflatten(1, (n, c)) for v in (X, delta, B, C))
    X = (X * delta[..., None]).transpose(2, 3)                                      # [b, n, H, c, P]
    a = (delta * A).transpose(2, 3)                                                 # [b, n, H, c] log decays
    G = a.cumsum(-1)
    # masked before exp: above the diagonal the exponents are positive and may overflow
    below = torch.ones(c, c, dtype=torch.bool, device=X.device).tril()
    L = (G[..., :, None] - G[..., None, :]).masked_fill(~below, -math.inf).exp()    # [b, n, H, c, c]
    Y = (L * (C @ B.transpose(-1, -2))[:, :, None]) @ X
    added = (X * (G[..., -1:] - G).exp()[..., None]).transpose(-1, -2) @ B[:, :, None]      # [b, n, H, P, N]
    before = []                                         # the state before each chunk
    for decay, more in zip(G[..., -1].exp().unbind(1), added.unbind(1), strict=True):
        before.append(S)
        S = decay[..., None, None] * S + more
    Y = Y + G.exp()[..., None] * (C[:, :, None] @ torch.stack(before, 1).transpose(-1, -2))
    return Y.transpose(2, 3).flatten(1, 2)[:, :T], S
