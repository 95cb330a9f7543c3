"""Triton kernels for the memory: the scan, forward and backward, and one step of generation, on NVIDIA GPUs from Ampere on.

What is fused. A loop over the tokens moves the whole memory [m, d] for every token: 2 m d numbers. Here a chunk of C = 32 or 64
tokens moves it a fixed number of times (once written, twice read in the forward pass), x is read three times, y written once.
Everything else does not grow with d and is small. With B 8, T 4096, m 64, d 1024 in bf16 that is 0.8 GB instead of 17 GB.

How. Inside a chunk with start state H, every row is H times a number plus a combination of the chunk's inputs,

    h_t = F_t H + sum_{s <= t} E_t[s] x_s,      F_t = a_t F_{t-1},      E_t[s] = a_t E_{t-1}[s] for s < t,  E_t[t] = theta_t

with a = 1 - theta: C + 1 coefficients per row instead of d numbers. Given the inner products of the x_s with each other
(K) and with H (S), eq. 10, the norm and eq. 11 can be run on the coefficients, token by token, in registers:

    <h_{t-1}, x_t> = F_{t-1} S_t + sum_s E_{t-1}[s] K_ts            n_t = a^2 n_{t-1} + 2 a theta <h_{t-1}, x_t> + theta^2 K_tt
    y_t = sum_i q_t F_t H + sum_s A_ts x_s,      A_ts = sum_i q_t E_t[s],      q_t = phi_t / sqrt(n_t / d + eps)

No logarithm, no division: exact for every theta from 0 to 1. The work that grows with d is matrix products on the tensor cores.
The gradients are those of `chunked_backward` in fast/chunked.py (lambda, kappa, L), without its division by a_t.

The order of this file: loads, forward kernels, backward kernels, the step, the operators, the checked functions. Symbols are
those of fmem.py, x short for xbar; D(t, s) is the product of a from s + 1 to t, D(C, s) that up to the chunk's end. Kernels get
pointers to contiguous tensors; T and N = T / C are run-time numbers, shapes m and d and the tiles C, BM, BD are compiled in. One
program does one chunk of one text and BM rows (or BD columns). Tokens after T load as theta = phi = x = 0, which changes nothing.
Never feed a transposed dot result from registers into another dot: some Triton releases miscompile that on Hopper. What is
needed transposed is loaded transposed. No kernel loads an address that it has stored, except behind a barrier: several warps hold
copies of a small tensor, and a late one would load what an early one has stored. (The step works in place, with so few warps that
no two hold the same numbers.) This file imports nothing of ours, and raises where it cannot run; fast/__init__.py chooses.
"""
import functools
import os

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.language import constexpr

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"     # Triton's interpreter: the kernels run on a CPU, slowly
MAX_M, MAX_D = 512, 4096
jit = functools.partial(triton.jit, do_not_specialize=["T", "N"])       # not compiled again for special values of the lengths


# --------------------------------------------------------------------------------------------------------------- loads

@triton.jit
def tile(p, row0, rows, cols, n_rows, n_cols: constexpr):
    """p[row0 + rows, cols] of a matrix with n_cols columns; zeros for rows >= n_rows and cols >= n_cols."""
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    return tl.load(p + row0 * n_cols + (rows[:, None] * n_cols + cols[None, :]), mask=mask, other=0.0)


@triton.jit
def tile_T(p, row0, rows, cols, n_rows, n_cols: constexpr):
    """The transpose of `tile`, [cols, rows], loaded as such."""
    mask = (cols < n_cols)[:, None] & (rows < n_rows)[None, :]
    return tl.load(p + row0 * n_cols + (rows[None, :] * n_cols + cols[:, None]), mask=mask, other=0.0)


@triton.jit
def put(p, row0, rows, cols, n_rows, n_cols: constexpr, value):
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    tl.store(p + row0 * n_cols + (rows[:, None] * n_cols + cols[None, :]), value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def place(T, N, m: constexpr, C: constexpr, BM: constexpr, rows, tokens):
    """A program's chunk, counted over all texts; its block of rows; `tokens`; the chunk's first token; tokens left from there on.
    Programs of one chunk follow each other: its x is still in the L2 cache."""
    blocks: constexpr = (m + BM - 1) // BM
    bc, im = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, c = (bc // N).to(tl.int64), bc % N
    return bc.to(tl.int64), im * BM + rows, tokens, b * T + c * C, T - c * C


@triton.jit
def dot(a, b, acc, OPERAND: constexpr, PRECISION: constexpr):
    return tl.dot(a.to(OPERAND), b.to(OPERAND), acc, input_precision=PRECISION)


# ------------------------------------------------------------------------------------------------------------- forward

@jit
def decays_kernel(theta, write, suffix, keep, T, N, m: constexpr, C: constexpr, BM: constexpr):
    """Of each chunk: suffix_s = D(C, s), write_s = theta_s D(C, s) and keep = D(C, 0), for H' = keep H + write^T x."""
    bc, i, t, row0, left = place(T, N, m, C, BM, tl.arange(0, BM), tl.arange(0, C))
    th = tile(theta, row0, t, i, left, m)
    after = tile(theta, row0 + 1, t, i, tl.minimum(left, C) - 1, m)         # theta of the token behind
    D = tl.cumprod(1 - after, 0, reverse=True)
    put(suffix, row0, t, i, left, m, D)
    put(write, row0, t, i, left, m, th * D)
    put(keep, bc, t, i, 1, m, (1 - th) * D)                                 # the first row of it


@jit
def states_kernel(w1, v1, w2, v2, keep, first, states, last, T, N, m: constexpr, d: constexpr, C: constexpr, BM: constexpr,
                  BD: constexpr, BACKWARD: constexpr, OPERAND: constexpr, PRECISION: constexpr):
    """S <- keep S + w1^T v1, chunk after chunk from `first` on: stores S before each chunk, and the last one.
    BACKWARD: from the last chunk to the first, with a second pair, + w2^T v2. S stays in float32.
    """
    b, i, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(2) * BD + tl.arange(0, BD)
    t = tl.arange(0, C)
    S = tile(first, b * m, i, e, m, d)
    for j in range(N):
        c = N - 1 - j if BACKWARD else j
        row0, left = b * T + c * C, T - c * C
        put(states, (b * N + c) * m, i, e, m, d, S)
        S *= tl.load(keep + (b * N + c) * m + i, mask=i < m, other=0.0)[:, None]
        S = dot(tile_T(w1, row0, t, i, left, m), tile(v1, row0, t, e, left, d), S, OPERAND, PRECISION)
        if BACKWARD:
            S = dot(tile_T(w2, row0, t, i, left, m), tile(v2, row0, t, e, left, d), S, OPERAND, PRECISION)
    put(last, b * m, i, e, m, d, S)


@jit
def products_kernel(v, x, states, states2, S, K, rowdot, T, N, m: constexpr, d: constexpr, C: constexpr, BM: constexpr,
                    BD: constexpr, GRAM: constexpr, ROWDOT: constexpr, OPERAND: constexpr, PRECISION: constexpr):
    """Inner products of each chunk: S = v states^T; GRAM: K = v x^T; ROWDOT: <states[i], states2[i]> of each row."""
    bc, i, t, row0, left = place(T, N, m, C, BM, tl.arange(0, BM), tl.arange(0, C))
    s_acc, k_acc, r_acc = tl.zeros([C, BM], tl.float32), tl.zeros([C, C], tl.float32), tl.zeros([BM], tl.float32)
    for start in range(0, d, BD):
        e = start + tl.arange(0, BD)
        V, H = tile(v, row0, t, e, left, d), tile_T(states, bc * m, i, e, m, d)
        s_acc = dot(V, H, s_acc, OPERAND, PRECISION)
        if GRAM:
            k_acc = dot(V, tile_T(x, row0, t, e, left, d), k_acc, OPERAND, PRECISION)
        if ROWDOT:
            r_acc += tl.sum(H.to(tl.float32) * tile_T(states2, bc * m, i, e, m, d).to(tl.float32), 0)
    put(S, row0, t, i, left, m, s_acc)
    if GRAM:                                                                # the same for all blocks of rows: one stores it
        put(K, bc * C, t, t, tl.where(tl.program_id(0) % tl.cdiv(m, BM) == 0, C, 0), C, k_acc)
    if ROWDOT:
        tl.store(rowdot + bc * m + i, r_acc, mask=i < m)


@jit
def mix_kernel(theta, phi, S, K, n0, suffix, kappa, kappa_in, A, wF, eps, T, N, m: constexpr, d: constexpr, C: constexpr,
               BM: constexpr, BACKWARD: constexpr):
    """The recurrence on the coefficients. A_ts = sum_i w_t E_t[s] (over BM rows: one A per group of rows) and w_t F_t.
    Forward: w_t = q_t, from the row lengths. BACKWARD: w_t = -theta_t kappa_t, where the chunks behind add D(C, t)^2 kappa_in
    to the kappa of `rows_kernel`.
    """
    bc, i, s, row0, left = place(T, N, m, C, BM, tl.arange(0, BM), tl.arange(0, C))
    rows, E, F = i < m, tl.zeros([C, BM], tl.float32), tl.full([BM], 1.0, tl.float32)
    A += tl.program_id(0).to(tl.int64) * C * C
    if BACKWARD:
        k_in = tl.load(kappa_in + bc * m + i, mask=rows, other=0.0)
    else:
        n = tl.load(n0 + bc * m + i, mask=rows, other=0.0)
    for t in range(tl.minimum(left, C)):
        at = (row0 + t) * m + i
        th = tl.load(theta + at, mask=rows, other=0.0)
        a = 1 - th
        if BACKWARD:
            D = tl.load(suffix + at, mask=rows, other=0.0)
            w = -th * (tl.load(kappa + at, mask=rows, other=0.0) + D * D * k_in)
        else:
            K_t, K_tt = tl.load(K + (bc * C + t) * C + s), tl.load(K + (bc * C + t) * C + t)
            hx = F * tl.load(S + at, mask=rows, other=0.0) + tl.sum(E * K_t[:, None], 0)
            n = tl.maximum(a * a * n + th * (2 * a * hx + th * K_tt), 0.0)
            w = tl.load(phi + at, mask=rows, other=0.0) * tl.rsqrt(n / d + eps)
        E, F = tl.where(s[:, None] == t, th[None, :], E * a[None, :]), F * a
        tl.store(A + t * C + s, tl.sum(E * w[None, :], 1).to(A.dtype.element_ty))
        tl.store(wF + at, (w * F).to(wF.dtype.element_ty), mask=rows)


@jit
def read_kernel(w1, states1, A1, v1, w2, states2, A2, v2, out, T, N, m: constexpr, d: constexpr, C: constexpr, BM: constexpr,
                BD: constexpr, BACKWARD: constexpr, OPERAND: constexpr, PRECISION: constexpr):
    """Forward: y = w1 states1 + A1 v1. BACKWARD: dx = w1 states1 + A1^T v1 + w2 states2 + (A2 + A2^T, diagonal once) v2."""
    bc, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    b, c = bc // N, bc % N
    t, row0, left = tl.arange(0, C), b * T + c * C, T - c * C
    acc, a1, a2 = tl.zeros([C, BD], tl.float32), tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for start in range(0, m, BM):
        i, slab = start + tl.arange(0, BM), (bc * tl.cdiv(m, BM) + start // BM) * C
        acc = dot(tile(w1, row0, t, i, left, m), tile(states1, bc * m, i, e, m, d), acc, OPERAND, PRECISION)
        if BACKWARD:
            acc = dot(tile(w2, row0, t, i, left, m), tile(states2, bc * m, i, e, m, d), acc, OPERAND, PRECISION)
            a1 += tile_T(A1, slab, t, t, left, C)
            a2 += tile_T(A2, slab, t, t, left, C)
            a2 += tl.where(t[:, None] > t[None, :], tile(A2, slab, t, t, left, C), 0.0)
        else:
            a1 += tile(A1, slab, t, t, left, C)
    acc = dot(a1, tile(v1, row0, t, e, left, d), acc, OPERAND, PRECISION)
    if BACKWARD:
        acc = dot(a2, tile(v2, row0, t, e, left, d), acc, OPERAND, PRECISION)
    put(out, row0, t, e, left, d, acc)


# ------------------------------------------------------------------------------------------------------------ backward

@jit
def rows_kernel(theta, phi, S, K, Y, M, n0, q, dphi, kappa, hx_n, kappa_out, A, qF, c_t, eps, T, N, m: constexpr, d: constexpr,
                C: constexpr, BM: constexpr):
    """The forward recurrence again, now with g_t = <h_t, dy_t> from Y = <dy, H> and M_ts = <dy_t, x_s>.
    Gives A, q F and q as before, dphi = r g, hx_n = <h_{t-1}, x_t> - n_{t-1}, kappa as far as the chunk itself makes it, and
    a_1^2 kappa_1. c_t is room for its own use.
    """
    bc, i, s, row0, left = place(T, N, m, C, BM, tl.arange(0, BM), tl.arange(0, C))
    rows, tokens = i < m, tl.minimum(left, C)
    E, F = tl.zeros([C, BM], tl.float32), tl.full([BM], 1.0, tl.float32)
    A += tl.program_id(0).to(tl.int64) * C * C
    n = tl.load(n0 + bc * m + i, mask=rows, other=0.0)
    for t in range(tokens):
        at = (row0 + t) * m + i
        th = tl.load(theta + at, mask=rows, other=0.0)
        a = 1 - th
        K_t, K_tt = tl.load(K + (bc * C + t) * C + s), tl.load(K + (bc * C + t) * C + t)
        hx = F * tl.load(S + at, mask=rows, other=0.0) + tl.sum(E * K_t[:, None], 0)
        tl.store(hx_n + at, hx - n, mask=rows)
        n = tl.maximum(a * a * n + th * (2 * a * hx + th * K_tt), 0.0)
        r = tl.rsqrt(n / d + eps)
        E, F = tl.where(s[:, None] == t, th[None, :], E * a[None, :]), F * a
        g = F * tl.load(Y + at, mask=rows, other=0.0) + tl.sum(E * tl.load(M + (bc * C + t) * C + s)[:, None], 0)
        q_t = tl.load(phi + at, mask=rows, other=0.0) * r
        tl.store(q + at, q_t, mask=rows)
        tl.store(A + t * C + s, tl.sum(E * q_t[None, :], 1).to(A.dtype.element_ty))
        tl.store(qF + at, (q_t * F).to(qF.dtype.element_ty), mask=rows)
        tl.store(dphi + at, r * g, mask=rows)
        tl.store(c_t + at, q_t * r * r * g / d, mask=rows)
    tl.debug_barrier()
    k = tl.zeros([BM], tl.float32)
    for back in range(tokens):
        at = (row0 + tokens - 1 - back) * m + i
        a = 1 - tl.load(theta + at, mask=rows, other=0.0)
        k += tl.load(c_t + at, mask=rows, other=0.0)
        tl.store(kappa + at, k, mask=rows)
        k *= a * a
    tl.store(kappa_out + bc * m + i, k, mask=rows)


@jit
def carry_kernel(kappa_out, keep, kappa_in, first, T, N, m: constexpr, BM: constexpr):
    """What each chunk gets from those behind it: kappa_in of chunk c - 1 = kappa_out_c + keep_c^2 kappa_in_c; first: of none."""
    b, i = tl.program_id(0).to(tl.int64), tl.arange(0, BM)
    k = tl.zeros([BM], tl.float32)
    for j in range(N):
        at = (b * N + N - 1 - j) * m + i
        tl.store(kappa_in + at, k, mask=i < m)
        D = tl.load(keep + at, mask=i < m, other=0.0)
        k = tl.load(kappa_out + at, mask=i < m, other=0.0) + D * D * k
    tl.store(first + b * m + i, k, mask=i < m)


@jit
def theta_kernel(theta, q, kappa, kappa_in, hx_n, S, K, Y, M, Z, HL, suffix, dtheta, T, N, m: constexpr, C: constexpr,
                 BM: constexpr):
    """dtheta_j = <lambda_j, x_j - h_{j-1}> - a_j kappa_j hx_n_j, without a division by a_j.

    lambda_j = D(C, j) L + sum_{u >= j} D(u, j) (q_u dy_u - theta_u kappa_u x_u), so with Z = <x, L> what is needed of
    h_{j-1} are its inner products with L, v = <h_{j-1}, L>, and with the brackets, X_u = <h_{j-1}, q_u dy_u - ... x_u>.
    Both obey eq. 10: they move to those of x_j, Z_j and W_u, by the share theta_j.
    """
    bc, i, u, row0, left = place(T, N, m, C, BM, tl.arange(0, BM), tl.arange(0, C))
    rows, th, wy = i < m, tile(theta, row0, u, i, left, m), tile(q, row0, u, i, left, m)
    k_in, D_C = tl.load(kappa_in + bc * m + i, mask=rows, other=0.0), tile(suffix, row0, u, i, left, m)
    wx, a = -th * (tile(kappa, row0, u, i, left, m) + D_C * D_C * k_in[None, :]), 1 - th
    X = wy * tile(Y, row0, u, i, left, m) + wx * tile(S, row0, u, i, left, m)
    v = tl.load(HL + bc * m + i, mask=rows, other=0.0)
    for j in range(tl.minimum(left, C)):
        at = (row0 + j) * m + i
        D = tl.cumprod(tl.where(u[:, None] > j, a, 1.0), 0)                 # D(u, j) for u >= j
        M_j, K_j = tl.load(M + (bc * C + u) * C + j), tl.load(K + (bc * C + u) * C + j)
        to_W = wy * M_j[:, None] + wx * K_j[:, None] - X
        to_Z = tl.load(Z + at, mask=rows, other=0.0) - v
        D_Cj, th_j = tl.load(suffix + at, mask=rows, other=0.0), tl.load(theta + at, mask=rows, other=0.0)
        grad = D_Cj * to_Z + tl.sum(tl.where(u[:, None] >= j, D * to_W, 0.0), 0)
        k_j = tl.load(kappa + at, mask=rows, other=0.0) + D_Cj * D_Cj * k_in
        grad -= (1 - th_j) * k_j * tl.load(hx_n + at, mask=rows, other=0.0)
        tl.store(dtheta + at, grad, mask=rows)
        X, v = X + th_j[None, :] * to_W, v + th_j * to_Z


# ------------------------------------------------------------------------------------------------------------ one step

@triton.jit
def step_kernel(h, x, rows, theta, phi, y, eps, m: constexpr, d: constexpr, k: constexpr, BK: constexpr, BD: constexpr,
                PART: constexpr, DENSE: constexpr):
    """Eqs. 10 and 11 for one token: of h[b] only the k rows in `rows` (DENSE: all) are read and written, in place.
    A program does PART of them; y [k / PART, B, d] gets what each adds to the read."""
    b, e = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    xb, acc = tl.load(x + b * d + e, mask=e < d, other=0.0).to(tl.float32), tl.zeros([BD], tl.float32)
    for start in range(0, PART, BK):
        i = tl.program_id(1) * PART + start + tl.arange(0, BK)
        chosen = i < k
        row = i.to(tl.int64) if DENSE else tl.load(rows + b * k + i, mask=chosen, other=0).to(tl.int64)
        th = tl.load(theta + b * k + i, mask=chosen, other=0.0)
        p, mask = h + (b * m + row[:, None]) * d + e[None, :], chosen[:, None] & (e < d)[None, :]
        s = tl.load(p, mask=mask, other=0.0)
        s += th[:, None] * (xb[None, :] - s)
        tl.store(p, s, mask=mask)
        q_t = tl.load(phi + b * k + i, mask=chosen, other=0.0) * tl.rsqrt(tl.sum(tl.where(mask, s * s, 0.0), 1) / d + eps)
        acc += tl.sum(q_t[:, None] * s, 0)
    tl.store(y + (tl.program_id(1) * tl.num_programs(0) + b) * d + e, acc.to(y.dtype.element_ty), mask=e < d)


# ----------------------------------------------------------------------------------------------------------- operators

@functools.cache
def tiles(m: int, d: int, dtype: torch.dtype) -> dict:
    """Compile-time numbers for a shape (m a multiple of 16) and x's dtype. Chosen so that on sm_80, sm_89 and sm_90 no
    kernel spills a register or needs more than 99 KB of shared memory, which tests/test_kernel_builds.py asserts."""
    precise, bf16 = dtype == torch.float32, dtype == torch.bfloat16
    C, BM, BD = (32, 32, 32) if precise else (32, 64, 64) if bf16 else (64, 64, 64)
    # fp16 cannot hold kappa, nor TF32 the 24 bits of float32: fp16 is multiplied in TF32, float32 without tensor cores.
    operand = tl.bfloat16 if bf16 and not INTERPRETED else tl.float32       # Triton interprets products of bf16 wrongly
    return dict(C=C, BM=min(BM, triton.next_power_of_2(m)), BD=BD, OPERAND=operand, PRECISION="ieee" if precise else "tf32")


@functools.cache
def launches(m: int, d: int, dtype: torch.dtype) -> dict:
    """Every launch of the scan for a shape: kernel, compile-time arguments and launch options."""
    t = tiles(m, d, dtype)
    small, dots = dict(m=m, C=t["C"], BM=t["BM"], num_warps=4), dict(m=m, d=d, **t, num_warps=4, num_stages=2)
    states = dict(dots, num_warps=4 if t["BM"] == 64 else 8)
    # Token by token: a warp alone needs no barrier, and with chunks of 32 its registers hold the coefficients.
    mix, rows, theta = (1, 1, 2) if t["C"] == 32 else (4, 8, 8)
    return dict(decays=(decays_kernel, small),
                states=(states_kernel, dict(states, BACKWARD=False, num_stages=3)),
                states_back=(states_kernel, dict(states, BACKWARD=True)),
                products=(products_kernel, dict(dots, GRAM=True, ROWDOT=True)),
                products_dy=(products_kernel, dict(dots, GRAM=True, ROWDOT=False)),
                products_L=(products_kernel, dict(dots, GRAM=False, ROWDOT=True)),
                mix=(mix_kernel, dict(small, d=d, BACKWARD=False, num_warps=mix)),
                mix_back=(mix_kernel, dict(small, d=d, BACKWARD=True, num_warps=mix)),
                read=(read_kernel, dict(dots, BACKWARD=False)),
                read_back=(read_kernel, dict(dots, BACKWARD=True, num_warps=8, num_stages=1)),
                rows=(rows_kernel, dict(small, d=d, num_warps=rows)),
                carry=(carry_kernel, dict(m=m, BM=triton.next_power_of_2(m), num_warps=4)),
                theta=(theta_kernel, dict(small, num_warps=theta)))


class Launcher:
    """Launches of `launches` by name, each over the chunks, and blocks of rows or columns, that its kernel divides."""

    def __init__(self, theta: Tensor, x: Tensor):
        (self.B, self.T, self.m), self.d = theta.shape, x.shape[2]
        m, d = int(self.m), int(self.d)                 # SymInts, where the compiler traces other shapes, cannot be cached
        self.launches, t = launches(m, d, x.dtype), tiles(m, d, x.dtype)
        self.C, self.N = t["C"], -(-self.T // t["C"])
        self.MB, self.DB = -(-self.m // t["BM"]), -(-self.d // t["BD"])
        self.low = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        self.grids = {states_kernel: (self.B, self.MB, self.DB), read_kernel: (self.B * self.N, self.DB), carry_kernel: (self.B,)}

    def __call__(self, name: str, *args):
        kernel, options = self.launches[name]
        kernel[self.grids.get(kernel, (self.B * self.N * self.MB,))](*args, self.T, self.N, **options)


def room(run: Launcher, theta: Tensor) -> tuple:
    """Empty tensors for what `common` computes besides hT."""
    B, N, m, new, low = run.B, run.N, run.m, theta.new_empty, dict(dtype=run.low)
    return (torch.empty_like(theta, **low), torch.empty_like(theta), new(B, N, m), new(B, N, m, run.d, **low),
            torch.empty_like(theta), new(B, N, run.C, run.C), new(B, N, m))


def common(run: Launcher, theta, x, h0):
    """What forward and backward begin with: suffix, keep, the states, and the inner products of x with them and itself."""
    hT, (write, suffix, keep, states, S, K, n0) = torch.empty_like(h0), room(run, theta)
    run("decays", theta, write, suffix, keep)
    run("states", write, x, write, x, keep, h0, states, hT)
    run("products", x, x, states, states, S, K, n0)
    return hT, write, suffix, keep, states, S, K, n0


def forward(theta: Tensor, phi: Tensor, x: Tensor, h0: Tensor, eps: float,
            recompute: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scan_triton for m and d in multiples of 16: y, hT and the rest of `common` for the gradient, empty if recompute."""
    theta, phi, x, h0 = (v.contiguous() for v in (theta, phi, x, h0))
    run = Launcher(theta, x)
    with torch.cuda.device_of(x):
        hT, *kept = common(run, theta, x, h0)
        write, suffix, keep, states, S, K, n0 = kept
        y, A, qF = torch.empty_like(x), write.new_empty(run.B * run.N, run.MB, run.C, run.C), torch.empty_like(write)
        run("mix", theta, phi, S, K, n0, suffix, suffix, keep, A, qF, eps)
        run("read", qF, states, A, x, qF, states, A, x, y)
    return y, hT, *(v.new_empty(0) if recompute else v for v in kept)


def backward(theta: Tensor, phi: Tensor, x: Tensor, h0: Tensor, write: Tensor, suffix: Tensor, keep: Tensor, states: Tensor,
             S: Tensor, K: Tensor, n0: Tensor, dy: Tensor, dhT: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of theta, phi, x and h0."""
    theta, phi, x, h0, dy, dhT = (v.contiguous() for v in (theta, phi, x, h0, dy, dhT))
    run = Launcher(theta, x)
    with torch.cuda.device_of(x):
        if not states.numel():
            _, write, suffix, keep, states, S, K, n0 = common(run, theta, x, h0)
        dphi, dtheta, M, kappa_0 = (torch.empty_like(v) for v in (theta, theta, K, h0[..., 0]))
        Y, Z, q, kappa, hx_n = theta.new_empty(5, *theta.shape).unbind()    # what only the kernels need, in few allocations
        HL, kappa_out, kappa_in = keep.new_empty(3, *keep.shape).unbind()
        run("products_dy", dy, x, states, states, Y, M, n0)
        # A and q F for the gradient of the reads, and the like with -theta kappa for that of the writes and norms.
        A, A2 = write.new_empty(2, run.B * run.N, run.MB, run.C, run.C).unbind()
        qF, wF = write.new_empty(2, *write.shape).unbind()
        run("rows", theta, phi, S, K, Y, M, n0, q, dphi, kappa, hx_n, kappa_out, A, qF, dtheta, eps)
        run("carry", kappa_out, keep, kappa_in, kappa_0)
        run("mix_back", theta, phi, S, K, n0, suffix, kappa, kappa_in, A2, wF, eps)
        Ls, dh0, dx = torch.empty_like(states), torch.empty_like(h0), torch.empty_like(x)
        run("states_back", qF, dy, wF, x, keep, dhT, Ls, dh0)
        run("products_L", x, x, Ls, states, Z, M, HL)
        run("read_back", write, Ls, A, dy, wF, states, A2, x, dx)
        run("theta", theta, q, kappa, kappa_in, hx_n, S, K, Y, M, Z, HL, suffix, dtheta)
    return dtheta, dphi, dx, dh0.addcmul_(kappa_0[..., None], h0, value=-1)


# Operators of their own for torch.compile, which takes them as they are; Scan is the same for the rest, in less time.
scan = torch.library.custom_op("fmem::scan", forward, mutates_args=())
scan_backward = torch.library.custom_op("fmem::scan_backward", backward, mutates_args=())


@scan.register_fake
def _(theta, phi, x, h0, eps, recompute):
    theta, x, h0 = (v.new_empty(v.shape) for v in (theta, x, h0))              # contiguous, as all that the kernels get
    return x, h0, *(v.new_empty(0) if recompute else v for v in room(Launcher(theta, x), theta))


@scan_backward.register_fake
def _(theta, phi, x, h0, *rest):
    return tuple(v.new_empty(v.shape) for v in (theta, phi, x, h0))


def save(ctx, inputs, output):
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)                # or the states would get a gradient of zeros


def gradients(ctx, dy, dhT, *_, operator=scan_backward):
    tensors = ctx.saved_tensors
    dy, dhT = (torch.zeros_like(v) if g is None else g for g, v in zip((dy, dhT), tensors[2:4], strict=True))
    return *operator(*tensors, dy, dhT, ctx.eps), None, None


scan.register_autograd(gradients, setup_context=save)


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = forward(*inputs)
        save(ctx, inputs, output)
        return output[:2]

    backward = staticmethod(once_differentiable(functools.partial(gradients, operator=backward)))


# ------------------------------------------------------------------------------------------------- the checked functions

def why_not(device: torch.device, m: int, d: int, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run, in a few words; None if they can."""
    if not INTERPRETED:
        if device.type != "cuda" or not torch.cuda.is_available():
            return "they need an NVIDIA GPU"
        if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
            return f"they need an NVIDIA GPU of the Ampere generation or newer, not {torch.cuda.get_device_name(device)}"
    if m > MAX_M or d > MAX_D:
        return f"they are built for m up to {MAX_M} and d up to {MAX_D}, not {m} and {d}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"they are built for float32, bf16 and fp16, not {dtype}"
    return None


def scan_triton(theta: Tensor, phi: Tensor, x: Tensor, h0: Tensor | None = None, eps: float = 1e-5,
                recompute: bool = False) -> tuple[Tensor, Tensor]:
    """`fmem.scan_loop` by the kernels: same arguments, same results, any T, contiguous or not.

    theta, phi [B, T, m] in [0, 1], m up to 512; x [B, T, d] in float32, bf16 or fp16, d up to 4096; h0 [B, m, d] or None for
    zeros. Returns y [B, T, d] in x's dtype and hT [B, m, d] in float32. Differentiable in all four. Weights, lengths and the
    carried state are float32; with x in bf16 the matrix products are bf16. For the gradient the states before the chunks are
    kept, and the inner products of x with them and with itself (m + C per token); with recompute=True only the inputs.
    Raises ValueError for shapes that do not fit and where the kernels cannot run (see `why_not`).
    """
    (B, T, m), d = theta.shape, x.shape[2]
    if reason := why_not(x.device, m, d, x.dtype):
        raise ValueError(f"the Triton kernels cannot run: {reason}")
    h0 = x.new_zeros(B, m, d, dtype=torch.float32) if h0 is None else h0.float()
    if T == 0 or phi.shape != theta.shape or x.shape[:2] != (B, T) or h0.shape != (B, m, d):
        raise ValueError(f"theta, phi [B, T, m], x [B, T, d] and h0 [B, m, d] do not fit each other: "
                         f"{', '.join(str(tuple(v.shape)) for v in (theta, phi, x, h0))}")
    # Odd shapes are filled up with zeros to multiples of 16, which every load can be aligned to. That changes the mean
    # square of a row by d / width: phi and eps make up for it.
    rows, cols = -m % 16, -d % 16
    if rows or cols:
        theta, phi, x, h0 = F.pad(theta, (0, rows)), F.pad(phi, (0, rows)), F.pad(x, (0, cols)), F.pad(h0, (0, cols, 0, rows))
        phi, eps = phi * (d / (d + cols)) ** 0.5, eps * d / (d + cols)
    run = scan if torch.compiler.is_compiling() else Scan.apply
    y, hT, *_ = run(theta.float(), phi.float(), x, h0, eps, recompute)
    return y[..., :d], hT[:, :m, :d].contiguous()


def step_triton(h: Tensor, x: Tensor, theta: Tensor, phi: Tensor, rows: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """One token, eqs. 10 and 11: changes h [B, m, d] (float32, contiguous) in place and returns y [B, d] in x's dtype.

    theta, phi [B, k] are the weights of the rows [B, k], which must differ within a text; rows None: of all m. Of h only
    these rows are read and written. No gradient. Raises ValueError for a state that cannot be changed in place.
    """
    (B, m, d), k = h.shape, theta.shape[1]
    if h.dtype != torch.float32 or not h.is_contiguous():
        raise ValueError(f"the state must be float32 and contiguous, not {h.dtype} with strides {h.stride()}")
    x, theta, phi, t = x.contiguous(), theta.float().contiguous(), phi.float().contiguous(), step_tiles(B, k, d)
    parts = -(-k // t["PART"])
    y = x.new_empty(parts, B, d, dtype=torch.float32 if parts > 1 else x.dtype)
    with torch.cuda.device_of(x):
        step_kernel[B, parts](h, x, theta if rows is None else rows.contiguous(), theta, phi, y, eps, m=m, d=d, k=k,
                              DENSE=rows is None, **t)
    return y.sum(0).to(x.dtype) if parts > 1 else y[0]


def step_tiles(B: int, k: int, d: int) -> dict:
    """The whole width of a row, as many rows at once as registers hold, and no more warps than have numbers of their own. With
    many rows and few texts they are divided among programs, about 128 in all, or most of the GPU would be idle."""
    BD = max(16, triton.next_power_of_2(d))
    BK = max(1, min(triton.next_power_of_2(k), 8192 // BD))
    turns = -(-k // BK)
    PART = BK * (-(-turns // max(1, 128 // B)) if turns >= 4 else turns)
    return dict(BK=BK, BD=BD, PART=PART, num_warps=max(1, min(8, BK * BD // 1024)))
