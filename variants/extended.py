"""Ours, not in the paper, and off by default: `python train.py --conv 4 --gate`."""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmem import FactorizationMemory


class ShortConv(nn.Module):
    """Mamba's: each channel becomes a weighted sum of its last `width` tokens, then SiLU. A token learns of its neighbours."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor, last: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, c], last [B, width - 1, c]: the tokens before x, None for zeros -> y [B, T, c] and the new last."""
        (B, T, c), w = x.shape, self.weight.shape[1]
        x = torch.cat([x.new_zeros(B, w - 1, c) if last is None else last.to(x.dtype), x], 1)
        y = self.bias + sum(x[:, j:j + T] * self.weight[:, j] for j in range(w))
        return F.silu(y), x[:, T:]

    def init_weights(self):
        for p in (self.weight, self.bias):
            nn.init.uniform_(p, -self.weight.shape[1] ** -0.5, self.weight.shape[1] ** -0.5)


class ExtendedMemory(FactorizationMemory):
    """The memory with a short convolution before the projections (`conv`) and an output gate (`gate`), both as in Mamba-2:

        y = W_o norm(read(conv(x)) * silu(W_g x))

    State: (h [B, m, d_memory], last [B, conv - 1, d_model] or None).
    """

    def __init__(self, config):
        super().__init__(config)
        self.conv = ShortConv(config.d_model, config.conv) if config.conv else None
        if config.gate:
            self.W_g = nn.Linear(config.d_model, config.d_memory, bias=False)
            self.gate_norm = nn.RMSNorm(config.d_memory, eps=config.norm_eps)

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        h, last = state or (None, None)
        u, last = self.conv(x, last) if self.conv else (x, last)
        y, h = self.read(u, h)
        return self.out(y, x), (h, last)

    def step(self, x_t: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        h, last = state or (None, None)
        u, last = self.conv(x_t[:, None], last) if self.conv else (x_t[:, None], last)
        y_t, h = self.read_step(u[:, 0], h)
        return self.out(y_t, x_t), (h, last)

    def out(self, y: Tensor, x: Tensor) -> Tensor:
        return self.W_o(self.gate_norm(y * F.silu(self.W_g(x))) if self.config.gate else y)

    def init_weights(self, init: Callable, add: float):
        super().init_weights(init, add)
        if self.conv:
            self.conv.init_weights()
        if self.config.gate:
            init(self.W_g.weight)
