"""Layers that can replace the memory: two baselines, and our extensions of the memory.

    ExtendedMemory   the memory with a short convolution, a gate, a shared row or a shifted write
    Attention        LLaMA's attention
    Mamba2           Mamba-2

Each has the interface of `fmem.FactorizationMemory` (forward, step, init_weights), so that block,
model, training and sampling are the same for all: `FMem(config, layer=Mamba2)`. Each can have the
same short convolution, for fair comparisons. A sequence can be split anywhere into several calls.
The inputs before its first token are zero.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fmem import EMBED_STD, FactorizationMemory, recurrence, scan_loop, upcast


def join(past, x, count):
    """Prepend the `count` inputs before x [B, T, c], zeros if past is None: [B, count + T, c].

    Returns that, and its last `count` inputs: the past of the next call.
    """
    if past is None:
        past = x.new_zeros(len(x), count, x.shape[-1])
    joined = torch.cat([past.to(x.dtype), x], 1)
    return joined, joined[:, x.shape[1] :].clone()


class ShortConv(nn.Module):
    """A causal depthwise convolution followed by SiLU, as in Mamba.

        y_t[c] = silu(bias[c] + sum_j weight[c, j] x_{t - j}[c])     j = 0 ... width - 1

    Raises ValueError for a width below 1.
    """

    def __init__(self, channels, width):
        super().__init__()
        if type(width) is not int or width < 1:
            raise ValueError(f"the width of a short convolution must be at least 1, not {width!r}")
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x):
        """x [B, width - 1 + T, c], from width - 1 tokens before the first output -> y [B, T, c]."""
        T = x.shape[1] - self.width + 1
        y = self.bias
        for j in range(self.width):
            y = y + self.weight[:, j] * x[:, self.width - 1 - j :][:, :T]
        return F.silu(y)

    def init_weights(self):
        nn.init.uniform_(self.weight, -(self.width**-0.5), self.width**-0.5)
        nn.init.uniform_(self.bias, -(self.width**-0.5), self.width**-0.5)


class ExtendedMemory(FactorizationMemory):
    """The memory with any of four extensions. They are ours; the paper has none of them.

    conv: a short convolution of this width, 0 for none. u = ShortConv(x) replaces x in eqs. 4, 5, 6
        and 9. Without it u = x.
    shift: the previous token contributes to the routing of the write. With l_t = W_alpha u_t,
            alpha of the read  = softmax(l_t / tau)
            alpha of the write = softmax(((1 - lambda) l_t + lambda l_{t-1}) / tau)
        Each has its own top k. lambda = sigmoid(shift) is one number per layer. So the value after
        a key is written to the key's rows, which the key reads later.
    shared_row: the last of the m rows is outside the softmax. Every token writes and reads it, with
        separate rates, theta[m-1], phi[m-1] = sigmoid(W_shared u). It is also routed to k of the
        other m - 1 rows.
    gate: the read is gated and normalised, y = W_o norm(read * silu(W_g x)).

    State: (h [B, m, d], the last conv - 1 + shift inputs [B, ., d_model]).
    """

    def __init__(self, config, conv=0, gate=False, shared_row=False, shift=False):
        super().__init__(config)
        d_model = config.d_model
        n_routed = config.n_rows - shared_row
        if n_routed < 1:
            raise ValueError("shared_row needs n_rows of at least 2: one row is not routed to")
        self.k_routed = min(config.k_rows, n_routed)
        self.n_past = max(conv - 1, 0) + shift
        self.conv = ShortConv(d_model, conv) if conv else None
        self.shift = nn.Parameter(torch.empty(())) if shift else None
        self.W_alpha = nn.Linear(d_model, n_routed, bias=False)
        self.W_shared = nn.Linear(d_model, 2, bias=False) if shared_row else None
        self.W_g = nn.Linear(d_model, config.d_memory, bias=False) if gate else None
        self.gate_norm = nn.RMSNorm(config.d_memory, eps=config.norm_eps) if gate else None

    def affinity(self, logits):
        """logits [..., m] -> alpha [..., m], zero outside the top k: eqs. 4, 12, 13."""
        top, rows = (logits / self.config.tau).topk(self.k_routed, -1)
        return torch.zeros_like(logits).scatter(-1, rows, torch.softmax(top, -1))

    def scan_inputs(self, x, state=None):
        """Like the memory's: x [B, T, d_model] -> theta, phi [B, T, m], xbar [B, T, d].

        state: the layer's state before x.
        """
        _, past = state or (None, None)
        u, _ = join(past, x, self.n_past)
        if self.conv is not None:
            u = self.conv(u)  # [B, T, d_model], or T + 1 tokens with a shift
        with torch.autocast(x.device.type, enabled=False):
            if self.W_alpha.weight.is_floating_point():  # false if it is quantised
                u = u.to(self.W_alpha.weight.dtype)
            logits = upcast(self.W_alpha(u))
            if self.shift is None:
                alpha_read = self.affinity(logits)  # eq. 4
                alpha_write = alpha_read
            else:
                share = torch.sigmoid(self.shift)
                shifted = (1 - share) * logits[:, 1:] + share * logits[:, :-1]
                u = u[:, 1:]
                alpha_read = self.affinity(logits[:, 1:])
                alpha_write = self.affinity(shifted)
            theta = torch.sigmoid(upcast(self.w_eta(u))) * alpha_write  # eqs. 5, 7
            phi = torch.sigmoid(upcast(self.w_mu(u))) * alpha_read  # eqs. 6, 8
            if self.W_shared is not None:
                rates = torch.sigmoid(upcast(self.W_shared(u)))
                theta = torch.cat([theta, rates[..., :1]], -1)
                phi = torch.cat([phi, rates[..., 1:]], -1)
        return theta, phi, self.W_i(u)  # eq. 9

    def forward(self, x, state=None):
        """x [B, T, d_model] -> y [B, T, d_model], state after x. The given state is not changed."""
        h, past = state or (None, None)
        theta, phi, xbar = self.scan_inputs(x, state)
        if x.shape[1] == 1:  # one loop iteration costs less than a chunk
            y, h = scan_loop(theta, phi, xbar, h, self.config.norm_eps)
        else:
            y, h = self.scan(theta, phi, xbar, h)
        if self.W_g is not None:
            y = self.gate_norm((y * F.silu(self.W_g(x))).to(x.dtype))
        _, past = join(past, x, self.n_past)
        return self.W_o(y), (h, past)

    def step(self, x_t, state=None):
        """One token: x_t [B, d_model] -> y_t, state. It reads and writes all rows, not k."""
        y, state = self.forward(x_t[:, None], state)
        return y[:, 0], state

    def init_weights(self, init, branch_scale):
        super().init_weights(init, branch_scale)
        if self.conv is not None:
            self.conv.init_weights()
        if self.shift is not None:
            nn.init.constant_(self.shift, -2.0)  # lambda starts at 0.12
        if self.W_shared is not None:
            nn.init.zeros_(self.W_shared.weight)  # rates of 1/2, like eta and mu
        if self.W_g is not None:
            init(self.W_g.weight)


def rotate(x, start, base=10000.0):
    """Rotary positions (RoFormer, arXiv 2104.09864) in LLaMA's layout: x [B, heads, T, D].

    Channels i and i + D/2 rotate together, by the angle position * base^(-2i / D). The first of the
    T tokens has position `start`.
    """
    T, D = x.shape[-2:]
    exact = torch.float32 if x.device.type in ("mps", "xpu") else torch.float64
    positions = torch.arange(start, start + T, device=x.device, dtype=exact)
    exponents = torch.arange(0, D, 2, device=x.device, dtype=exact) / D
    angles = positions[:, None] * base**-exponents  # [T, D/2]
    a, b = upcast(x).chunk(2, -1)
    cos = angles.cos().to(a.dtype)
    sin = angles.sin().to(a.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """LLaMA's causal attention, with rotary positions or learned ones.

        q_t, k_t, v_t = W_q u_t, W_k u_t, W_v u_t       in heads of width D; q and k are rotated
        y_t = W_o concat_heads( sum_{s<=t} softmax_s(q_t . k_s / sqrt(D)) v_s )

    u is x; with conv, a short convolution of that width over x. n_head: number of heads, None for
    heads of width 32. positions: this many learned vectors, added to u instead of rotating;
    0 for rotary ones. gate: y_t = W_o norm(c_t * silu(W_g x_t)) for the concatenated heads c_t.

    State: (keys and values [2, B, n_head, at least n, D], the number n of tokens so far, the last
    conv - 1 inputs).
    """

    def __init__(self, config, n_head=None, positions=0, conv=0, gate=False):
        super().__init__()
        d_model = config.d_model
        self.n_head = n_head or max(d_model // 32, 1)
        if d_model % (2 * self.n_head):
            raise ValueError(f"d_model {d_model} must be a multiple of 2 n_head {self.n_head}")
        self.D = d_model // self.n_head
        self.n_past = max(conv - 1, 0)
        self.conv = ShortConv(d_model, conv) if conv else None
        self.positions = nn.Parameter(torch.empty(positions, d_model)) if positions else None
        self.W_q = nn.Linear(d_model, d_model, bias=False)
        self.W_k = nn.Linear(d_model, d_model, bias=False)
        self.W_v = nn.Linear(d_model, d_model, bias=False)
        self.W_o = nn.Linear(d_model, d_model, bias=False)
        self.W_g = nn.Linear(d_model, d_model, bias=False) if gate else None
        self.gate_norm = nn.RMSNorm(d_model, eps=config.norm_eps) if gate else None

    def forward(self, x, state=None):
        """x [B, T, d_model] -> y [B, T, d_model], state after x. The given state is not changed."""
        return self.attend(x, state, in_place=False)

    def step(self, x_t, state=None):
        """One token: x_t [B, d_model] -> y_t, state. Without gradients it updates the cache."""
        y, state = self.attend(x_t[:, None], state, in_place=not torch.is_grad_enabled())
        return y[:, 0], state

    def attend(self, x, state, in_place):
        T = x.shape[1]
        cache, n, past = state or (None, 0, None)
        u, past = join(past, x, self.n_past)
        if self.conv is not None:
            u = self.conv(u)
        if self.positions is not None:
            if n + T > len(self.positions):
                raise ValueError(f"{n + T} tokens are more than {len(self.positions)} positions")
            u = u + self.positions[n : n + T]
        q, k, v = (
            W(u).unflatten(-1, (-1, self.D)).transpose(1, 2) for W in (self.W_q, self.W_k, self.W_v)
        )  # [B, heads, T, D]
        if self.positions is None:
            q = rotate(q, n)
            k = rotate(k, n)
        new = torch.stack([k, v])  # [2, B, n_head, T, D]
        if cache is None:
            cache = new
        elif in_place and n + T <= cache.shape[3]:
            cache[:, :, :, n : n + T] = new
        else:  # steps reserve space for half as many again, so that few of them copy the cache
            spare = new.new_zeros(*new.shape[:3], n // 2 if in_place else 0, self.D)
            cache = torch.cat([cache[:, :, :, :n].to(new.dtype), new, spare], 3)
        k, v = cache[:, :, :, : n + T].to(q.dtype)
        # Token t sees the cache up to itself. For an empty cache, PyTorch has a fast path.
        mask = None
        if n > 0 and T > 1:
            mask = torch.ones(T, n + T, dtype=torch.bool, device=x.device).tril(n)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=n == 0 and T > 1)
        y = y.transpose(1, 2).flatten(2)  # [B, T, d_model]
        if self.W_g is not None:
            y = self.gate_norm((y * F.silu(self.W_g(x))).to(x.dtype))
        return self.W_o(y), (cache, n + T, past)

    def init_weights(self, init, branch_scale):
        init(self.W_q.weight)
        init(self.W_k.weight)
        init(self.W_v.weight)
        init(self.W_o.weight, branch_scale)
        if self.conv is not None:
            self.conv.init_weights()
        if self.positions is not None:
            nn.init.normal_(self.positions, std=EMBED_STD)
        if self.W_g is not None:
            init(self.W_g.weight)


class Mamba2(nn.Module):
    """Mamba-2 (Dao and Gu, arXiv 2405.21060), with its authors' initialisation.

    H heads of P channels, with N state values per channel:

        z, u, delta = W_in x;   X, B, C = ShortConv(u);   delta = softplus(delta + bias)   [H]
        S_t = exp(delta_t A) S_{t-1} + delta_t X_t B_t^T        [P, N], A < 0, one per head
        Y_t = S_t C_t + D X_t
        y_t = W_o norm(Y_t * silu(z_t))

    n_head: H, None for heads of width 64. d_state: N. conv: width of the convolution, which is part
    of Mamba-2. A convolution of width 1 sees no other token.

    State: (S [B, H, P, N] in float32, the last conv - 1 inputs of the convolution).
    """

    def __init__(self, config, n_head=None, d_state=64, conv=4):
        super().__init__()
        inner = 2 * config.d_model
        self.H = n_head or max(inner // 64, 1)
        if inner % self.H:
            raise ValueError(f"n_head {self.H} must divide 2 d_model, {inner}")
        self.P = inner // self.H
        self.N = d_state
        self.parts = [inner, inner + 2 * d_state, self.H]
        self.n_past = conv - 1
        self.W_in = nn.Linear(config.d_model, sum(self.parts), bias=False)
        self.conv = ShortConv(inner + 2 * d_state, conv)
        self.delta_bias = nn.Parameter(torch.empty(self.H))
        self.A_log = nn.Parameter(torch.empty(self.H))
        self.D = nn.Parameter(torch.ones(self.H))
        self.norm = nn.RMSNorm(inner, eps=config.norm_eps)
        self.W_o = nn.Linear(inner, config.d_model, bias=False)

    def forward(self, x, state=None):
        """x [B, T, d_model] -> y [B, T, d_model], state after x. The given state is not changed."""
        S, past = state or (None, None)
        z, u, delta = self.W_in(x).split(self.parts, -1)
        u, past = join(past, u, self.n_past)
        X, B, C = self.conv(u).split([self.H * self.P, self.N, self.N], -1)
        X = X.unflatten(-1, (self.H, self.P))
        with torch.autocast(x.device.type, enabled=False):
            delta = F.softplus(upcast(delta) + self.delta_bias)
            if S is None:
                S = upcast(X).new_zeros(len(x), self.H, self.P, self.N)
            Y, S = scan_ssd(upcast(X), delta, -upcast(self.A_log).exp(), upcast(B), upcast(C), S)
            Y = (Y + self.D[:, None] * X).flatten(-2)
        return self.W_o(self.norm((Y * F.silu(z)).to(x.dtype))), (S, past)

    def step(self, x_t, state=None):
        """One token: x_t [B, d_model] -> y_t, state."""
        y, state = self.forward(x_t[:, None], state)
        return y[:, 0], state

    def init_weights(self, init, branch_scale):
        init(self.W_in.weight)
        self.conv.init_weights()
        with torch.no_grad():
            delta = self.delta_bias.uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
            self.delta_bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # inverse of softplus
            self.A_log.uniform_(1, 16).log_()
        nn.init.ones_(self.D)
        init(self.W_o.weight, branch_scale)


SSD_CHUNK = 64


def scan_ssd(X, delta, A, B, C, S):
    """Mamba-2's recurrence in matrix products (section 6 of its paper).

    Inside a chunk it is attention, masked by the decays. Between chunks it passes on the state.
    X [b, T, H, P], delta [b, T, H], A [H], B and C [b, T, N], S [b, H, P, N] -> Y like X, last S.
    """
    T = X.shape[1]
    if T == 1:
        decay = (delta[:, 0] * A).exp()[..., None, None]  # [b, H, 1, 1]
        write = (delta[..., None] * X)[:, 0, ..., None] * B[:, :, None]  # [b, H, P, N]
        S = decay * S + write
        return (S @ C[:, 0, None, :, None])[:, None, ..., 0], S
    chunk = min(SSD_CHUNK, T)

    def chunks(v):  # [b, T, ...] -> [b, n, c, ...]; padding in the last chunk has delta 0
        fill = (0, 0) * (v.dim() - 2) + (0, -T % chunk)
        return F.pad(v, fill).unflatten(1, (-1, chunk))

    X = chunks(X * delta[..., None]).transpose(2, 3)  # [b, n, H, c, P]
    B = chunks(B)  # [b, n, c, N]
    C = chunks(C)
    G = chunks(delta * A).transpose(2, 3).cumsum(-1)  # [b, n, H, c] logarithms of the decays

    # Masked before exp: above the diagonal the exponents are positive and could overflow.
    below = torch.ones(chunk, chunk, dtype=torch.bool, device=X.device).tril()
    L = (G[..., :, None] - G[..., None, :]).masked_fill(~below, -math.inf).exp()  # [b, n, H, c, c]
    Y = (L * (C @ B.mT)[:, :, None]) @ X  # [b, n, H, c, P]

    decay_to_end = (G[..., -1:] - G).exp()[..., None]  # [b, n, H, c, 1]
    write = (X * decay_to_end).mT @ B[:, :, None]  # [b, n, H, P, N]
    before, last = recurrence(G[..., -1].exp(), write.flatten(-2), S.flatten(-2))
    before = before.unflatten(-1, S.shape[-2:])  # [b, n, H, P, N] the state before each chunk
    Y = Y + G.exp()[..., None] * (C[:, :, None] @ before.mT)
    return Y.transpose(2, 3).flatten(1, 2)[:, :T], last.unflatten(-1, S.shape[-2:])


def matched_d_mlp(config, layer, layer_arguments=None):
    """The d_mlp that gives a model with this layer as many parameters as the paper's with `config`.

    It is rounded to a multiple of 8. Raises ValueError if the MLP is too small to compensate.
    """

    def parameters(layer, arguments):
        with torch.device("meta"):  # shapes without memory
            return sum(p.numel() for p in layer(config, **arguments).parameters())

    extra = parameters(layer, layer_arguments or {}) - parameters(FactorizationMemory, {})
    d_mlp = config.d_mlp - round(extra / (3 * config.d_model) / 8) * 8
    if d_mlp < 1:
        raise ValueError(
            f"{layer.__name__} has {extra:,} more parameters than the memory, and the MLP is too "
            "small to compensate; set d_mlp, or make the layer smaller"
        )
    return d_mlp
