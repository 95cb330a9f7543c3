"""One change at a time to the memory, to find out what each part is for: `python train.py --ablation NAME`.

    eta=1, mu=1      the update or merge rate is 1 for every token (no gate of its own)
    eta=0.8, mu=0.8  the rate starts at 0.8 instead of 1/2 (any number between 0 and 1), by a bias inside the sigmoid
    untied           the read has affinities of its own, W_read, instead of those of the write
    norm_after       the row norm comes after the merge: mu norm(sum_i alpha_i h_i) instead of sum_i phi_i norm(h_i)
    no_renorm        the top k affinities are not rescaled to sum to 1 (no eq. 13)
    balance=0.01     a load-balancing loss of this weight: that of Switch Transformers, m sum_i share_i mean(alpha_i)

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


class AblatedMemory(ExtendedMemory):
    """The memory with config.ablation; raises ValueError for one that is not in the list above."""

    def __init__(self, config):
        super().__init__(config)
        self.change, _, value = config.ablation.partition("=")
        try:
            self.value = float(value) if value else None
        except ValueError:
            self.value = math.nan
        known = ((self.change in ("untied", "norm_after", "no_renorm") and self.value is None)
                 or (self.change in ("eta", "mu") and self.value is not None and 0 < self.value <= 1)
                 or (self.change == "balance" and self.value is not None and 0 < self.value < math.inf))
        if not known:
            raise ValueError(f"ablation {config.ablation!r} is not one of eta=NUMBER, mu=NUMBER (above 0, at most 1), untied, "
                             "norm_after, no_renorm, balance=NUMBER")
        if self.change in ("eta", "mu"):
            setattr(self, f"w_{self.change}", One() if self.value == 1 else nn.Linear(config.d_model, 1))
        if self.change == "untied":
            self.W_read = nn.Linear(config.d_model, config.n_rows, bias=False)

    def affinity(self, logits: Tensor) -> Tensor:
        """logits [..., m] -> alpha [..., m], zero outside the top k."""
        alpha, k = torch.softmax(wide(logits) / self.config.tau, -1), self.config.k_rows
        if k is None or k == self.config.n_rows:
            return alpha
        top, rows = alpha.topk(k, -1)
        if self.change == "balance" and self.training:
            share = torch.zeros_like(alpha).scatter(-1, rows, 1 / k).flatten(0, -2).mean(0)
            self.aux_loss = self.value * self.config.n_rows * (share * alpha.flatten(0, -2).mean(0)).sum()
        if self.change != "no_renorm":
            top = top / top.sum(-1, keepdim=True)
        return torch.zeros_like(alpha).scatter(-1, rows, top)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.W_alpha.weight.dtype)
            alpha = self.affinity(self.W_alpha(x))
            read = self.affinity(self.W_read(x)) if self.change == "untied" else alpha
            eta, mu = torch.sigmoid(wide(self.w_eta(x))), torch.sigmoid(wide(self.w_mu(x)))
            return eta * alpha, read if self.change == "norm_after" else mu * read, None

    def read(self, x: Tensor, h: Tensor | None, routed: tuple | None = None) -> tuple[Tensor, Tensor]:
        if self.change != "norm_after":
            return super().read(x, h, routed)
        theta, alpha, _ = routed or self.route(x)
        huge = 1e16                                     # next to this eps a row's length is nothing: y = sum_i alpha_i h_i / 1e8
        form = "fast" if self.config.scan in ("auto", "kernel") and x.device.type != "mps" else self.config.scan
        y, h = scan(theta, alpha, self.W_i(x), h, huge, form, self.config.recompute)
        y = wide(y) * math.sqrt(huge)
        mu = torch.sigmoid(wide(self.w_mu(x)))
        return (mu * y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.config.norm_eps)).to(x.dtype), h

    def read_step(self, x_t: Tensor, h: Tensor | None, routed: tuple | None = None) -> tuple[Tensor, Tensor]:
        if self.change != "norm_after":
            return super().read_step(x_t, h, routed)
        y, h = self.read(x_t[:, None], h)
        return y[:, 0], h

    def init_weights(self, init, add):
        super().init_weights(init, add)
        if self.change in ("eta", "mu") and self.value < 1:
            nn.init.constant_(getattr(self, f"w_{self.change}").bias, math.log(self.value / (1 - self.value)))
        if self.change == "untied":
            init(self.W_read.weight, self.config.alpha_std * self.config.tau)


def aux_loss(model: nn.Module) -> Tensor | float:
    """What the layers of a model add to its training loss: 0 without the load-balancing loss."""
    return sum(getattr(block.memory, "aux_loss", 0.0) for block in model.blocks)
