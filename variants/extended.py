"""Ours, not in the paper, and off by default: `python train.py --shared_row --shift`, `--read_rank 8`, `--conv 4 --gate`."""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmem import FactorizationMemory, wide


class ShortConv(nn.Module):
    """Mamba's: each channel becomes a weighted sum of its last `width` tokens, then SiLU. A token learns of its neighbours."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))
        self.activation = F.silu

    def forward(self, x: Tensor, last: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, c], last [B, width - 1, c]: the tokens before x, None for zeros -> y [B, T, c] and the new last."""
        (B, T, c), w = x.shape, self.weight.shape[1]
        x = torch.cat([x.new_zeros(B, w - 1, c) if last is None else last.to(x.dtype), x], 1)
        y = self.bias + sum(x[:, j:j + T] * self.weight[:, j] for j in range(w))
        return self.activation(y), x[:, T:]

    def init_weights(self):
        for p in (self.weight, self.bias):
            nn.init.uniform_(p, -self.weight.shape[1] ** -0.5, self.weight.shape[1] ** -0.5)


class ExtendedMemory(FactorizationMemory):
    """The memory with any of five changes.

    shared_row  The last of the m rows stands outside the softmax: every token writes and reads it, at rates of its own,
                theta[m-1], phi[m-1] = sigmoid(w_shared x), beside the k rows among the other m - 1 that it is routed to.
    shift       The token before has a part in the write's routing: of the logits l = W_alpha x it takes (1 - lambda) l_t
                + lambda l_{t-1}, with lambda = sigmoid(shift), one number per layer. What follows a key can so be written to
                the key's rows, where the key will look. The read takes l_t alone.
    read_rank   The read has logits of its own, l + W_read_out W_read_in x, a difference of this rank that starts at 0.
    conv, gate  As in Mamba-2, a short convolution before the projections and an output gate:
                y = W_o norm(read(conv(x)) * silu(W_g x))

    State: (h [B, m, d_memory], last [B, conv - 1, d_model] or None), and with shift l [B, 1, rows that are routed to] as a third.
    """

    def __init__(self, config):
        super().__init__(config)
        routed_to = config.n_rows - config.shared_row
        self.rerouted = bool(config.shared_row or config.shift or config.read_rank)
        if config.shared_row:
            self.W_alpha = nn.Linear(config.d_model, routed_to, bias=False)
            self.w_shared = nn.Linear(config.d_model, 2, bias=False)
        if config.shift:
            self.shift = nn.Parameter(torch.empty(()))
        if config.read_rank:
            self.W_read_in = nn.Linear(config.d_model, config.read_rank, bias=False)
            self.W_read_out = nn.Linear(config.read_rank, routed_to, bias=False)
        self.conv = ShortConv(config.d_model, config.conv) if config.conv else None
        if config.gate:
            self.W_g = nn.Linear(config.d_model, config.d_memory, bias=False)
            self.gate_norm = nn.RMSNorm(config.d_memory, eps=config.norm_eps)

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        u, routed, h, rest = self.enter(x, state)
        y, h = self.read(u, h, routed)
        return self.out(y, x), (h, *rest)

    def step(self, x_t: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        u, routed, h, rest = self.enter(x_t[:, None], state)
        y_t, h = self.read_step(u[:, 0], h, self.touched(*routed))
        return self.out(y_t, x_t), (h, *rest)

    def enter(self, x: Tensor, state: tuple | None) -> tuple:
        """x [B, T, d_model] -> the memory's input u, theta, phi and rows of each token, h, and what else the next call needs."""
        h, last, *before = state or (None, None)
        u, last = self.conv(x, last) if self.conv else (x, last)
        routed = self.route(u, *before)
        return u, routed, h, (last, self.logits(u[:, -1:])) if self.config.shift else (last,)

    def logits(self, x: Tensor, W: nn.Linear | None = None) -> Tensor:
        """W x in float32 at least; None: W_alpha x."""
        W = W or self.W_alpha
        with torch.autocast(x.device.type, enabled=False):
            return wide(W(x.to(W.weight.dtype)))

    def route(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As FactorizationMemory.route; but with a change to the routing theta and phi [B, T, m] of all rows, and None."""
        config = self.config
        if not self.rerouted:
            return super().route(x)
        with torch.autocast(x.device.type, enabled=False):
            write = read = self.logits(x)
            x = x.to(self.W_alpha.weight.dtype)
            if config.read_rank:
                read = read + wide(self.W_read_out(self.W_read_in(x)))
            if config.shift:
                before = torch.zeros_like(write[:, :1]) if before is None else before.to(write.dtype)
                lam = torch.sigmoid(self.shift)
                write = (1 - lam) * write + lam * torch.cat([before, write[:, :-1]], 1)
            theta = torch.sigmoid(wide(self.w_eta(x))) * self.affinity(write)
            phi = torch.sigmoid(wide(self.w_mu(x))) * self.affinity(read)
            if config.shared_row:
                shared = torch.sigmoid(wide(self.w_shared(x)))
                theta, phi = torch.cat([theta, shared[..., :1]], -1), torch.cat([phi, shared[..., 1:]], -1)
            return theta, phi, None

    def affinity(self, logits: Tensor) -> Tensor:
        """logits [..., m] -> alpha [..., m], zero outside the top k (eqs. 4, 12, 13)."""
        alpha, k = torch.softmax(wide(logits) / self.config.tau, -1), self.config.k_rows
        if k is None or k == logits.shape[-1]:
            return alpha
        top, rows = alpha.topk(k, -1)
        return torch.zeros_like(alpha).scatter(-1, rows, top / top.sum(-1, keepdim=True))

    def touched(self, theta: Tensor, phi: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """theta, phi and rows [B, 1, .] of one token for a step: only the rows that it writes or reads, where those are fewer."""
        theta, phi, rows = (v if v is None else v[:, 0] for v in (theta, phi, rows))
        config = self.config
        most = (config.k_rows or config.n_rows) * (2 if config.shift or config.read_rank else 1) + config.shared_row
        if not self.rerouted or most >= theta.shape[-1]:
            return theta, phi, rows
        rows = ((theta > 0) | (phi > 0)).to(theta.dtype).topk(most, -1).indices
        return theta.gather(-1, rows), phi.gather(-1, rows), rows

    def out(self, y: Tensor, x: Tensor) -> Tensor:
        return self.W_o(self.gate_norm(y * F.silu(self.W_g(x))) if self.config.gate else y)

    def init_weights(self, init: Callable, add: float):
        super().init_weights(init, add)
        if self.config.shared_row:
            nn.init.zeros_(self.w_shared.weight)            # rates of 1/2, like eta and mu
        if self.config.shift:
            nn.init.constant_(self.shift, -2.0)             # lambda starts at 0.12
        if self.config.read_rank:
            init(self.W_read_in.weight)
            nn.init.zeros_(self.W_read_out.weight)
        if self.conv:
            self.conv.init_weights()
        if self.config.gate:
            init(self.W_g.weight)
