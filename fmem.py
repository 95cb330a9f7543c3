"""Factorization Memory: a recurrent language model whose state is a small table of memory rows.

The method is that of L. Xiong, M. Tkachenko, J. Effendi and T. Cai, "Language Modeling With Factorization Memory",
arXiv 2511.00315 (2025). Each layer keeps m rows of d_memory numbers. A token is routed to a few rows (all of them in
the dense form), writes one vector into them, each row taking a share of it, and reads a mixture of the same rows. The
state has a fixed size, so the cost of a token does not grow with the text before it.

This file is the whole model, to be read from top to bottom: the recurrence as a loop over the tokens (`scan_loop`, the
definition), the same in matrix products (`scan_chunked`, for training and prompts), the layer, the block, the language
model, generation. Training is in train.py, text to tokens in data/prepare.py, the same scan as Triton kernels in kernel.py.

Included: dense and top-k sparse memory, exact for every theta in [0, 1]; state in and out of everything; a step whose
cost follows k; and, off by default and not in the paper, a short convolution and an output gate (`ExtendedMemory`). Not
included: attention, position encoding, heads, a load-balancing loss (the paper has none of them in this layer). What the
memory is compared with is in baselines.py.

Glossary. B texts, T tokens, C tokens in a chunk, m rows, k rows chosen per token, d = d_memory.

    symbol     eq.   shape       meaning
    alpha      4     B T m       memory affinity: how much the token belongs to each row; sums to 1
    tau        4     number      temperature of the softmax that makes alpha
    eta        5     B T 1       update rate: how much of itself the token writes
    mu         6     B T 1       merge rate: how much of the memory it reads
    theta      7     B T m       update (write) weights, eta alpha
    phi        8     B T m       merge (read) weights, mu alpha
    x          9     B T d       input projection (x-bar in the paper): what is written, one vector for all rows
    h          10    B m d       the memory, or state; h0 before the first token, hT after the last
    y          11    B T d       what is read (W_o is applied after it, in the layer)
    gamma      12    B T m       top-k mask of alpha; outside it theta = phi = 0 and a row keeps its value exactly

What the paper leaves open and how it is settled here: initialisation (`FMem.init_weights`); h0 = 0; tied embeddings;
SwiGLU of width 8/3 d_model; RMS norms with eps 1e-5, no gain in the row norm (W_o would absorb it).
"""
import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What the model keeps of a text, one entry per layer: the float32 memory [B, m, d_memory], or what another mixer keeps, a
# tuple. torch.save keeps it; None stands for the start of a text.
State = list[Tensor | tuple]


@dataclass
class FMemConfig:
    """What a model is made of. Raises ValueError, saying what is wrong, on a value that cannot work."""
    vocab_size: int = 1025          # number of tokens
    n_layer: int = 4                # blocks of memory and MLP
    d_model: int = 256              # width of the residual stream
    d_memory: int | None = None     # d, width of a memory row; None: d_model
    n_rows: int = 64                # m, rows of the memory
    k_rows: int | None = 16         # k, rows that a token writes and reads; None: all of them, the dense form
    tau: float = 0.25               # temperature of the affinity; the smaller, the faster the routing learns
    alpha_std: float = 1.0          # standard deviation of the affinity's logits (after tau) at initialisation
    d_mlp: int | None = None        # hidden width of the MLP; None: 8/3 d_model, rounded up to a multiple of 32 (see below)
    dropout: float = 0.0            # on the embedding and on what each layer adds, in training only
    tie_embeddings: bool = True     # the output layer shares the embedding's weights
    norm_eps: float = 1e-5          # added to the mean square in every RMS norm, the row norm of eq. 11 included
    chunk_size: int = 32            # C, tokens per chunk of scan_chunked
    recompute: bool = False         # keep less for the gradient and compute the chunk states twice
    scan: str = "auto"              # form of the recurrence: "auto", "loop", "chunked" or "kernel"
    # not in the paper; with d_mlp None, whatever these add to the plain memory's parameters is taken from the MLP
    conv: int = 0                   # tokens of a short convolution before the projections; 0: none
    gate: bool = False              # output gate
    mixer: str = "memory"           # "memory", or to compare with, from baselines.py, "attention" or "mamba2"
    n_head: int | None = None       # of attention (None: of width 32) and Mamba-2 (None: of width 64)
    n_kv_head: int | None = None    # key and value heads of attention; None: n_head
    d_state: int = 64               # numbers per channel in the state of Mamba-2
    ablation: str = ""              # one change to the memory, from ablations.py

    def __post_init__(self):
        if self.d_memory is None:
            self.d_memory = self.d_model
        width = -(-8 * self.d_model // (3 * 32)) * 32 if type(self.d_model) is int else 1
        matched, self.d_mlp = self.d_mlp is None, width if self.d_mlp is None else self.d_mlp
        for name in ("vocab_size", "n_layer", "d_model", "d_memory", "n_rows", "d_mlp", "chunk_size", "d_state"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 2**24:
                raise ValueError(f"{name} must be a whole number of at least 1 and at most 2**24, not {value!r}")
        if self.k_rows is not None and (type(self.k_rows) is not int or not 1 <= self.k_rows <= self.n_rows):
            raise ValueError(f"k_rows must be from 1 to n_rows ({self.n_rows}), or None for all rows, not {self.k_rows!r}")
        for name in ("tau", "norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, not {value!r}")
        if not isinstance(self.alpha_std, (int, float)) or not 0 <= self.alpha_std < math.inf:
            raise ValueError(f"alpha_std must be a number of at least 0, not {self.alpha_std!r}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, not {self.dropout!r}")
        if self.chunk_size > MAX_CHUNK:
            raise ValueError(f"chunk_size must be at most {MAX_CHUNK} (see scan_chunked), not {self.chunk_size}")
        if self.scan not in ("auto", "loop", "chunked", "kernel"):
            raise ValueError(f'scan must be "auto", "loop", "chunked" or "kernel", not {self.scan!r}')
        if type(self.conv) is not int or not 0 <= self.conv <= 2**24 or type(self.gate) is not bool:
            raise ValueError(f"conv must be a whole number, 0 to 2**24, and gate True or False, not {self.conv!r}, {self.gate!r}")
        if self.mixer not in ("memory", "attention", "mamba2"):
            raise ValueError(f'mixer must be "memory", "attention" or "mamba2", not {self.mixer!r}')
        if self.mixer != "memory" and (self.conv or self.gate or self.ablation):
            raise ValueError(f"conv, gate and ablation change the memory; they do not go with mixer {self.mixer}")
        for name in ("n_head", "n_kv_head"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, or None, not {value!r}")
        if self.mixer != "memory" or self.conv or self.gate or self.ablation:
            plain = replace(self, mixer="memory", conv=0, gate=False, ablation="")
            more = mixer_parameters(self) - mixer_parameters(plain)
            if matched:
                self.d_mlp -= round(more / (3 * self.d_model) / 8) * 8
            if self.d_mlp < 1:
                raise ValueError(f"{self.mixer} adds {more:,} parameters to the memory's, and the MLP has not as many; set d_mlp")

    def n_parameters(self) -> int:
        """Parameters of the model, without building it."""
        layer = mixer_parameters(self) + 3 * self.d_model * self.d_mlp + 2 * self.d_model
        return self.n_layer * layer + (1 if self.tie_embeddings else 2) * self.vocab_size * self.d_model + self.d_model


def make_mixer(config: FMemConfig) -> nn.Module:
    """The layer that carries words from token to token. All have forward(x, state), step(x_t, state), init_weights."""
    if config.mixer != "memory":
        import baselines
        return {"attention": baselines.Attention, "mamba2": baselines.Mamba2}[config.mixer](config)
    if config.ablation:
        from ablations import AblatedMemory
        return AblatedMemory(config)
    return ExtendedMemory(config) if config.conv or config.gate else FactorizationMemory(config)


def mixer_parameters(config: FMemConfig) -> int:
    with torch.device("meta"):                          # shapes without memory
        return sum(p.numel() for p in make_mixer(config).parameters())


# ---------------------------------------------------------------------------------------------------- the recurrence

def wide(x: Tensor) -> Tensor:
    """x in float32 at least: bf16 cannot tell theta = 0.998 from 1, so weights, norms and states are never narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scan_loop(theta: Tensor, phi: Tensor, x: Tensor, h0: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The memory, token by token: equations 10 and 11 without W_o. This is the definition; it is slow.

        h_t = (1 - theta_t) h_{t-1} + theta_t x_t          eq. 10, each row i with its own theta_t[i]
        y_t = sum_i phi_t[i] h_t[i] / rms(h_t[i])          eq. 11, rms(v) = sqrt(mean(v^2) + eps)

    theta, phi [B, T, m] in [0, 1]; x [B, T, d]; h0 [B, m, d] or None for zeros.
    Returns y [B, T, d] in x's dtype and hT [B, m, d] in float32 (float64 if x is). Differentiable in all four inputs.
    """
    theta, phi, xs, h = wide(theta), wide(phi), wide(x), initial_state(theta, x, h0)
    ys = []
    with torch.autocast(x.device.type, enabled=False):
        for theta_t, phi_t, x_t in zip(theta.unbind(1), phi.unbind(1), xs.unbind(1), strict=True):
            h = torch.lerp(h, x_t[:, None].expand_as(h), theta_t[..., None])        # eq. 10
            q = phi_t * torch.rsqrt(h.square().mean(-1) + eps)                      # read weight over the row's rms
            ys.append((q[:, None] @ h)[:, 0])                                       # eq. 11
    return torch.stack(ys, 1).to(x.dtype), h


def initial_state(theta: Tensor, x: Tensor, h0: Tensor | None) -> Tensor:
    """h0 in float32 at least, zeros for None. Raises ValueError when the shapes of a scan do not fit."""
    (B, T, m), d = theta.shape, x.shape[-1]
    if T == 0 or x.shape[:2] != (B, T):
        raise ValueError(f"a scan takes theta, phi [B, T, m] and x [B, T, d] with T of at least 1, "
                         f"not {tuple(theta.shape)} and {tuple(x.shape)}")
    if h0 is None:
        return wide(x).new_zeros(B, m, d)
    if h0.shape != (B, m, d):
        raise ValueError(f"the state must be {(B, m, d)}, not {tuple(h0.shape)}")
    return h0.to(wide(x).dtype)


# A chunk's decays are ratios of products of its factors 1 - theta. The products must stay above the smallest float64
# (1e-308) even if every factor is TINY, which stands for 0: TINY ** MAX_CHUNK = 4e-279.
TINY, MAX_CHUNK = 2e-9, 32


def scan_chunked(theta: Tensor, phi: Tensor, x: Tensor, h0: Tensor | None = None, eps: float = 1e-5,
                 chunk_size: int = MAX_CHUNK, recompute: bool = False) -> tuple[Tensor, Tensor]:
    """scan_loop by matrix products, C = chunk_size tokens at a time: same arguments, same results, any T.

    Fix one row i of one text; theta_t, phi_t, n_t and so on are its numbers, vectors are h_t and x_t. With a = 1 - theta,
    F_t = a_1 ... a_t and H the row before the chunk, eq. 10 unrolls into what is left of H and of every write s <= t:

        h_t = F_t H + sum_{s <= t} (F_t / F_s) theta_s x_s  =  F_t (H + sum_{s <= t} V_s x_s),      V_s = theta_s / F_s

    F does not depend on h, so without the norm eq. 11 would be plain linear attention: two matrix products per chunk.
    The norm does not stop this, because of a row it needs one number, the squared length n_t = <h_t, h_t>, and this
    obeys a recurrence of its own, made of inner products that are known before any h_t is:

        <h_t, x_t> = F_t P_t,     P_t = <H, x_t> + sum_{s <= t} V_s <x_s, x_t>      two matrix products (C x m, C x C)
        n_t = |a_t h_{t-1} + theta_t x_t|^2 = a_t^2 n_{t-1} + theta_t (2 <h_t, x_t> - theta_t <x_t, x_t>)
        q_t = phi_t / sqrt(n_t / d + eps)                                   the read is linear again once q is known
        y_t = sum_i q_t F_t H  +  sum_{s <= t} (sum_i q_t F_t V_s) x_s      two more
        H'  = F_C H + sum_s (F_C V_s) x_s                                   the next chunk's H

    Only H goes from chunk to chunk. For the gradient (see `chunked_backward`) the inputs and these T/C states are kept,
    never T of them; with recompute=True only the inputs, and the states are computed a second time. What has no d in it
    and a wide range (F, V and their products: a small part of the work) is float64, so that the ratios F_t / F_s neither
    overflow nor lose a digit of float32, for every theta from 0 to 1. Where theta = 1, a = 0 is replaced by TINY, too
    small for float32 to see; gradients are exact there too. A token with theta = phi = 0 changes nothing, so the last
    chunk is filled up with such tokens.

    Raises ValueError for shapes that do not fit, RuntimeError on a device without float64 (use scan_loop there).
    """
    if x.device.type == "mps":
        raise RuntimeError('scan_chunked needs float64, which Apple GPUs lack; use scan="loop" or device "cpu"')
    if not 1 <= chunk_size <= MAX_CHUNK:
        raise ValueError(f"chunk_size must be from 1 to {MAX_CHUNK}, not {chunk_size}")
    h0 = initial_state(theta, x, h0)
    y, hT, _ = chunked(*(v.to(h0.dtype) for v in (theta, phi, x)), h0, eps, min(chunk_size, x.shape[1]), not recompute)
    return y.to(x.dtype), hT


# The work is done in pieces of G chunks, all chunks of a piece at once: few enough numbers to stay in a CPU's cache (or to
# bound the memory on a GPU), enough of them for two threads. A chunk of a piece is one matrix of a batch: [G B, C, .].

def piece_size(theta: Tensor, C: int) -> int:
    """G, the number of chunks in a piece of theta [B, T, m]."""
    numbers = 2**16 if theta.device.type == "cpu" else 2**21
    return max(1, numbers // (theta.shape[0] * C * theta.shape[2]))


def piece(v: Tensor, t: int, C: int, G: int) -> Tensor:
    """Tokens t to t + G C of v [B, T, .] as [G, B, C, .], filled up with zeros to a whole chunk."""
    v = v[:, t:t + G * C]
    if missing := -v.shape[1] % C:
        v = F.pad(v, (0, 0, 0, missing))
    return v.unflatten(1, (-1, C)).transpose(0, 1)


def put(out: Tensor, t: int, v: Tensor):
    """The way back: v [G B, C, .] to the tokens of out [B, T, .] from t on."""
    v = v.unflatten(0, (-1, len(out))).transpose(0, 1)
    if t + v.shape[1] * v.shape[2] <= out.shape[1]:
        out[:, t:t + v.shape[1] * v.shape[2]].unflatten(1, v.shape[1:3]).copy_(v)
    else:
        out[:, t:] = v.flatten(1, 2)[:, :out.shape[1] - t]


def decays(theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, F, 1 / F and V of a piece, theta [G B, C, m], in float64."""
    a = (1 - theta.double()).clamp_min_(TINY)
    Ft = a.cumprod(1)
    inverse = 1 / Ft
    return a, Ft, inverse, theta * inverse


def next_states(states: Tensor, Ft: Tensor, V: Tensor, x: Tensor):
    """states [G + 1, B, m, d], of which the first is given: H' of every chunk into the others. The only serial part."""
    FC = Ft[:, -1:]
    keep = FC.mT.to(x.dtype).unflatten(0, states[1:].shape[:2])
    states[1:].flatten(0, 1).baddbmm_((V * FC).mT.to(x.dtype), x, beta=0)
    for g, keep_g in enumerate(keep):
        states[g + 1].addcmul_(keep_g, states[g])


def squared_lengths(a2: Tensor, writes: Tensor, H: Tensor) -> Tensor:
    """n_t = a2_t n_{t-1} + writes_t from n_0 = |H|^2 on: [G B, 1 + C, m]. By the token, but with no d in it."""
    n = [torch.linalg.vector_norm(H, dim=-1).square()]
    for a2_t, writes_t in zip(a2.unbind(1), writes.unbind(1), strict=True):
        n.append(torch.addcmul(writes_t, a2_t, n[-1]))
    return torch.stack(n, 1)


# An operator of its own, so that torch.compile keeps the graph whole and takes it as it is: unrolled over the chunks it
# would take minutes to compile, and run slower.
@torch.library.custom_op("fmem::chunked", mutates_args=())
def chunked(theta: Tensor, phi: Tensor, x: Tensor, h0: Tensor, eps: float, C: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """scan_chunked for arguments of one dtype, float32 or float64; returns y, hT and, if keep, every H [T/C + 1, B, m, d]."""
    (B, T, d), G, dtype = x.shape, piece_size(theta, C), x.dtype
    N = -(-T // C)
    y, states = x.new_empty(x.shape), x.new_empty((N if keep else min(N, G)) + 1, *h0.shape)
    last = h0
    with torch.autocast(x.device.type, enabled=False):
        for n in range(0, N, G):
            theta_n, phi_n, x_n = (piece(v, n * C, C, G).flatten(0, 1) for v in (theta, phi, x))
            a, Ft, _, V = decays(theta_n)
            states_n = states[n if keep else 0:][:len(x_n) // B + 1]
            states_n[0] = last
            next_states(states_n, Ft, V, x_n)
            H, last = states_n[:-1].flatten(0, 1), states_n[-1]
            K = x_n @ x_n.mT
            theta_K = theta_n * K.diagonal(dim1=1, dim2=2)[..., None]
            P = (x_n @ H.mT).double().baddbmm_(K.tril_().double(), V)
            hx = P.mul_(Ft).to(dtype)                                           # <h_t, x_t>
            lengths = squared_lengths(a.to(dtype).square(), theta_n * (2 * hx - theta_K), H)[:, 1:]
            qF = Ft * (phi_n * torch.rsqrt(lengths.clamp_min(0) / d + eps))
            put(y, n * C, (qF.to(dtype) @ H).baddbmm_((qF @ V.mT).to(dtype).tril_(), x_n))
        return y, last.clone(), states if keep else states.new_empty(0)


@torch.library.custom_op("fmem::chunked_backward", mutates_args=())
def chunked_backward(theta: Tensor, phi: Tensor, x: Tensor, h0: Tensor, states: Tensor, dy: Tensor, dhT: Tensor, eps: float,
                     C: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of theta, phi, x and h0, given those of y and hT. In matrix products, like the scan itself.

    Write dh_t for the gradient of h_t through everything that follows it, g_t = <h_t, dy_t>, r_t = q_t / phi_t. A read
    gives h_t the gradient q_t dy_t - c_t h_t, where c_t = phi_t r_t^3 g_t / d comes from the norm. Split it that way:

        dh_t     = lambda_t - a_t kappa_t h_{t-1}
        kappa_t  = c_t + a_{t+1}^2 kappa_{t+1}                                      one number per row
        lambda_t = q_t dy_t - theta_t kappa_t x_t + a_{t+1} lambda_{t+1}            and dhT comes in behind the last token

    So lambda is eq. 10 run backwards, with two vectors written per token instead of one, and is chunked like it. If L is
    what comes into a chunk from behind, the chunk before it gets

        L' = F_C L + sum_t W_t [x_t; dy_t],      W_t = F_t [-theta_t kappa_t; q_t]

    where the brackets stack the two vectors and their weights: most products are needed for both. Then

        dphi_t   = r_t g_t,   g_t = F_t Y_t                Y_t is P_t with dy_t in the place of x_t
        dx_t     = sum_i theta_t dh_t                      lambda_t and h_{t-1} written out like h_t above
        dtheta_t = <dh_t, x_t - h_{t-1}> = <lambda_t, x_t> - b_t / a_t - a_t kappa_t (<h_{t-1}, x_t> - n_{t-1})
        b_t      = a_t <lambda_t, h_{t-1}>,   b_1 = <L', H>,   b_{t+1} = b_t + theta_t <lambda_t, x_t> - W_t . [P_t; Y_t]

    b is a running sum in float64, where the division by a_t costs nothing that float32 could see. (The usual way for
    gated linear attention, through the gradient of log a_t, loses four digits at theta = 0.99999 and fails at 1.)
    """
    (B, T, d), G, dtype = x.shape, piece_size(theta, C), x.dtype
    N = -(-T // C)
    dtheta, dphi, dx = (v.new_empty(v.shape) for v in (theta, phi, x))
    with torch.autocast(x.device.type, enabled=False):
        if not states.numel():
            states = x.new_empty(N + 1, *h0.shape)
            states[0] = h0
            for n in range(0, N, G):
                theta_n, x_n = (piece(v, n * C, C, G).flatten(0, 1) for v in (theta, x))
                _, Ft, _, V = decays(theta_n)
                next_states(states[n:n + G + 1], Ft, V, x_n)
        Ls = x.new_empty(min(N, G) + 1, *h0.shape)
        Ls[0], kappa_in = dhT, torch.zeros_like(h0[..., 0])         # what comes from behind the last chunk
        for n in reversed(range(0, N, G)):
            # 1. As in the scan, with dy beside x.
            theta_n, phi_n = (piece(v, n * C, C, G).flatten(0, 1) for v in (theta, phi))
            xdy = torch.cat([piece(v, n * C, C, G) for v in (x, dy)], 2).flatten(0, 1)
            x_n, H = xdy[:, :C], states[n:min(n + G, N)].flatten(0, 1)
            chunks = len(x_n) // B
            a, Ft, inverse, V = decays(theta_n)
            FC, a2 = Ft[:, -1:], a.to(dtype).square()
            K = (xdy @ x_n.mT).unflatten(1, (2, C)).tril_()                     # <x_t, x_s> and <dy_t, x_s>, s <= t
            theta_K = theta_n * K[:, 0].diagonal(dim1=1, dim2=2)[..., None]
            K, S = K.flatten(1, 2).double(), xdy @ H.mT
            PY = S.to(torch.float64, copy=True).baddbmm_(K, V)
            hx, g = (PY.unflatten(1, (2, C)) * Ft[:, None]).to(dtype).unbind(1)
            lengths = squared_lengths(a2, theta_n * (2 * hx - theta_K), H)
            r = torch.rsqrt(lengths[:, 1:].clamp_min(0) / d + eps)
            q, dphi_n = phi_n * r, r * g
            put(dphi, n * C, dphi_n)
            # 2. kappa: inside every chunk, then with what the chunks behind it add.
            c = (q * r * dphi_n / d).unbind(1)
            kappas = [c[-1]]
            for c_t, a2_next in zip(c[-2::-1], a2.unbind(1)[:0:-1], strict=True):
                kappas.append(torch.addcmul(c_t, a2_next, kappas[-1]))
            kappas_in, out, through = [], a2[:, 0] * kappas[-1], FC[:, 0].to(dtype).square()
            for out_n, through_n in zip(*(v.unflatten(0, (chunks, B)).flip(0) for v in (out, through)), strict=True):
                kappas_in.append(kappa_in)
                kappa_in = torch.addcmul(out_n, through_n, kappa_in)
            kappa = torch.stack(kappas[::-1], 1)
            kappa.addcmul_((FC * inverse).to(dtype).square(), torch.stack(kappas_in[::-1]).flatten(0, 1)[:, None])
            # 3. L of every chunk, from the last to the first.
            W = (torch.stack([-theta_n * kappa, q], 1).double() * Ft[:, None]).flatten(1, 2)
            W_low, keep = W.to(dtype), FC.mT.to(dtype).unflatten(0, (chunks, B))
            Ls[chunks] = Ls[0]
            Ls[:chunks].flatten(0, 1).baddbmm_(W_low.mT, xdy, beta=0)
            for i in reversed(range(chunks)):
                Ls[i].addcmul_(keep[i], Ls[i + 1])
            L = Ls[1:chunks + 1].flatten(0, 1)
            # 4. The gradients.
            A = (W @ V.mT).to(dtype).unflatten(1, (2, C)).tril_()
            dx_n = (V * FC).to(dtype) @ L                                       # lambda_t: from behind, from the chunk
            dx_n.baddbmm_(A.flatten(1, 2).mT, xdy)
            dx_n.baddbmm_(W_low[:, :C], H).baddbmm_(A[:, 0].tril_(-1), x_n)     # h_{t-1}: from before, from the chunk
            put(dx, n * C, dx_n)
            lambda_x = ((x_n @ L.mT) * FC).baddbmm_(K.mT, W)                    # F_t <lambda_t, x_t>
            b = (H * L).sum(-1)[:, None] * FC + (W * S).sum(1, keepdim=True)    # b_1
            PY.mul_(W)
            change = (V * lambda_x).sub_(PY[:, :C]).sub_(PY[:, C:])             # b_{t+1} - b_t
            b = change.cumsum(1).sub_(change).add_(b)
            dtheta_n = lambda_x.mul_(inverse).sub_(b.div_(a)).to(dtype)
            put(dtheta, n * C, dtheta_n - kappa * (hx - theta_K - (1 - theta_n) * lengths[:, :-1]))
        return dtheta, dphi, dx, torch.addcmul(Ls[0], kappa_in[..., None], h0, value=-1).contiguous()


@chunked.register_fake
def _(theta, phi, x, h0, eps, C, keep):
    N = -(-x.shape[1] // C)
    return x.new_empty(x.shape), h0.new_empty(h0.shape), x.new_empty(N + 1, *h0.shape) if keep else x.new_empty(0)


@chunked_backward.register_fake
def _(theta, phi, x, h0, states, dy, dhT, eps, C):
    return tuple(v.new_empty(v.shape) for v in (theta, phi, x, h0))


def save(ctx, inputs, output):
    *tensors, ctx.eps, ctx.C, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)            # or the states would get a gradient of zeros


def gradients(ctx, dy, dhT, _):
    theta, phi, x, h0, states = ctx.saved_tensors
    dy, dhT = torch.zeros_like(x) if dy is None else dy, torch.zeros_like(h0) if dhT is None else dhT
    return *chunked_backward(theta, phi, x, h0, states, dy, dhT, ctx.eps, ctx.C), None, None, None


chunked.register_autograd(gradients, setup_context=save)


@torch.compiler.assume_constant_result
def choose_scan(scan: str, device: torch.device | str, m: int = 1, d: int = 1) -> tuple[str, str]:
    """The form that config.scan means for m rows of d numbers on a device: "loop", "chunked" or "kernel", and why.

    Where the kernels would be taken but cannot be, one line on stderr says why not."""
    device = torch.device(device)
    if scan in ("loop", "chunked"):
        return scan, "as asked"
    if scan == "kernel" or device.type == "cuda":
        if no_kernel(device, m, d) is None:
            return "kernel", "as asked" if scan == "kernel" else "Triton kernels"
        return "chunked", "matrix products"
    if device.type == "mps":
        return "loop", "the chunked form needs float64, which Apple GPUs lack"
    return "chunked", "matrix products, the fastest form here"


@functools.cache
def no_kernel(device: torch.device, m: int, d: int) -> str | None:
    """Why kernel.py cannot be used, or None. It is imported here and in the layer only: fmem.py works without Triton."""
    try:
        import kernel
        why_not = kernel.why_not(device, m, d, torch.float32)
    except ImportError as e:
        why_not = f"{e.name or e} is not installed"
    if why_not:
        print(f"fmem: scan_chunked instead of the Triton kernels: {why_not}", file=sys.stderr, flush=True)
    return why_not


# --------------------------------------------------------------------------------------------------------- the layer

class FactorizationMemory(nn.Module):
    """The memory layer, equations 4 to 13. Its input is the block's normalised residual stream."""

    def __init__(self, config: FMemConfig):
        super().__init__()
        self.config = config
        self.W_alpha = nn.Linear(config.d_model, config.n_rows, bias=False)
        self.w_eta = nn.Linear(config.d_model, 1, bias=False)
        self.w_mu = nn.Linear(config.d_model, 1, bias=False)
        self.W_i = nn.Linear(config.d_model, config.d_memory, bias=False)
        self.W_o = nn.Linear(config.d_memory, config.d_model, bias=False)

    def form(self, device: torch.device) -> str:
        return choose_scan(self.config.scan, device, self.config.n_rows, self.config.d_memory)[0]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where x [..., d_model] goes: theta, phi [..., k] for its rows [..., k]; rows is None if it is all m of them."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.W_alpha.weight.dtype)
            alpha = torch.softmax(wide(self.W_alpha(x)) / self.config.tau, -1)          # eq. 4
            eta, mu = torch.sigmoid(wide(self.w_eta(x))), torch.sigmoid(wide(self.w_mu(x)))     # eqs. 5, 6
            k, rows = self.config.k_rows, None
            if k is not None and k < self.config.n_rows:
                alpha, rows = alpha.topk(k, -1)                                         # eq. 12
                alpha = alpha / alpha.sum(-1, keepdim=True)                             # eq. 13
            return eta * alpha, mu * alpha, rows                                        # eqs. 7, 8

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, d_model], h [B, m, d_memory] or None -> y [B, T, d_model] and the memory after the last token."""
        y, h = self.read(x, h)
        return self.W_o(y), h

    def step(self, x_t: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One token, x_t [B, d_model] -> y_t [B, d_model] and the memory. In the sparse form only k rows are touched.

        Without gradients (torch.no_grad) h is changed in place and returned; clone it first to keep it.
        """
        y_t, h = self.read_step(x_t, h)
        return self.W_o(y_t), h

    def read(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """`forward` but for W_o."""
        theta, phi, rows = self.route(x)
        if rows is not None:                            # in training, masked rather than gathered: a chunk of
            zeros = theta.new_zeros(*theta.shape[:-1], self.config.n_rows)              # tokens meets nearly all rows
            theta, phi = zeros.scatter(-1, rows, theta), zeros.scatter(-1, rows, phi)
        xbar = self.W_i(x)                                                              # eq. 9
        form = self.form(x.device)
        if form == "loop":
            return scan_loop(theta, phi, xbar, h, self.config.norm_eps)                 # eqs. 10, 11
        if form == "kernel":
            from kernel import scan_triton
            return scan_triton(theta, phi, xbar, h, self.config.norm_eps, self.config.recompute)
        return scan_chunked(theta, phi, xbar, h, self.config.norm_eps, self.config.chunk_size, self.config.recompute)

    def read_step(self, x_t: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """`step` but for W_o."""
        theta, phi, rows = self.route(x_t)
        xbar = self.W_i(x_t)                                                            # eq. 9
        if h is None:
            h = wide(xbar).new_zeros(len(x_t), self.config.n_rows, self.config.d_memory)
        grad, eps = torch.is_grad_enabled(), self.config.norm_eps
        if not grad and h.dtype == torch.float32 and h.is_contiguous() and self.form(x_t.device) == "kernel":
            from kernel import step_triton
            return step_triton(h, xbar, theta, phi, rows, eps), h
        xbar, part = wide(xbar)[:, None], h
        if rows is not None:
            table = h.contiguous().flatten(0, 1)                                        # the rows of all texts
            at = (rows + torch.arange(len(h), device=h.device)[:, None] * h.shape[1]).flatten()
            part = table.index_select(0, at).unflatten(0, rows.shape)
        with torch.autocast(x_t.device.type, enabled=False):
            part = (part.lerp if grad else part.lerp_)(xbar.expand_as(part), theta[..., None])  # eq. 10
            q = phi * torch.rsqrt(torch.linalg.vector_norm(part, dim=-1).square() / part.shape[-1] + eps)
            y_t = (q[:, None] @ part)[:, 0]                                             # eq. 11
        if rows is None:
            h = part
        else:
            h = (table.index_copy if grad else table.index_copy_)(0, at, part.flatten(0, 1)).view_as(h)
        return y_t.to(x_t.dtype), h

    def init_weights(self, init: Callable, add: float):
        """init(weight, scale) draws a matrix of spread scale / sqrt(inputs); add is the scale of those that end a branch.

        The affinities start neither flat (all rows would collect the same average and part only slowly) nor hard. The
        input of W_alpha has unit rms, so entries of spread alpha_std tau / sqrt(d_model) give logits of spread alpha_std
        at every width and tau. eta and mu start at 1/2. The sweep behind the constants is in results/README.md.
        """
        init(self.W_alpha.weight, self.config.alpha_std * self.config.tau)
        nn.init.zeros_(self.w_eta.weight)
        nn.init.zeros_(self.w_mu.weight)
        init(self.W_i.weight)
        init(self.W_o.weight, add)


class ShortConv(nn.Module):
    """Each channel a weighted sum of its last `width` tokens, then SiLU: Mamba's. It lets a token know its neighbours."""

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
    """Ours, not in the paper: a short convolution before the projections (`conv`) and an output gate (`gate`), as in Mamba-2:

        y = W_o norm(read(conv(x)) * silu(W_g x))

    State: (h [B, m, d_memory], last [B, conv - 1, d_model] or None).
    """

    def __init__(self, config: FMemConfig):
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


# ----------------------------------------------------------------------------------------------------- block and model

class MLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, config: FMemConfig):
        super().__init__()
        self.W_gate = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.W_up = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.W_down = nn.Linear(config.d_mlp, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.W_down(F.silu(self.W_gate(x)) * self.W_up(x))


class Block(nn.Module):
    """LLaMA's block with the memory in attention's place: x + memory(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: FMemConfig):
        super().__init__()
        self.memory_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.memory = make_mixer(config)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, h: Tensor | tuple | None) -> tuple[Tensor, Tensor | tuple]:
        """x [B, T, d_model], or [B, d_model] for a single step, and the layer's state -> the same two."""
        memory = self.memory.step if x.dim() == 2 else self.memory
        y, h = memory(self.memory_norm(x), h)
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(self.mlp_norm(x))), h


EMBED_STD, INIT_STD = 0.06, 1.0  # spread of the embedding, gain of the matrices; see FMem.init_weights


class FMem(nn.Module):
    """The language model: embedding, blocks, norm, output layer."""

    def __init__(self, config: FMemConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.init_weights()
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def init_weights(self):
        """All of the initialisation; the paper gives none.

        Every matrix has spread INIT_STD / sqrt(inputs), and those that add to the residual stream a further
        1 / sqrt(2 n_layer), the number of additions. Gains of norms are 1. What is special to the memory is in its own
        init_weights.
        """
        c = self.config

        def init(weight, scale=INIT_STD):
            nn.init.normal_(weight, std=scale / math.sqrt(weight.shape[1]))

        add = INIT_STD / math.sqrt(2 * c.n_layer)
        nn.init.normal_(self.embed.weight, std=EMBED_STD)
        nn.init.normal_(self.head.weight, std=EMBED_STD)
        for block in self.blocks:
            block.memory.init_weights(init, add)
            init(block.mlp.W_gate.weight)
            init(block.mlp.W_up.weight)
            init(block.mlp.W_down.weight, add)

    def hidden(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Everything but the output layer: tokens [B, T] (or [B], a step) -> [B, T, d_model] (or [B, d_model]), state."""
        x = self.dropout(self.embed(tokens))
        new_state = []
        for block, h in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            x, h = block(x, h)
            new_state.append(h)
        return self.norm(x), new_state

    def aux_loss(self) -> Tensor | float:
        """What the layers add to the training loss: 0 but for the load-balancing loss of ablations.py."""
        return sum(getattr(block.memory, "aux_loss", 0.0) for block in self.blocks)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens [B, T] -> logits [B, T, vocab_size] of the token that follows each, and the state after the last.

        state: what an earlier call returned for the text so far, or None at the start; it is not changed. A text may be
        split anywhere into calls. tokens [B] is one step: logits [B, vocab_size] at a cost that no earlier text raises;
        without gradients it changes the state in place.
        """
        x, state = self.hidden(tokens, state)
        return self.head(x), state

    def generate(self, tokens: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, generator: torch.Generator | None = None,
                 state: State | None = None) -> Iterator[Tensor]:
        """Continue tokens [B, T], T at least 1: yields one new token [B] at a time, max_new_tokens of them.

        The prompt goes through the chunked form, PREFILL tokens at a time; then every token is one step. temperature 0
        takes the likeliest token; top_k and top_p restrict the choice (see `sample`). state continues an earlier text
        and is not changed. When it ends, the generator returns (`value = yield from ...`) the state after all tokens
        but the last that it made, which is thus the first of the next prompt. Raises ValueError for arguments that
        cannot work. Call eval() first on a model with dropout.
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"generate takes tokens [B, T] with at least one token, not {tuple(tokens.shape)}; "
                             "<|endoftext|> starts a new text")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be a number of at least 0, not {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
        return self._generate(tokens, max_new_tokens, temperature, top_k, top_p, generator, state)

    @torch.no_grad()
    def _generate(self, tokens, max_new_tokens, temperature, top_k, top_p, generator, state):
        if state is not None and tokens.shape[1] == 1:  # a text goes on: by a step, as if it had never been broken off
            x, state = self.hidden(tokens[:, 0], copy_state(state))
            x = x[:, None]
        else:
            for some in tokens.split(PREFILL, 1):       # a long prompt needs no more memory than a short one
                x, state = self.hidden(some, state)
        if not max_new_tokens:
            return state
        choice = temperature, top_k, top_p, generator
        token = sample(self.head(x[:, -1]), *choice)
        yield token
        fixed = token.is_cuda and all(isinstance(h, Tensor) for h in state)             # what the paper's memory keeps
        step = capture_step(self, token, state, *choice) if fixed and max_new_tokens >= 16 else None
        for _ in range(max_new_tokens - 1):
            if step:
                token = step()
            else:
                logits, state = self(token, state)
                token = sample(logits, *choice)
            yield token
        return state


PREFILL = 4096  # tokens of a prompt that go through the model at once


def copy_state(state: State) -> State:
    """A state of its own, for steps to change in place."""
    def copy(part):
        return tuple(map(copy, part)) if isinstance(part, tuple) else part.clone() if isinstance(part, Tensor) else part
    return [copy(h) for h in state]


def capture_step(model: FMem, token: Tensor, state: State, temperature, top_k, top_p, generator) -> Callable[[], Tensor] | None:
    """All layers of a step and the choice of the next token, recorded as one CUDA graph: a function that returns the next
    token [B] and moves the state on, in place. The memory never grows, so one recording serves for any number of tokens.
    None, with a line on stderr that says why, where it cannot be recorded."""
    token, before = token.clone(), [token.clone(), *(h.clone() for h in state)]
    randomness = torch.cuda.get_rng_state(token.device) if generator is None else generator.get_state()

    def step():
        logits, _ = model(token, state)
        token.copy_(sample(logits, temperature, top_k, top_p, generator))

    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(token.device)
    try:
        if generator is not None:
            graph.register_generator_state(generator)
        side.wait_stream(torch.cuda.current_stream(token.device))
        with torch.cuda.stream(side):
            for _ in range(3):                          # compiles the kernels and sets up the libraries, outside the graph
                step()
        torch.cuda.current_stream(token.device).wait_stream(side)
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as e:
        graph = None
        print(f"fmem: no CUDA graph for the steps: {str(e).splitlines()[0]}", file=sys.stderr)
    for now, then in zip([token, *state], before, strict=True):      # the trial steps have not happened
        now.copy_(then)
    if generator is None:
        torch.cuda.set_rng_state(randomness, token.device)
    else:
        generator.set_state(randomness)

    def replay():
        graph.replay()
        return token.clone()

    return replay if graph else None


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None) -> Tensor:
    """logits [B, vocab_size] -> tokens [B].

    top_k: only the k likeliest tokens. top_p: only the fewest likeliest tokens that together reach probability p (after
    temperature and top_k). The generator must live on the logits' device.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = wide(logits)
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-6)      # the largest is 0: no overflow
    if top_k is not None and top_k < logits.shape[-1]:
        kept, where = logits.topk(top_k, -1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, where, kept)
    probs = torch.softmax(logits, -1)
    if top_p is not None and top_p < 1:
        ordered, where = probs.sort(dim=-1, descending=True, stable=True)
        ordered = ordered * (ordered.cumsum(-1) - ordered < top_p)                  # the first is always kept
        probs = torch.zeros_like(probs).scatter(-1, where, ordered)
    # what torch.multinomial does for one draw, without its checks, for which a GPU would have to be waited for
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)
