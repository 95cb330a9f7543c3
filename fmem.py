"""Factorization Memory: a recurrent language model whose state is a small table of memory rows.

The method comes from L. Xiong, M. Tkachenko, J. Effendi and T. Cai, "Language Modeling With
Factorization Memory", arXiv 2511.00315 (2025). Each layer keeps a memory h with m rows. A token
with input x has an affinity alpha[i] for each row i. It moves row i a fraction theta[i] of the way
to a vector xbar, the same for every row. It reads a mixture of the rows, each scaled to unit RMS.
In the sparse variant, it writes and reads only the k rows with the largest alpha; all others keep
their exact values. That saves work in generation, not in training, where products cover all rows.
The state has a fixed size, so a token costs the same at any context length.

    B sequences of T tokens, m rows, k rows per token, d = d_memory

    symbol  eq.  shape
    alpha   4    B T m    softmax(W_alpha x / tau)       memory affinity; tau is the temperature
    eta     5    B T 1    sigmoid(w_eta . x)             update rate: how much the token writes
    mu      6    B T 1    sigmoid(w_mu . x)              merge rate: how much it reads
    theta   7    B T m    eta alpha                      update (write) weights, in [0, 1]
    phi     8    B T m    mu alpha                       merge (read) weights, in [0, 1]
    xbar    9    B T d    W_i x                          the vector written, the same for all rows
    h       10   B m d    (1 - theta) h + theta xbar     the memory, or state; starts as zeros
    y       11   B T d    sum_i phi[i] h[i] / rms(h[i])  the read, after the write; W_o follows
    gamma   12   B T m    1 for the k largest alpha, else 0; alpha in eqs. 7 and 8 is replaced by
            13            gamma alpha / sum(gamma alpha)

This is gated linear attention with m rows: key theta, query phi and forget gate 1 - theta come from
one softmax, every row receives the same vector, and the read normalises each row. A row is also a
minGRU with one gate for all its numbers; all rows share the candidate.

This file is the whole model, in reading order; it needs only torch. `scan_loop` defines the
recurrence token by token, and `scan_chunked` computes it with matrix products. On a GPU, the serial
part of the scan, `recurrence`, is the Triton kernel in kernel.py. The paper does not say how the
weights and the memory start: init_weights and zeros are our choice. So is a row norm with no gain.
"""

import importlib
import math
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class FMemConfig:
    """The hyperparameters of a model. Raises a ValueError that names an invalid one."""

    vocab_size: int = 1025  # size of the vocabulary
    n_layer: int = 4  # number of blocks, each a memory and an MLP
    d_model: int = 256  # width of the residual stream
    d_memory: int | None = None  # d, width of a memory row; None: d_model
    n_rows: int = 64  # m, number of memory rows
    k_rows: int | None = 16  # k, rows that a token writes and reads; None: all (dense)
    tau: float = 0.25  # temperature of the affinity
    alpha_std: float = 1.0  # initial standard deviation of the affinity logits, after tau
    d_mlp: int | None = None  # MLP width; None: 8/3 d_model, rounded up to a multiple of 32
    dropout: float = 0.0  # on the embedding and each branch's output, in training only
    tie_embeddings: bool = True  # the output layer shares the embedding's weights
    norm_eps: float = 1e-5  # added to the mean square in every RMS norm, including eq. 11
    scan: str = "chunked"  # "chunked", or "loop" (the definition, slow)
    recompute: bool = False  # recompute the scan in the backward pass, to save memory

    def __post_init__(self):
        self.d_memory = self.d_model if self.d_memory is None else self.d_memory
        self.k_rows = self.n_rows if self.k_rows is None else self.k_rows
        self.d_mlp = (8 * self.d_model + 95) // 96 * 32 if self.d_mlp is None else self.d_mlp
        for name in ("vocab_size", "n_layer", "d_model", "d_memory", "n_rows", "k_rows", "d_mlp"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
        if self.k_rows > self.n_rows:
            raise ValueError(f"k_rows must be at most n_rows ({self.n_rows}), not {self.k_rows}")
        for name in ("tau", "norm_eps", "alpha_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.scan not in ("chunked", "loop"):
            raise ValueError(f'scan must be "chunked" or "loop", not {self.scan!r}')


def upcast(x):
    """Cast x to at least float32: bf16 cannot tell theta = 0.999 from 1."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def route(x, layer):
    """Route each token: its rows, and its write and read weights for them (eqs. 4 to 8, 12, 13).

    x [..., d_model]; layer has W_alpha, w_eta, w_mu and config. Returns theta and phi [..., k] and
    the indices of their rows [..., k]. If k = m (dense), the indices are None, meaning all rows.
    """
    k = layer.config.k_rows
    with torch.autocast(x.device.type, enabled=False):
        if layer.W_alpha.weight.is_floating_point():  # false if it is quantised
            x = x.to(layer.W_alpha.weight.dtype)
        logits = upcast(layer.W_alpha(x)) / layer.config.tau
        rows = None
        if k < logits.shape[-1]:
            logits, rows = logits.topk(k, -1)  # eq. 12
        alpha = torch.softmax(logits, -1)  # eq. 4; over the k largest logits, also eq. 13
        eta = torch.sigmoid(upcast(layer.w_eta(x)))  # eq. 5
        mu = torch.sigmoid(upcast(layer.w_mu(x)))  # eq. 6
        return eta * alpha, mu * alpha, rows  # eqs. 7, 8


def scan_loop(theta, phi, xbar, h0=None, eps=1e-5):
    """The definition of the scan: eqs. 10 and 11, token by token, without W_o.

    theta, phi [B, T, m] in [0, 1]; xbar [B, T, d]; h0 [B, m, d], or None for zeros.
    Returns y [B, T, d] in xbar's dtype, and the memory after the last token [B, m, d] in float32
    (float64 if xbar is float64). Raises ValueError if the shapes do not match.
    """
    h = initial_memory(theta, phi, xbar, h0)
    reads = []
    with torch.autocast(xbar.device.type, enabled=False):
        inputs = (upcast(v).unbind(1) for v in (theta, phi, xbar))
        for theta_t, phi_t, xbar_t in zip(*inputs, strict=True):
            h = (1 - theta_t)[..., None] * h + theta_t[..., None] * xbar_t[:, None]  # eq. 10
            rms = torch.sqrt(h.square().mean(-1, keepdim=True) + eps)
            reads.append(torch.einsum("bm,bmd->bd", phi_t, h / rms))  # eq. 11
    return torch.stack(reads, 1).to(xbar.dtype), h


def initial_memory(theta, phi, xbar, h0):
    """Check the shapes (ValueError). Returns h0, or zeros if it is None, in at least float32."""
    B, T, m = theta.shape
    d = xbar.shape[-1]
    if h0 is None:
        h0 = upcast(xbar).new_zeros(B, m, d)
    if T == 0 or phi.shape != (B, T, m) or xbar.shape != (B, T, d) or h0.shape != (B, m, d):
        shapes = ", ".join(str(tuple(v.shape)) for v in (theta, phi, xbar, h0))
        expected = "theta, phi [B, T, m], xbar [B, T, d] and h0 [B, m, d] with T at least 1"
        raise ValueError(f"a scan takes {expected}, not {shapes}")
    return h0.to(upcast(xbar).dtype)


if not torch.cuda.is_available():  # is_available() is also true for AMD GPUs, which Triton supports
    kernel = None
else:
    try:
        if __package__:
            from . import kernel
        else:
            import kernel
        if Path(kernel.__file__ or "").resolve().parent != Path(__file__).resolve().parent:
            raise ImportError(f"{kernel} is another module named kernel")
    except Exception as error:  # Triton is missing or does not work here
        kernel = None
        warnings.warn(f"cannot use kernel.py, running a slow loop instead: {error}", stacklevel=2)


def recurrence(keep, write, first):
    """s_t = keep_t s_{t-1} + write_t, from s_0 = first. This is the only serial part of the scan.

    keep [B, T, m], write [B, T, m, d], first [B, m, d]. Returns s BEFORE each step [B, T, m, d] in
    write's dtype, and s after the last step [B, m, d] in float32 (float64 if first is float64).
    """
    if kernel is not None and write.is_cuda:
        return kernel.recurrence(keep, write, first)
    s = first
    before = []
    for keep_t, write_t in zip(keep.unbind(1), write.unbind(1), strict=True):
        before.append(s)
        s = keep_t[..., None] * s + write_t
    return torch.stack(before, 1).to(write.dtype), s


TINY = 1e-8  # a row keeps at least this fraction of its value, so log(1 - theta) stays finite
CHUNK = 32  # tokens per chunk; exp(-G) reaches TINY ** -CHUNK = 1e256; float64 overflows at 2e308


def scan_chunked(theta, phi, xbar, h0=None, eps=1e-5):
    """`scan_loop` as matrix products, CHUNK tokens at a time: same arguments, results, gradients.

    There are N chunks of C tokens. Let H be a row before its chunk, and G_t the sum of
    log(1 - theta) over the chunk's tokens up to t. Eq. 10 is linear in h. Inside a chunk it is
    therefore linear attention, with keys w and a decay. For each row:

        decay_t = exp(G_t)    w_s = theta_s exp(-G_s)    h_t = decay_t (H + sum_{s<=t} w_s xbar_s)

    The norm in eq. 11 is not linear, but it needs only the squared norm n_t of each row. Squaring
    eq. 10, with (1 - theta_t) h_{t-1} = h_t - theta_t xbar_t, gives n_t a recurrence. It needs only
    inner products with xbar_t, which can be computed without any h_t:

        <h_t, xbar_t> = decay_t (<H, xbar_t> + sum_{s<=t} w_s <xbar_s, xbar_t>)
        n_t = (1 - theta_t)^2 n_{t-1} + theta_t (2 <h_t, xbar_t> - theta_t <xbar_t, xbar_t>)

    With q_t = phi_t / sqrt(n_t / d + eps), the read is linear again:

        y_t = sum_i q_t[i] decay_t[i] H[i] + sum_{s<=t} (sum_i q_t[i] decay_t[i] w_s[i]) xbar_s

    Two parts are serial, one call of `recurrence` each. H takes N steps; it alone passes from chunk
    to chunk. Then n_t takes C steps, from |H|^2 on, in all chunks at once. Then every y_t is known.

    G, decay, w and their products are float64: none has a dimension d, which makes that affordable.
    A theta of 1 erases a row, and its log(1 - theta) would be -inf. So a row keeps at least the
    fraction TINY per token, and exp(-G) is at most 1e256 after a chunk of such tokens. Results and
    gradients are accurate to 3e-7 in float32, even if theta is 0 or 1. In float64 the error is
    2e-8, due to TINY. A row is less accurate if its writes almost cancel (with d of 1 they often
    do), or if theta = 1 erases a value 1e4 times as large as what is written.

    Under autocast, xbar and H are bf16. So are the weights that multiply them, once they are formed
    in float64 and bounded: q decay, A, and w times the decay of the whole chunk. The squared norms
    are float32, of the rounded xbar and H, since those are what is read.
    """
    h0 = initial_memory(theta, phi, xbar, h0)
    T, d = xbar.shape[1:]
    C = min(CHUNK, T)

    def chunks(v):  # [B, T, .] -> [B, N, C, .]; the padding has theta = phi = 0
        return F.pad(v, (0, 0, 0, -T % C)).unflatten(1, (-1, C))

    with torch.autocast(xbar.device.type, enabled=False):
        x = chunks(xbar)  # [B, N, C, d]
        x_upcast = upcast(x)
        theta = chunks(theta.to(x_upcast.dtype))  # [B, N, C, m]
        phi = chunks(phi.to(x_upcast.dtype))  # [B, N, C, m]

        # In each row, the weights of H (decay) and of the chunk's tokens (w), in float64.
        log_keep = torch.log1p((TINY - 1) * theta.double())  # [B, N, C, m], for log(1 - theta)
        G = log_keep.cumsum(2)
        decay = G.exp()
        w = theta.double() * (-G).exp()

        # The memory before each chunk.
        chunk_decay = decay[:, :, -1]  # [B, N, m] the fraction of H left after the chunk
        added = (w * chunk_decay[:, :, None]).to(x.dtype).mT @ x  # [B, N, m, d]
        H, last = recurrence(chunk_decay.to(theta.dtype), added, h0)  # [B, N, m, d], [B, m, d]

        # The squared norm of each row after each token.
        K = x_upcast @ x_upcast.mT  # [B, N, C, C] <xbar_t, xbar_s>
        S = x_upcast @ upcast(H).mT  # [B, N, C, m] <xbar_t, H>
        hx = decay * (S + K.tril().double() @ w)  # [B, N, C, m] <h_t, xbar_t>
        xx = K.diagonal(dim1=-2, dim2=-1)[..., None]  # [B, N, C, 1]
        change = theta * (2 * hx.to(theta.dtype) - theta * xx)  # [B, N, C, m]
        keep = (1 - theta).square()  # exact; only a logarithm needs TINY
        n_H = upcast(H).square().sum(-1)  # [B, N, m]
        n_before, _ = recurrence(
            keep.flatten(0, 1), change.flatten(0, 1)[..., None], n_H.flatten(0, 1)[..., None]
        )  # [B N, C, m, 1]
        n = keep * n_before.reshape(keep.shape) + change  # [B, N, C, m]

        # The read.
        q = phi * torch.rsqrt(n.clamp_min(0) / d + eps)  # [B, N, C, m]; n is rounded
        q_decay = q * decay
        A = (q_decay @ w.mT).tril()  # [B, N, C, C] weight of token s in the read at token t
        y = q_decay.to(x.dtype) @ H + A.to(x.dtype) @ x  # [B, N, C, d]
    return y.flatten(1, 2)[:, :T], last


class FactorizationMemory(nn.Module):
    """The memory layer, eqs. 4 to 13. Its input is the block's normalised residual stream.

    Another layer can replace it (`FMem(config, layer=...)`) if it has the same `forward`, `step`
    and `init_weights`. Its state may be a tensor, or a tuple of tensors or None. `load` supports
    it only if it is defined in lab/layers.py and listed in LAB_LAYERS.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.W_alpha = nn.Linear(config.d_model, config.n_rows, bias=False)
        self.w_eta = nn.Linear(config.d_model, 1, bias=False)
        self.w_mu = nn.Linear(config.d_model, 1, bias=False)
        self.W_i = nn.Linear(config.d_model, config.d_memory, bias=False)
        self.W_o = nn.Linear(config.d_memory, config.d_model, bias=False)

    def scan_inputs(self, x, state=None):
        """x [B, T, d_model] -> theta, phi [B, T, m], zero outside the top k, and xbar [B, T, d].

        state: the layer's state before x; used by layers of lab/ that route by earlier tokens too.
        """
        theta, phi, rows = route(x, self)
        if rows is not None:  # no time is saved: a chunk of tokens uses nearly every row
            zeros = theta.new_zeros(*theta.shape[:-1], self.config.n_rows)
            theta = zeros.scatter(-1, rows, theta)
            phi = zeros.scatter(-1, rows, phi)
        return theta, phi, self.W_i(x)  # eq. 9

    def scan(self, theta, phi, xbar, h):
        """Run the recurrence with the implementation that the config selects."""
        config = self.config
        inputs = theta, phi, xbar, h, config.norm_eps
        if config.scan == "loop" or xbar.device.type in ("mps", "xpu"):  # they lack float64
            return scan_loop(*inputs)
        if config.recompute:
            return checkpoint(scan_chunked, *inputs, use_reentrant=False, preserve_rng_state=False)
        return scan_chunked(*inputs)

    def forward(self, x, h=None):
        """x [B, T, d_model], h [B, m, d] or None -> y [B, T, d_model], h after the last token."""
        theta, phi, xbar = self.scan_inputs(x)
        y, h = self.scan(theta, phi, xbar, h)
        return self.W_o(y), h

    def step(self, x_t, h=None):
        """One token: x_t [B, d_model] -> y_t, h. With gradients disabled, h is updated in place.

        In that case, only the token's k rows are read and written: k d of the m d numbers.
        """
        config = self.config
        theta, phi, rows = route(x_t, self)  # [B, k]
        xbar = self.W_i(x_t)  # eq. 9  [B, d]
        if h is None:
            h = upcast(xbar).new_zeros(len(xbar), config.n_rows, config.d_memory)
        h = h.to(theta.dtype)
        if rows is None:
            rows = torch.arange(config.n_rows, device=h.device).expand(len(h), -1)
        index = rows[..., None].expand(-1, -1, h.shape[-1])  # [B, k, d]
        with torch.autocast(xbar.device.type, enabled=False):
            selected = h.gather(1, index).lerp(upcast(xbar)[:, None], theta[..., None])  # eq. 10
            q = phi * torch.rsqrt(selected.square().mean(-1) + config.norm_eps)  # [B, k]
            y_t = (q[:, None] @ selected)[:, 0]  # eq. 11  [B, d]
        scatter = h.scatter if torch.is_grad_enabled() else h.scatter_
        return self.W_o(y_t.to(xbar.dtype)), scatter(1, index, selected)

    def init_weights(self, init, branch_scale):
        """init(weight, scale) draws a matrix with standard deviation scale / sqrt(inputs).

        branch_scale is for matrices that write to the residual stream. W_alpha's input has unit
        RMS, so its logits start with standard deviation alpha_std at any width and tau. With logits
        of 0, the rows in use would stay identical. eta and mu start at 1/2.
        """
        init(self.W_alpha.weight, self.config.alpha_std * self.config.tau)
        nn.init.zeros_(self.w_eta.weight)
        nn.init.zeros_(self.w_mu.weight)
        init(self.W_i.weight)
        init(self.W_o.weight, branch_scale)


class MLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, config):
        super().__init__()
        self.W_gate = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.W_up = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.W_down = nn.Linear(config.d_mlp, config.d_model, bias=False)

    def forward(self, x):
        return self.W_down(F.silu(self.W_gate(x)) * self.W_up(x))


class Block(nn.Module):
    """A LLaMA-style block around the memory: x + memory(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config, layer, layer_arguments):
        super().__init__()
        self.memory_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.memory = layer(config, **layer_arguments)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, state):
        """x [B, T, d_model], or [B, d_model] for a step, and the layer's state -> new x, state."""
        memory = self.memory.step if x.dim() == 2 else self.memory
        y, state = memory(self.memory_norm(x), state)
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(self.mlp_norm(x))), state

    def init_weights(self, n_layer):
        """Draw each matrix with standard deviation 1 / sqrt(inputs), or as its layer defines. The
        2 n_layer matrices that write to the residual stream are scaled by 1 / sqrt(2 n_layer).
        """

        def init(weight, scale=1.0):
            nn.init.normal_(weight, std=scale / math.sqrt(weight.shape[1]))

        branch_scale = 1 / math.sqrt(2 * n_layer)
        self.memory.init_weights(init, branch_scale)
        init(self.mlp.W_gate.weight)
        init(self.mlp.W_up.weight)
        init(self.mlp.W_down.weight, branch_scale)


EMBED_STD = 0.06  # initial standard deviation of the embedding, the best value of a sweep
PREFILL = 4096  # prompt tokens per forward pass, so that memory use does not grow with the prompt


class FMem(nn.Module):
    """The language model. Each block creates its layer as layer(config, **layer_arguments)."""

    def __init__(self, config, layer=FactorizationMemory, layer_arguments=None):
        super().__init__()
        self.config = config
        self.layer_name = layer.__name__
        self.layer_arguments = dict(layer_arguments or {})
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config, layer, self.layer_arguments) for _ in range(config.n_layer)
        )
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(self.embed.weight, std=EMBED_STD)
        nn.init.normal_(self.head.weight, std=EMBED_STD)
        for block in self.blocks:
            block.init_weights(config.n_layer)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def hidden(self, tokens, state=None):
        """`forward` without the output layer: [B, T, d_model], or [B, d_model], and the state."""
        x = self.dropout(self.embed(tokens))
        states = []
        for block, before in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            x, after = block(x, before)
            states.append(after)
        return self.norm(x), states

    def forward(self, tokens, state=None):
        """tokens [B, T] -> next-token logits [B, T, vocab_size], and the state after the last.

        state: what an earlier call returned, or None at the start. A sequence may be split
        between calls at any token. The state is not changed, with one exception: tokens [B], a
        single step with logits [B, vocab_size], may change it in place if gradients are disabled.
        """
        x, state = self.hidden(tokens, state)
        return self.head(x), state

    @torch.inference_mode()
    def generate(self, tokens, max_new_tokens, state=None, **sampling):
        """Continue tokens [B, T], T at least 1. Yields each new token [B] and the state before it.

        state: the state to continue from, which is not changed. The yielded state may change in
        place with the next token. sampling: temperature, top_k, top_p, generator, as in `sample`.
        The model should be in evaluation mode. Raises ValueError for invalid arguments.
        """
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens must have shape [B, T], T at least 1, not {[*tokens.shape]}")
        state = copy_state(state)
        if state is not None and tokens.shape[1] == 1:  # by `step`, as in the loop below
            x, state = self.hidden(tokens[:, 0], state)
        else:
            for piece in tokens.split(PREFILL, 1):
                x, state = self.hidden(piece, state)
                x = x[:, -1]
        logits = self.head(x)
        for i in range(max_new_tokens):
            token = sample(logits, **sampling)
            yield token, state
            if i + 1 < max_new_tokens:
                logits, state = self(token, state)


def copy_state(state):
    """Copy a state (tensors, lists, tuples, None), so that steps may change the copy in place."""
    if isinstance(state, (list, tuple)):
        return type(state)(copy_state(part) for part in state)
    return state.clone() if isinstance(state, Tensor) else state


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """logits [B, vocab_size] -> tokens [B]. Temperature 0 takes the most likely token.

    top_k: keep the k most likely tokens. top_p: keep the smallest set of most likely tokens with a
    total probability of at least p (after temperature and top_k). generator: one on the logits'
    device, or a list with one for each sequence. Raises ValueError for invalid values.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits = upcast(logits) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept, index = logits.topk(top_k, -1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, index, kept)
    probs = torch.softmax(logits, -1)
    if top_p is not None and top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True, stable=True)
        mass_before = ordered.cumsum(-1) - ordered  # 0 for the first, which is always kept
        probs = torch.zeros_like(probs).scatter(-1, index, ordered * (mass_before < top_p))
    if isinstance(generator, list):
        pairs = zip(probs, generator, strict=True)
        return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in pairs])
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


FORMAT = "fmem checkpoint 2"
LAB_LAYERS = ("ExtendedMemory", "Attention", "Mamba2")  # classes of lab/layers.py


def load(path, device="cpu"):
    """Load a train.py checkpoint: the model, in evaluation mode, and a dict of the other entries.

    The model is built from the entries "config" (the fields of FMemConfig), "layer" (a class name),
    "layer_arguments" (its arguments besides the config) and "model" (the weights). Raises a
    one-line ValueError for any other file. Code in the file is never executed.
    """
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not verify checksums
            if file.testzip() is not None:
                raise ValueError("it is damaged: a checksum does not match")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.get("format") != FORMAT:
            raise ValueError("it was not written by this version of train.py")
        layer = FactorizationMemory
        if saved["layer"] in LAB_LAYERS:
            layer = getattr(importlib.import_module("lab.layers"), saved["layer"])
        elif saved["layer"] != layer.__name__:
            raise ValueError(f"this version has no layer {saved['layer']}")
        model = FMem(FMemConfig(**saved["config"]), layer, saved["layer_arguments"])
        model.load_state_dict(saved.pop("model"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; run python train.py first") from None
    except Exception as error:  # a damaged file can raise any exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a valid checkpoint: {reason}") from None
    return model.to(device).eval(), saved
