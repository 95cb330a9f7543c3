"""Factorization Memory: a recurrent language model whose state is a small table of memory rows.

The method is that of L. Xiong, M. Tkachenko, J. Effendi and T. Cai, "Language Modeling With Factorization Memory",
arXiv 2511.00315 (2025). Each layer keeps a memory h of m rows. A token with input x belongs to each row to some degree (alpha);
every row moves towards the same vector xbar by a share theta of its own; what is read is a mixture of the rows, each brought to
unit rms. In the sparse form a token writes and reads only the k rows of the largest alpha; all others keep their value exactly.
The state has a fixed size, so a token costs the same after any text.

    symbol   eq.   shape    B texts, T tokens (C in a chunk), m rows, k rows chosen per token, d = d_memory
    alpha    4     B T m    softmax(W_alpha x / tau)            memory affinity; sums to 1; tau is the temperature
    eta      5     B T 1    sigmoid(w_eta . x)                  update rate: how much the token writes
    mu       6     B T 1    sigmoid(w_mu . x)                   merge rate: how much it reads
    theta    7     B T m    eta alpha                           update (write) weights, in [0, 1]
    phi      8     B T m    mu alpha                            merge (read) weights, in [0, 1]
    xbar     9     B T d    W_i x                               input projection: what is written, the same for all rows
    h        10    B m d    (1 - theta) h + theta xbar          the memory, or state; h0 before the first token, hT after the last
    y        11    B T d    sum_i phi[i] h[i] / rms(h[i])       the read, after the write; W_o is applied to it
    gamma    12    B T m    top-k mask of alpha                 outside it alpha = 0, inside it is rescaled to sum to 1 (13)

This file is the whole model, from top to bottom: routing, the recurrence as a loop over the tokens (`scan_loop`, the
definition) and in matrix products (`scan_chunked`), the layer, the block, the language model, generation. It needs torch
alone. With the folder fast/ beside it the same results come faster (`scan` chooses); train.py trains. The paper does not say how
the weights and h0 start, or what the norms add: FMem.init_weights, zeros, and 1e-5 with no gain in the row norm are our answers.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import fast
    fast = fast if hasattr(fast, "capture_step") else None      # some other package may have this name
except ImportError:
    fast = None                                                 # this file alone: the same results, slower

FORMS = "auto", "loop", "chunked", "fast", "kernel"
COUNT = (int,), "whole number of at least 1 and at most 2**24", lambda v: 1 <= v <= 2**24
LIMITS = {**dict.fromkeys(("vocab_size", "n_layer", "d_model", "d_memory", "n_rows", "d_mlp"), COUNT),
          **dict.fromkeys(("tau", "norm_eps"), ((int, float), "number above 0", lambda v: 0 < v < math.inf)),
          "alpha_std": ((int, float), "number of at least 0", lambda v: 0 <= v < math.inf),
          "dropout": ((int, float), "number from 0 to below 1", lambda v: 0 <= v < 1)}


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
    d_mlp: int | None = None        # hidden width of the MLP; None: 8/3 d_model, rounded up to a multiple of 32
    dropout: float = 0.0            # on the embedding and on what each layer adds, in training only
    tie_embeddings: bool = True     # the output layer shares the embedding's weights
    norm_eps: float = 1e-5          # added to the mean square in every RMS norm, the row norm of eq. 11 included
    scan: str = "auto"              # form of the recurrence, see `scan`
    recompute: bool = False         # with "fast" and "kernel": keep less for the gradient, compute more

    def __post_init__(self):
        self.d_memory = self.d_model if self.d_memory is None else self.d_memory
        if self.d_mlp is None and type(self.d_model) is int:
            self.d_mlp = -(-8 * self.d_model // (3 * 32)) * 32
        for name, (kinds, limit, fits) in LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds) or not fits(value):
                raise ValueError(f"{name} must be a {limit}, not {value!r}")
        if self.k_rows is not None and (type(self.k_rows) is not int or not 1 <= self.k_rows <= self.n_rows):
            raise ValueError(f"k_rows must be from 1 to n_rows ({self.n_rows}), or None for all rows, not {self.k_rows!r}")
        if self.scan not in FORMS:
            raise ValueError(f"scan must be one of {', '.join(FORMS)}, not {self.scan!r}")


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: bf16 cannot tell theta = 0.998 from 1, so weights, norms and states are never narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def route(x: Tensor, W_alpha: nn.Linear, w_eta: nn.Linear, w_mu: nn.Linear, tau: float,
          k: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Which rows a token takes, and how much it writes to and reads from them: equations 4 to 8, 12 and 13. x [..., d_model].

    Returns theta, phi [..., k] and the numbers of their rows [..., k]; with k None or m, theta and phi of all rows, and None.
    """
    with torch.autocast(x.device.type, enabled=False):
        logits, eta, mu = (wide(W(x.to(W.weight.dtype))) for W in (W_alpha, w_eta, w_mu))
        alpha, rows = torch.softmax(logits / tau, -1), None                             # eq. 4
        eta, mu = torch.sigmoid(eta), torch.sigmoid(mu)                                 # eqs. 5, 6
        if k is not None and k < alpha.shape[-1]:
            alpha, rows = alpha.topk(k, -1)                                             # eq. 12
            alpha = alpha / alpha.sum(-1, keepdim=True)                                 # eq. 13
        return eta * alpha, mu * alpha, rows                                            # eqs. 7, 8


def scan_loop(theta: Tensor, phi: Tensor, xbar: Tensor, h0: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The memory, token by token: equations 10 and 11 without W_o. This is the definition; it is slow.

    theta, phi [B, T, m] in [0, 1]; xbar [B, T, d]; h0 [B, m, d] or None for zeros.
    Returns y [B, T, d] in xbar's dtype and hT [B, m, d] in float32 (float64 if xbar is). Differentiable in all four inputs.
    Raises ValueError for shapes that do not fit.
    """
    h, y = initial_state(theta, phi, xbar, h0), []
    with torch.autocast(xbar.device.type, enabled=False):
        inputs = (wide(v).unbind(1) for v in (theta, phi, xbar))
        for theta_t, phi_t, xbar_t in zip(*inputs, strict=True):
            h = (1 - theta_t)[..., None] * h + theta_t[..., None] * xbar_t[:, None]         # eq. 10
            rms = torch.sqrt(h.square().mean(-1, keepdim=True) + eps)
            y.append(torch.einsum("bm,bmd->bd", phi_t, h / rms))                            # eq. 11
    return torch.stack(y, 1).to(xbar.dtype), h


def initial_state(theta: Tensor, phi: Tensor, xbar: Tensor, h0: Tensor | None) -> Tensor:
    """h0 in float32 at least, zeros for None. Raises ValueError when the shapes of a scan do not fit."""
    (B, T, m), d = theta.shape, xbar.shape[-1]
    h0 = wide(xbar).new_zeros(B, m, d) if h0 is None else h0
    if T == 0 or phi.shape != theta.shape or xbar.shape[:2] != (B, T) or h0.shape != (B, m, d):
        shapes = ", ".join(str(tuple(v.shape)) for v in (theta, phi, xbar, h0))
        raise ValueError(f"a scan takes theta, phi [B, T, m], xbar [B, T, d] and h0 [B, m, d], T at least 1, not {shapes}")
    return h0.to(wide(xbar).dtype)


def scan_chunked(theta: Tensor, phi: Tensor, xbar: Tensor, h0: Tensor | None = None, eps: float = 1e-5,
                 C: int = 16) -> tuple[Tensor, Tensor]:
    """scan_loop by matrix products, C tokens at a time: the same arguments, results and gradients, for any T.

    Eq. 10 is linear, so inside a chunk each row is H, the row before the chunk, times a number, plus a weighted sum of the
    chunk's inputs. These C + 1 coefficients follow eq. 10 themselves:

        h_t = F_t H + sum_{s <= t} E_t[s] xbar_s    F_t = (1 - theta_t) F_{t-1},  E_t = (1 - theta_t) E_{t-1} + theta_t (at s = t)

    The norm in eq. 11 is not linear. But all that it needs of a row is its squared length n_t, and that has a recurrence of
    its own, made of inner products that are known before any h_t is: K = xbar xbar^T and S = xbar H^T.

        <h_t, xbar_t> = F_t S_t + sum_s E_t[s] K_ts
        n_t = (1 - theta_t)^2 n_{t-1} + theta_t (2 <h_t, xbar_t> - theta_t <xbar_t, xbar_t>)
        y_t = sum_i q_t[i] F_t[i] H[i] + sum_s A_ts xbar_s,     q_t = phi_t / sqrt(n_t / d + eps),  A_ts = sum_i q_t[i] E_t[i, s]

    Nothing is divided by theta or 1 - theta, so both ends of [0, 1] are exact in every dtype. A token with theta = phi = 0
    changes nothing, so the last chunk is filled up with such tokens.
    """
    H, (T, d) = initial_state(theta, phi, xbar, h0), xbar.shape[1:]
    theta, phi, x = (F.pad(wide(v), (0, 0, 0, -T % C)).unflatten(1, (-1, C)) for v in (theta, phi, xbar))     # [B, N, C, .]
    a = 1 - theta
    with torch.autocast(xbar.device.type, enabled=False):
        # 1. The coefficients, all N chunks at once: F_ [B, N, C, m], E [B, N, C, C, m] of (t, s, row).
        F_t, E_t, coefficients = torch.ones_like(a[:, :, 0]), torch.zeros_like(a), []
        for a_t, theta_t, at_t in zip(a.unbind(2), theta.unbind(2), torch.eye(C, device=a.device, dtype=a.dtype), strict=True):
            F_t, E_t = a_t * F_t, a_t[:, :, None] * E_t + at_t[:, None] * theta_t[:, :, None]
            coefficients.append((F_t, E_t))
        F_, E = (torch.stack(v, 2) for v in zip(*coefficients, strict=True))
        # 2. The memory before each chunk: all that passes from one chunk to the next.
        states = []
        for keep, written in zip(F_t.unbind(1), (E_t.mT @ x).unbind(1), strict=True):
            states.append(H)
            H = keep[..., None] * H + written
        states = torch.stack(states, 1)                                                         # [B, N, m, d]
        # 3. The squared lengths of the rows, hence q.
        K, S = x @ x.mT, x @ states.mT
        hx = F_ * S + torch.einsum("bntsm,bnts->bntm", E, K)                                    # <h_t, xbar_t>
        change = theta * (2 * hx - theta * K.diagonal(dim1=-2, dim2=-1)[..., None])
        n_t, lengths = states.square().sum(-1), []
        for a_t, change_t in zip(a.unbind(2), change.unbind(2), strict=True):
            n_t = a_t.square() * n_t + change_t
            lengths.append(n_t)
        q = phi * torch.rsqrt(torch.stack(lengths, 2).clamp_min(0) / d + eps)
        y = (q * F_) @ states + torch.einsum("bntsm,bntm->bnts", E, q) @ x                      # 4. The read.
    return y.flatten(1, 2)[:, :T].to(xbar.dtype), H


def scan(theta: Tensor, phi: Tensor, xbar: Tensor, h0: Tensor | None = None, eps: float = 1e-5, form: str = "auto",
         recompute: bool = False) -> tuple[Tensor, Tensor]:
    """`scan_loop`, with its arguments and results, in another form: "chunked", in plain PyTorch; "fast", chunked with a gradient
    of its own (fast/chunked.py); "kernel", in Triton (kernel.py); "auto", the fastest that runs here. recompute: "fast" and
    "kernel" keep only their inputs for the gradient. Raises ValueError for shapes or forms that do not fit.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
    if fast is None and form in ("fast", "kernel"):
        raise ValueError(f'form "{form}" needs the folder fast/ beside fmem.py; without it take "auto"')
    if fast:
        form, _ = fast.choose(form, xbar.device, int(theta.shape[-1]), int(xbar.shape[-1]), xbar.dtype)
    if form in ("fast", "kernel"):
        return fast.scan(theta, phi, xbar, initial_state(theta, phi, xbar, h0), eps, form, recompute)
    return (scan_loop if form == "loop" else scan_chunked)(theta, phi, xbar, h0, eps)


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

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return route(x, self.W_alpha, self.w_eta, self.w_mu, self.config.tau, self.config.k_rows)

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, d_model], h [B, m, d_memory] or None -> y [B, T, d_model] and the memory after the last token."""
        y, h = self.read(x, h)
        return self.W_o(y), h

    def step(self, x_t: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One token, x_t [B, d_model] -> y_t and the memory. Without gradients h may be changed in place; clone it to keep it."""
        y_t, h = self.read_step(x_t, h)
        return self.W_o(y_t), h

    def read(self, x: Tensor, h: Tensor | None, routed: tuple | None = None) -> tuple[Tensor, Tensor]:
        """`forward` without W_o. routed: theta, phi and rows, if they are known already."""
        theta, phi, rows = routed or self.route(x)
        if rows is not None:                            # masked, not gathered: a chunk of tokens meets nearly all rows
            zeros = theta.new_zeros(*theta.shape[:-1], self.config.n_rows)
            theta, phi = zeros.scatter(-1, rows, theta), zeros.scatter(-1, rows, phi)
        xbar = self.W_i(x)                                                                      # eq. 9
        return scan(theta, phi, xbar, h, self.config.norm_eps, self.config.scan, self.config.recompute)     # eqs. 10, 11

    def read_step(self, x_t: Tensor, h: Tensor | None, routed: tuple | None = None) -> tuple[Tensor, Tensor]:
        """`step` without W_o."""
        theta, phi, rows = routed or self.route(x_t)
        xbar, eps = self.W_i(x_t), self.config.norm_eps                                         # eq. 9
        h = wide(xbar).new_zeros(len(x_t), self.config.n_rows, self.config.d_memory) if h is None else h
        if fast and self.config.scan not in ("loop", "chunked") and not torch.is_grad_enabled():
            return fast.step(h, xbar, theta, phi, rows, eps, self.config.scan)
        rows = torch.arange(h.shape[1], device=h.device).expand(len(h), -1) if rows is None else rows
        where = rows[..., None].expand(-1, -1, h.shape[-1])
        y, chosen = scan_loop(theta[:, None], phi[:, None], xbar[:, None], h.gather(1, where), eps)     # eqs. 10, 11
        return y[:, 0], h.scatter(1, where, chosen)

    def init_weights(self, init: Callable, add: float):
        """init(weight, scale) draws a matrix of spread scale / sqrt(inputs); add is the scale of those that end a branch.

        The affinities start neither flat (all rows would collect the same average and part only slowly) nor hard: the input of
        W_alpha has unit rms, so the logits start with spread alpha_std at every width and tau. eta and mu start at 1/2.
        """
        init(self.W_alpha.weight, self.config.alpha_std * self.config.tau)
        nn.init.zeros_(self.w_eta.weight)
        nn.init.zeros_(self.w_mu.weight)
        init(self.W_i.weight)
        init(self.W_o.weight, add)


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

    def __init__(self, config: FMemConfig, layer: Callable):
        super().__init__()
        self.memory_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.memory = layer(config)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, h) -> tuple:
        """x [B, T, d_model], or [B, d_model] for a single step, and the layer's state -> the same two."""
        memory = self.memory.step if x.dim() == 2 else self.memory
        y, h = memory(self.memory_norm(x), h)
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(self.mlp_norm(x))), h


EMBED_STD, INIT_STD = 0.06, 1.0     # spread of the embedding, gain of the matrices; see FMem.init_weights
PREFILL = 4096                      # tokens of a prompt that go through the model at once


class FMem(nn.Module):
    """The language model: embedding, blocks, norm, output layer. layer: a class with FactorizationMemory's methods."""

    def __init__(self, config: FMemConfig, layer: Callable = FactorizationMemory):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.init_weights()
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def init_weights(self):
        """Every matrix has spread INIT_STD / sqrt(inputs), those that add to the residual stream a further 1 / sqrt(additions),
        gains of norms are 1. The sweep behind the constants is in experiments/results/README.md."""
        def init(weight, scale=INIT_STD):
            nn.init.normal_(weight, std=scale / math.sqrt(weight.shape[1]))
        add = INIT_STD / math.sqrt(2 * self.config.n_layer)
        nn.init.normal_(self.embed.weight, std=EMBED_STD)
        nn.init.normal_(self.head.weight, std=EMBED_STD)
        for block in self.blocks:
            block.memory.init_weights(init, add)
            init(block.mlp.W_gate.weight)
            init(block.mlp.W_up.weight)
            init(block.mlp.W_down.weight, add)

    def hidden(self, tokens: Tensor, state: list | None = None) -> tuple[Tensor, list]:
        """`forward` without the output layer: tokens [B, T] -> [B, T, d_model], or [B] -> [B, d_model], and the state."""
        x = self.dropout(self.embed(tokens))
        new_state = []
        for block, h in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            x, h = block(x, h)
            new_state.append(h)
        return self.norm(x), new_state

    def forward(self, tokens: Tensor, state: list | None = None) -> tuple[Tensor, list]:
        """tokens [B, T] -> logits [B, T, vocab_size] of the token that follows each, and the state after the last.

        state: what an earlier call returned for the text so far, not changed, or None at the start. A text may be split anywhere
        into calls. tokens [B] is one step: logits [B, vocab_size]; without gradients it may change the state in place.
        """
        x, state = self.hidden(tokens, state)
        return self.head(x), state

    def generate(self, tokens: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, generator: torch.Generator | list | None = None,
                 state: list | None = None) -> Iterator[Tensor]:
        """Continue tokens [B, T], T at least 1: yields one new token [B] at a time, max_new_tokens of them.

        temperature 0 takes the likeliest token; top_k and top_p restrict the choice (see `sample`). state continues an earlier
        text and is not changed. At its end the generator returns (`value = yield from ...`) the state after all tokens but the
        last that it made, which is thus the first of the next prompt. Raises ValueError for arguments that cannot work.
        """
        for fits, what in ((tokens.dim() == 2 and tokens.numel(), f"tokens must be [B, T], T at least 1, not {[*tokens.shape]}"),
                           (max_new_tokens >= 0, f"max_new_tokens must be at least 0, not {max_new_tokens}"),
                           (0 <= temperature < math.inf, f"temperature must be a number of at least 0, not {temperature}"),
                           (top_k is None or top_k >= 1, f"top_k must be at least 1, not {top_k}"),
                           (top_p is None or 0 < top_p <= 1, f"top_p must be above 0 and at most 1, not {top_p}")):
            if not fits:
                raise ValueError(what)
        return self._generate(tokens, max_new_tokens, (temperature, top_k, top_p, generator), state)

    @torch.no_grad()
    def _generate(self, tokens, max_new_tokens, choice, state):
        if state is not None and tokens.shape[1] == 1:          # a text is resumed by a step, as if it had never stopped
            x, state = self.hidden(tokens[:, 0], copy_state(state))
        else:
            for some in tokens.split(PREFILL, 1):               # a long prompt needs no more memory than a short one
                x, state = self.hidden(some, state)
                x = x[:, -1]
        step = None
        for i in range(max_new_tokens):
            if step:
                token = step()
            else:
                logits, state = self(token, state) if i else (self.head(x), state)
                token = sample(logits, *choice)
            yield token
            if i == 0 and fast and max_new_tokens >= 16:
                step = fast.capture_step(self, token, state, sample, choice)            # None where none is faster
        return state


def copy_state(state):
    """A state of its own, for steps to change in place."""
    if isinstance(state, (list, tuple)):
        return type(state)(map(copy_state, state))
    return state.clone(memory_format=torch.contiguous_format) if isinstance(state, Tensor) else state


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | list | None = None) -> Tensor:
    """logits [B, vocab_size] -> tokens [B]. top_k: only the k likeliest tokens. top_p: only the fewest likeliest tokens that
    together reach probability p (after temperature and top_k). generator: on the logits' device; or a list of one per text."""
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
    # What torch.multinomial does for one draw, without its checks, for which a GPU would have to be waited for.
    noise = torch.empty_like(probs)
    for rows, one in zip(noise.split(1), generator, strict=True) if isinstance(generator, list) else [(noise, generator)]:
        rows.exponential_(generator=one)
    return (probs / noise).argmax(-1)
