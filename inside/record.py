"""What a trained layer does with a text, exactly: which tokens it reads from, which rows it writes, what each row holds.

The memory's recurrence (eq. 10) is linear, so after token t each row is a mean of the row before the text and the inputs so far,
with weights that are known and add up to 1:

    h_t[i] = F_t[i] h0[i] + sum_{s <= t} E_t[s, i] xbar_s      E_t[s, i] = theta_s[i] prod_{s < u <= t} (1 - theta_u[i])

What is read (eq. 11) is then one too, an attention map of a recurrent model:

    y_t = sum_{s <= t} A[t, s] xbar_s + sum_i q_t[i] F_t[i] h0[i]
    A[t, s] = sum_i q_t[i] E_t[s, i],    q_t[i] = phi_t[i] / rms(h_t[i])

`record` gives these for every layer of a model; for attention A is its softmax, for Mamba-2 its own linear weights, one map per
head. The sums are taken in float64. Nothing here is needed to train or to generate.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fmem import FactorizationMemory, FMem
from variants.ablations import AblatedMemory
from variants.attention import Attention, rotate
from variants.extended import ExtendedMemory
from variants.mamba2 import Mamba2


@dataclass
class Weights:
    """What every kind of layer has, of a text of T tokens; H maps, one per head (the memory has one).

    The read, before gate, norm and W_o, is y[head, t] = sum_s A[head, t, s] values[head, s] + rest[head, t].
    """
    kind: str           # "memory", "attention" or "mamba2"
    A: Tensor           # [H, T, T] float64, zero above the diagonal; negative weights occur in Mamba-2 only
    values: Tensor      # [H, T, d]
    start: Tensor       # [T] weight of the state before the text, mean over heads
    rest: Tensor        # [H, T, d] what the state before the text adds to the read

    def read(self) -> Tensor:
        """y [H, T, d], put together from its parts."""
        return self.A @ self.values + self.rest

    def shares(self) -> tuple[Tensor, Tensor]:
        """The map averaged over heads, each row divided by the sum of its absolute values: [T, T]; that of the state: [T]."""
        A = self.A.mean(0)
        total = (A.abs().sum(1) + self.start).clamp_min(1e-30)
        return A / total[:, None], self.start / total


@dataclass
class MemoryWeights(Weights):
    """The memory's routing and rows beside them."""
    theta: Tensor       # [T, m] write weights, eq. 7 (zero outside the top k)
    phi: Tensor         # [T, m] read weights, eq. 8
    q: Tensor           # [T, m] phi / rms(h)
    rms: Tensor         # [T + 1, m] rms of each row before the text and after each token, epsilon left out
    eta: Tensor         # [T] update rate, eq. 5
    mu: Tensor          # [T] merge rate, eq. 6
    entropy: Tensor     # [T] entropy of the affinity before the top k, in nats
    shared: bool        # whether the last row is one that no token is routed to (variants/extended.py)

    def contents(self, t: int) -> tuple[Tensor, Tensor]:
        """E_t [t + 1, m], the weight of each token so far in each row after token t, and F_t [m], that of the row's start."""
        keep = (1 - self.theta[1:t + 1]).flip(0).cumprod(0).flip(0)                 # prod of s < u <= t, for s = 0 ... t - 1
        keep = torch.cat([keep, torch.ones_like(self.theta[:1])])
        return keep * self.theta[:t + 1], keep[0] * (1 - self.theta[0])

    def half_life(self) -> Tensor:
        """[m] tokens after which half of what a row holds is overwritten, at its mean rate over the text; inf if never."""
        return torch.log(torch.tensor(0.5)) / torch.log1p(-self.theta.clamp(max=1 - 1e-12)).mean(0)


@torch.no_grad()
def record(model: FMem, tokens: Tensor, state: list | None = None) -> tuple[list[Weights], Tensor]:
    """tokens [T], continuing `state` (None: from an empty memory) -> what each layer did, and the logits [T, vocab_size].

    Raises TypeError for a layer of a kind that is not known here.
    """
    seen, hooks = [], []
    for block in model.blocks:
        hooks.append(block.memory.register_forward_hook(lambda layer, given, _: seen.append((layer, *given))))
    try:
        logits, _ = model(tokens[None], state)
    finally:
        for hook in hooks:
            hook.remove()
    return [weights_of(*call) for call in seen], logits[0]


def weights_of(layer: torch.nn.Module, x: Tensor, state=None) -> Weights:
    """What a layer does with its input x [1, T, d_model] and the state before it."""
    for kind, weights in ((FactorizationMemory, of_memory), (Attention, of_attention), (Mamba2, of_mamba2)):
        if isinstance(layer, kind):
            return weights(layer, x, state)
    raise TypeError(f"what a {type(layer).__name__} reads is not known")


def of_memory(layer: FactorizationMemory, x: Tensor, state) -> MemoryWeights:
    if isinstance(layer, AblatedMemory):
        state = layer.start(x, state)
    if isinstance(layer, ExtendedMemory):
        u, (theta, phi, rows), h0, _ = layer.enter(x, state)
    else:
        u, (theta, phi, rows), h0 = x, layer.route(x), state
    if rows is not None:
        zeros = theta.new_zeros(*theta.shape[:-1], layer.config.n_rows)
        theta, phi = zeros.scatter(-1, rows, theta), zeros.scatter(-1, rows, phi)
    theta, phi, values = theta[0].double(), phi[0].double(), layer.W_i(u)[0].double()
    eta, mu = (torch.sigmoid(rate(u).double())[0, :, 0] for rate in (layer.w_eta, layer.w_mu))
    log_alpha = torch.log_softmax(layer.W_alpha(u)[0].double() / layer.config.tau, -1)
    change = getattr(layer, "change", "")               # ablations that leave out a norm
    after_merge, plain_average = change == "norm_after", change == "average"
    phi = phi * mu[:, None] if after_merge else phi     # which its route leaves out

    (T, m), eps = theta.shape, layer.config.norm_eps
    h0 = values.new_zeros(m, values.shape[1]) if h0 is None else h0[0].double()
    h, E, kept = h0, theta.new_zeros(T, m), theta.new_ones(m)
    A, start, rest, q, rms = values.new_zeros(T, T), [], [], [], [h.square().mean(-1).sqrt()]
    for t in range(T):
        keep = 1 - theta[t]
        h, E, kept = keep[:, None] * h + theta[t, :, None] * values[t], E * keep, kept * keep
        E[t] = theta[t]
        square = (phi[t] / mu[t].clamp_min(1e-30) @ h if after_merge else h).square().mean(-1)
        q_t = phi[t] / (square + eps).sqrt()
        if plain_average:
            q_t[-1] = phi[t, -1]
        A[t] = E @ q_t
        start.append(q_t @ kept)
        rest.append((q_t * kept) @ h0)
        q.append(q_t)
        rms.append(h.square().mean(-1).sqrt())
    return MemoryWeights("memory", A[None], values[None], torch.stack(start), torch.stack(rest)[None],
                         theta, phi, torch.stack(q), torch.stack(rms), eta, mu, -(log_alpha.exp() * log_alpha).sum(-1),
                         log_alpha.shape[-1] < m)


def of_attention(layer: Attention, x: Tensor, state) -> Weights:
    T, n = x.shape[1], state[1] if state else 0
    q, k, v = (W(x).unflatten(-1, (-1, layer.D)).transpose(1, 2) for W in (layer.W_q, layer.W_k, layer.W_v))
    q, k = rotate(q, n), rotate(k, n)
    if n:
        k, v = (torch.cat([old[:, :, :n], new], 2) for old, new in zip(state[0], (k, v), strict=True))
    q, k, v = (part[0].double().repeat_interleave(layer.n_head // len(part[0]), 0) for part in (q, k, v))
    ahead = torch.ones(T, n + T, dtype=torch.bool, device=x.device).triu(n + 1)
    A = (q @ k.mT / layer.D**0.5).masked_fill(ahead, -torch.inf).softmax(-1)
    return Weights("attention", A[..., n:], v[:, n:], A[..., :n].sum(-1).mean(0), A[..., :n] @ v[:, :n])


def of_mamba2(layer: Mamba2, x: Tensor, state) -> Weights:
    S, last = state or (None, None)
    _, u, delta = layer.W_in(x).split(layer.split, -1)
    X, B, C = (v[0].double() for v in layer.conv(u, last)[0].split([layer.split[0], layer.N, layer.N], -1))
    X = X.unflatten(-1, (layer.H, layer.P)).transpose(0, 1)                                     # [H, T, P]
    delta = F.softplus(delta[0].double() + layer.delta_bias.double()).T       # [H, T]
    G = (-layer.A_log.double().exp()[:, None] * delta).cumsum(-1)
    above = torch.ones(*(2 * [len(B)]), dtype=torch.bool, device=x.device).triu(1)
    decay = (G[..., None] - G[:, None]).masked_fill(above, -torch.inf).exp()                    # [H, t, s]
    A = decay * (C @ B.T) * delta[:, None] + torch.diag_embed(layer.D.double()[:, None].expand_as(delta))
    if S is None:
        start, rest = torch.zeros_like(G[0]), torch.zeros_like(X)
    else:
        start, rest = G.exp().mean(0), G.exp()[..., None] * (C @ S[0].double().mT)
    return Weights("mamba2", A, X, start, rest)
