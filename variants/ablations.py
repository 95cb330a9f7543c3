"""One change at a time to the memory, to find out what each part is for: `python train.py --ablation NAME`.

    eta=1, mu=1      the update or merge rate is 1 for every token (no gate of its own)
    eta=0.8, mu=0.8  the rate starts at 0.8 instead of 1/2 (any number between 0 and 1), by a bias inside the sigmoid
    untied           the read has affinities of its own, W_read, instead of those of the write
    norm_after       the row norm comes after the merge: mu norm(sum_i alpha_i h_i) instead of sum_i phi_i norm(h_i)
    no_renorm        the top k affinities are not rescaled to sum to 1 (no eq. 13)
    balance=0.01     a load-balancing loss of this weight: that of Switch Transformers, m sum_i share_i mean(alpha_i)
    gumbel           Gumbel noise is added to the affinities' logits over tau while training
    learned_rows     the memory of a new text starts with rows that are learned, not with zeros

and of `--shared_row` (extended.py), to find out which part of it helps; the last row is the one meant:

    shared=write     every token writes it at a rate of its own, but reads it only where routed to it
    shared=read      the reverse
    shared=bias      it stays inside the softmax, with a learned bias that at first gives it half of the affinity
    shared=2         two such rows instead of one
    average          it is read without its norm: a plain gated average beside a memory of m - 1 rows

and of `--conv`, which goes with `--shared_row` and `--shift` too:

    conv=linear      no SiLU after the convolution

and of `--shift` with `--conv`:

    shift=before     the token before has its part ahead of the convolution: the write's logits are those of
                     conv((1 - lambda) x_t + lambda x_{t-1}), not (1 - lambda) l_t + lambda l_{t-1}

None of these is meant to be used; fmem.py has the layer.
"""
import math

import torch
from torch import Tensor, nn

from fmem import scan, wide
from variants.extended import ExtendedMemory


class One(nn.Module):
    """Stands for w_eta or w_mu: its output is infinite, so that the sigmoid is 1."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.zeros(1), persistent=False)    # for init_weights to fill

    def forward(self, x):
        return x.new_full((*x.shape[:-1], 1), math.inf)


ALONE = "untied", "norm_after", "no_renorm", "gumbel", "learned_rows", "average"
SHARED = "write", "read", "bias", "2"


class AblatedMemory(ExtendedMemory):
    """The memory with config.ablation; raises ValueError for one that is not in the list above."""

    def __init__(self, config):
        super().__init__(config)
        self.change, given, value = config.ablation.partition("=")
        self.shared = "average" if self.change == "average" else value if self.change == "shared" else None
        try:
            self.value = float(value) if given and not self.shared else None
        except ValueError:
            self.value = math.nan
        known = ((self.change in ALONE and not given)
                 or (self.change in ("eta", "mu") and self.value is not None and 0 < self.value <= 1)
                 or (self.change == "balance" and self.value is not None and 0 < self.value < math.inf)
                 or (self.change == "shared" and value in SHARED) or config.ablation in ("shift=before", "conv=linear"))
        if not known:
            raise ValueError(f"ablation {config.ablation!r} is not one of eta=NUMBER, mu=NUMBER (above 0, at most 1), "
                             f"balance=NUMBER, {', '.join(ALONE)}, shared={', shared='.join(SHARED)}, shift=before, conv=linear")
        if self.change in ("shift", "conv") and not config.conv:
            raise ValueError(f"ablation {config.ablation} needs a convolution: set conv")
        if self.change == "conv":
            self.conv.activation = nn.Identity()
        if self.change == "shift":
            self.shift = nn.Parameter(torch.empty(()))
        if self.change in ("eta", "mu"):
            setattr(self, f"w_{self.change}", One() if self.value == 1 else nn.Linear(config.d_model, 1))
        if self.change == "untied":
            self.W_read = nn.Linear(config.d_model, config.n_rows, bias=False)
        if self.change == "learned_rows":
            self.rows = nn.Parameter(torch.empty(config.n_rows, config.d_memory))
        if self.shared and config.n_rows < 2:
            raise ValueError(f"ablation {config.ablation} needs at least 2 rows, not {config.n_rows}")
        if self.shared == "bias":
            self.bias = nn.Parameter(torch.empty(()))
        elif self.shared:
            beside = 2 if self.shared == "2" else 1
            if (config.k_rows or 1) > config.n_rows - beside:
                raise ValueError(f"with ablation {config.ablation}, k_rows must be at most n_rows - {beside}")
            self.w_shared = nn.Linear(config.d_model, 2 * beside, bias=False)

    def affinity(self, logits: Tensor) -> Tensor:
        """logits [..., m] -> alpha [..., m], zero outside the top k."""
        logits, k = wide(logits) / self.config.tau, self.config.k_rows
        if self.change == "gumbel" and self.training:
            logits = logits - torch.empty_like(logits).exponential_().clamp_min(1e-20).log()
        alpha = torch.softmax(logits, -1)
        if k is None or k == logits.shape[-1]:
            return alpha
        top, rows = alpha.topk(k, -1)
        if self.change == "balance" and self.training:
            share = torch.zeros_like(alpha).scatter(-1, rows, 1 / k).flatten(0, -2).mean(0)
            self.aux_loss = self.value * self.config.n_rows * (share * alpha.flatten(0, -2).mean(0)).sum()
        if self.change != "no_renorm":
            top = top / top.sum(-1, keepdim=True)
        return torch.zeros_like(alpha).scatter(-1, rows, top)

    def route(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.change == "conv":
            return super().route(x, before)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.W_alpha.weight.dtype)
            logits = wide(self.W_alpha(x))
            eta, mu = torch.sigmoid(wide(self.w_eta(x))), torch.sigmoid(wide(self.w_mu(x)))
            if self.shared:
                return *self.route_shared(x, logits, eta, mu), None
            alpha = self.affinity(logits)
            read = self.affinity(self.W_read(x)) if self.change == "untied" else alpha
            return eta * alpha, read if self.change == "norm_after" else mu * read, None

    def route_shared(self, x: Tensor, logits: Tensor, eta: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        """theta and phi [B, T, m] of the changes to the shared row."""
        if self.shared == "bias":
            alpha = self.affinity(torch.cat([logits[..., :-1], logits[..., -1:] + self.bias], -1))
            return eta * alpha, mu * alpha
        rates = torch.sigmoid(wide(self.w_shared(x)))
        beside = rates.shape[-1] // 2
        routed = self.affinity(logits[..., :-beside])
        theta, phi = torch.cat([eta * routed, rates[..., :beside]], -1), torch.cat([mu * routed, rates[..., beside:]], -1)
        theta = eta * self.affinity(logits) if self.shared == "read" else theta
        phi = mu * self.affinity(logits) if self.shared == "write" else phi
        return theta, phi

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        return super().forward(x, self.start(x, state))

    def step(self, x_t: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        return super().step(x_t, self.start(x_t, state))

    def enter(self, x: Tensor, state: tuple | None) -> tuple:
        if self.change != "shift":
            return super().enter(x, state)
        (h, last), w = state or (None, x.new_zeros(len(x), self.config.conv, x.shape[2])), self.config.conv
        x = torch.cat([last.to(x.dtype), x], 1)         # with as many tokens before it as the convolution is wide
        lam = torch.sigmoid(self.shift)
        u, moved = (self.conv(v[:, w - 1:], v[:, :w - 1])[0] for v in (x[:, 1:], (1 - lam) * x[:, 1:] + lam * x[:, :-1]))
        theta = torch.sigmoid(self.logits(u, self.w_eta)) * self.affinity(self.logits(moved))
        phi = torch.sigmoid(self.logits(u, self.w_mu)) * self.affinity(self.logits(u))
        return u, (theta, phi, None), h, (x[:, -w:],)

    def start(self, x: Tensor, state: tuple | None) -> tuple | None:
        """The state before the first token, with the rows that are learned."""
        if state is None and self.change == "learned_rows":
            return wide(self.rows).expand(len(x), -1, -1).contiguous(), None
        return state

    def read(self, x: Tensor, h: Tensor | None, routed: tuple | None = None) -> tuple[Tensor, Tensor]:
        if self.change not in ("norm_after", "average"):
            return super().read(x, h, routed)
        theta, phi, _ = routed or self.route(x)
        if self.change == "norm_after":
            y, h = self.without_norm(theta, phi, self.W_i(x), h)
            mu = torch.sigmoid(wide(self.w_mu(x)))
            return (mu * y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.config.norm_eps)).to(x.dtype), h
        others, last = (None, None) if h is None else (h[:, :-1], h[:, -1:])
        y, others = super().read(x, others, (theta[..., :-1], phi[..., :-1], None))
        average, last = self.without_norm(theta[..., -1:], phi[..., -1:], self.W_i(x), last)
        return y + average.to(y.dtype), torch.cat([others, last], 1)

    def without_norm(self, theta: Tensor, phi: Tensor, xbar: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """sum_i phi_i h_i, in float32 at least, and the last state."""
        huge = 1e16                                     # next to this eps a row's length is nothing: y = sum_i phi_i h_i / 1e8
        form = "fast" if self.config.scan in ("auto", "kernel") and xbar.device.type != "mps" else self.config.scan
        y, h = scan(theta, phi, xbar, h, huge, form, self.config.recompute)
        return wide(y) * math.sqrt(huge), h

    def read_step(self, x_t: Tensor, h: Tensor | None, routed: tuple | None = None) -> tuple[Tensor, Tensor]:
        if self.change not in ("norm_after", "average"):
            return super().read_step(x_t, h, routed)
        y, h = self.read(x_t[:, None], h)
        return y[:, 0], h

    def init_weights(self, init, add):
        super().init_weights(init, add)
        if self.change in ("eta", "mu") and self.value < 1:
            nn.init.constant_(getattr(self, f"w_{self.change}").bias, math.log(self.value / (1 - self.value)))
        if self.change == "untied":
            init(self.W_read.weight, self.config.alpha_std * self.config.tau)
        if self.change == "learned_rows":
            init(self.rows)
        if self.change == "shift":
            nn.init.constant_(self.shift, -2.0)         # as in extended.py
        if self.shared == "bias":
            nn.init.constant_(self.bias, self.config.tau * math.log(self.config.n_rows - 1))
        elif self.shared:
            nn.init.zeros_(self.w_shared.weight)        # rates of 1/2, like eta and mu


def aux_loss(model: nn.Module) -> Tensor | float:
    """What the layers of a model add to its training loss: 0 without the load-balancing loss."""
    return sum(getattr(block.memory, "aux_loss", 0.0) for block in model.blocks)
