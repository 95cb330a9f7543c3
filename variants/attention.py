"""LLaMA's attention in the memory's place, to compare with: `python train.py --mixer attention`.

It has the interface of `FactorizationMemory` in fmem.py, so that block, model, trainer and sampler are shared. Tested against a
loop over its own equations in float64, and against the transformers package with the same weights.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmem import wide


def rotate(x: Tensor, start: int, base: float = 10000.0) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864, LLaMA's layout): x [B, heads, T, D] at positions start, ...

    Channels i and i + D/2 are turned together, by the angle position * base^(-2i / D).
    """
    T, D = x.shape[-2:]
    frequencies = base ** (-torch.arange(0, D, 2, device=x.device, dtype=torch.float64) / D)
    angles = torch.arange(start, start + T, device=x.device, dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().to(wide(x).dtype), angles.sin().to(wide(x).dtype)       # [T, D/2]
    a, b = wide(x).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """LLaMA's causal attention: n_head heads of queries, n_kv_head of keys and values (grouped queries), rotary positions.

    State: (cache [2, B, n_kv_head, room, D], n): keys and values of the n tokens so far, with room for more.
    """

    def __init__(self, config):
        super().__init__()
        self.config, d = config, config.d_model
        self.n_head = config.n_head or max(d // 32, 1)
        self.n_kv = config.n_kv_head or self.n_head
        if d % self.n_head or d // self.n_head % 2 or self.n_head % self.n_kv:
            raise ValueError(f"attention needs heads of an even width: n_head {self.n_head} must divide d_model {d}, "
                             f"and n_kv_head {self.n_kv} must divide n_head")
        self.D = d // self.n_head
        self.W_q = nn.Linear(d, d, bias=False)
        self.W_k = nn.Linear(d, self.n_kv * self.D, bias=False)
        self.W_v = nn.Linear(d, self.n_kv * self.D, bias=False)
        self.W_o = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """x [B, T, d_model] -> y [B, T, d_model], state. The state given is not changed."""
        (B, T, _), n = x.shape, state[1] if state else 0
        q, k, v = (W(x).unflatten(-1, (-1, self.D)).transpose(1, 2) for W in (self.W_q, self.W_k, self.W_v))
        q, new = rotate(q, n), torch.stack([rotate(k, n), v])
        if state is None:
            cache = new
        elif T == 1 and not torch.is_grad_enabled() and n < state[0].shape[3]:      # a step: into the room that is left
            cache = state[0]
            cache[:, :, :, n:n + 1] = new
        else:                                           # make room for half as much again, so that few tokens must copy
            room = n // 2 if T == 1 else 0
            cache = torch.cat([state[0][:, :, :, :n], new, new.new_zeros(2, B, self.n_kv, room, self.D)], 3)
        k, v = cache[:, :, :, :n + T].to(q.dtype)
        # token t sees all of the cache up to itself; without a cache torch knows a faster way to say that
        mask = None if n == 0 or T == 1 else torch.ones(T, n + T, dtype=torch.bool, device=x.device).tril(n)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=n == 0 and T > 1, enable_gqa=self.n_kv < self.n_head)
        return self.W_o(y.transpose(1, 2).flatten(2)), (cache, n + T)

    def step(self, x_t: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """x_t [B, d_model] -> y_t [B, d_model], state. Without gradients the cache is written in place."""
        y, state = self.forward(x_t[:, None], state)
        return y[:, 0], state

    def init_weights(self, init, add):
        for W in (self.W_q, self.W_k, self.W_v):
            init(W.weight)
        init(self.W_o.weight, add)
