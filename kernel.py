"""Triton kernels for the memory: the scan, forward and backward, on NVIDIA GPUs from Ampere on (a step: fast/step_gpu.py).

What is fused. A loop over the tokens moves the whole memory [m, d] for every token: 2 m d numbers. Here a chunk of C = 32 or 64
tokens moves it a fixed number of times (once written, twice read in the forward pass), x is read three times, y written once.
All else does not grow with d and is small. With B 8, T 4096, m 64, d 1024 in bf16 that is 0.6 GB instead of 17 GB.

How. Inside a chunk with start state H, every row is H times a number plus a combination of the chunk's inputs,

    h_t = F_t H + sum_{s <= t} E_t[s] x_s,      F_t = a_t F_{t-1},      E_t[s] = a_t E_{t-1}[s] for s < t,  E_t[t] = theta_t

with a = 1 - theta: C + 1 coefficients per row instead of d numbers. Given the inner products of the x_s with each other
(K) and with H (S), eq. 10, the norm and eq. 11 can be run on the coefficients, token by token, in registers:

    <h_{t-1}, x_t> = F_{t-1} S_t + sum_s E_{t-1}[s] K_ts            n_t = a^2 n_{t-1} + 2 a theta <h_{t-1}, x_t> + theta^2 K_tt
    y_t = sum_i q_t F_t H + sum_s A_ts x_s,      A_ts = sum_i q_t E_t[s],      q_t = phi_t / sqrt(n_t / d + eps)

So it is done in sub-chunks of SUB tokens. What was written before one all decays alike, E_t[s] = D(t, n) E_n[s], where D(t, s)
is the product of a from s + 1 to t, and has its part in <h, x> and A by products of 16 x 16 numbers. No logarithm, no division:
exact for every theta from 0 to 1. The gradients are those of `chunked_backward` in fast/chunked.py, without its division by a_t.

Symbols are those of fmem.py, x short for xbar; a sub-chunk is named by its first token n, and ends before token e. Kernels get
pointers to contiguous tensors; T and N = T / C are run-time numbers, shapes m and d and the tiles C, BM, BD are compiled in. One
program does one chunk of one text and BM rows (or BD columns). Tokens after T load as theta = phi = x = 0, which changes nothing.
Never feed a transposed dot result from registers into another dot: some Triton releases miscompile that on Hopper. What is
needed transposed is loaded transposed. No kernel loads an address that it has stored, except behind a barrier: several threads
may hold copies of a small tensor, and a late one would load what an early one has stored. This file imports nothing of ours, and
raises where it cannot run; fast/__init__.py chooses.
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
SUB: constexpr = constexpr(16)                              # tokens of a sub-chunk: the smallest side of a product
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
def place(T, N, m: constexpr, C: constexpr, BM: constexpr, rows):
    """A program's chunk, counted over all texts; its block of rows; the chunk's first token; tokens left from there on.
    Programs of one chunk follow each other: its x is still in the L2 cache."""
    blocks: constexpr = (m + BM - 1) // BM
    bc, im = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, c = (bc // N).to(tl.int64), bc % N
    return bc.to(tl.int64), im * BM + rows, b * T + c * C, T - c * C


@triton.jit
def dot(a, b, acc, OPERAND: constexpr, PRECISION: constexpr):
    return tl.dot(a.to(OPERAND), b.to(OPERAND), acc, input_precision=PRECISION)


# ------------------------------------------------------------------------------------------------------------- forward

@jit
def decays_kernel(theta, write, near, keep, sub, T, N, m: constexpr, C: constexpr, BM: constexpr):
    """write_s = theta_s D(C, s) and keep = D(C, 0) of each chunk, for H' = keep H + write^T x; near and sub of each sub-chunk."""
    bc, i, row0, left = place(T, N, m, C, BM, tl.arange(0, BM))
    u, D = tl.arange(0, SUB), tl.full([BM], 1.0, tl.float32)
    for back in range(C // SUB):
        n = C - (back + 1) * SUB
        th = tile(theta, row0 + n, u, i, left - n, m)
        after = tile(theta, row0 + n + 1, u, i, tl.minimum(left - n, SUB) - 1, m)       # theta of the token behind
        D_e = tl.cumprod(1 - after, 0, reverse=True)
        put(near, row0 + n, u, i, left - n, m, th * D_e)
        put(write, row0 + n, u, i, left - n, m, th * D_e * D[None, :])
        P = tl.sum(tl.where(u[:, None] == 0, (1 - th) * D_e, 0.0), 0)                   # the first row of it
        tl.store(sub + (bc * (C // SUB) + n // SUB) * m + i, P, mask=i < m)
        D *= P
    tl.store(keep + bc * m + i, D, mask=i < m)


@jit
def states_kernel(w1, v1, w2, v2, keep, first, states, last, T, N, m: constexpr, d: constexpr, C: constexpr, BM: constexpr,
                  BD: constexpr, BACKWARD: constexpr, OPERAND: constexpr, PRECISION: constexpr):
    """S <- keep S + w1^T v1, chunk after chunk from `first` on: stores S before each chunk, and the last one.
    BACKWARD: from the last chunk to the first, with a second pair, + w2^T v2. S stays in float32.
    """
    b, i, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(2) * BD + tl.arange(0, BD)
    t, c = tl.arange(0, C), N - 1 if BACKWARD else 0
    S, decay = tile(first, b * m, i, e, m, d), tl.load(keep + (b * N + c) * m + i, mask=i < m, other=0.0)
    for j in range(N):
        row0, left = b * T + c * C, T - c * C
        put(states, (b * N + c) * m, i, e, m, d, S)
        S *= decay[:, None]
        c += -1 if BACKWARD else 1
        decay = tl.load(keep + (b * N + c) * m + i, mask=i < tl.where(j < N - 1, m, 0), other=0.0)      # no chunk waits for it
        S = dot(tile_T(w1, row0, t, i, left, m), tile(v1, row0, t, e, left, d), S, OPERAND, PRECISION)
        if BACKWARD:
            S = dot(tile_T(w2, row0, t, i, left, m), tile(v2, row0, t, e, left, d), S, OPERAND, PRECISION)
    put(last, b * m, i, e, m, d, S)


@jit
def products_kernel(v, x, states, states2, S, K, rowdot, T, N, m: constexpr, d: constexpr, C: constexpr, BM: constexpr,
                    BD: constexpr, GRAM: constexpr, ROWDOT: constexpr, OPERAND: constexpr, PRECISION: constexpr):
    """Inner products of each chunk: S = v states^T; GRAM: K = v x^T; ROWDOT: <states[i], states2[i]> of each row."""
    bc, i, row0, left = place(T, N, m, C, BM, tl.arange(0, BM))
    t = tl.arange(0, C)
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


@triton.jit
def before(S, K, near, sub, F, bc, row0, left, n, i, m: constexpr, C: constexpr, EXACT: constexpr):
    """<h_n, v_t> for the tokens t of the sub-chunk n, from S_t = <H, v_t>, K_ts = <v_t, x_s> and F = D(n, 0)."""
    u, D = tl.arange(0, SUB), tl.full(i.shape, 1.0, tl.float32)
    acc = tile(S, row0 + n, u, i, left - n, m) * F[None, :]
    for back in range(n // SUB):
        s = n - SUB - back * SUB
        E = tile(near, row0 + s, u, i, left - s, m) * D[None, :]
        acc = tl.dot(tile(K, bc * C + n, u, s + u, SUB, C), E, acc, input_precision=EXACT)
        D *= tl.load(sub + (bc * (C // SUB) + s // SUB) * m + i, mask=i < m, other=0.0)
    return acc


@triton.jit
def across(A, wF, wP, near, sub, F, bc, row0, left, n, i, m: constexpr, C: constexpr, EXACT: constexpr):
    """The end of a sub-chunk: A_ts = sum_i w_t E_t[s] for its tokens t and all s before it, and w_t F_t, from w_t D(t, n)."""
    u, D = tl.arange(0, SUB), tl.full(i.shape, 1.0, tl.float32)
    tl.debug_barrier()
    w = tile(wP, row0 + n, u, i, left - n, m)
    put(wF, row0 + n, u, i, left - n, m, w * F[None, :])
    for back in range(n // SUB):
        s = n - SUB - back * SUB
        E_T = tile_T(near, row0 + s, u, i, left - s, m) * D[:, None]
        put(A, n, u, s + u, SUB, C, tl.dot(w, E_T, input_precision=EXACT))
        D *= tl.load(sub + (bc * (C // SUB) + s // SUB) * m + i, mask=i < m, other=0.0)


@jit
def mix_kernel(theta, phi, S, K, n0, near, sub, S_n, qP, A, qF, Y, M, Y_n, q, dphi, c, hx_l, kappa_out, eps, T, N, m: constexpr,
               d: constexpr, C: constexpr, BM: constexpr, GRADIENT: constexpr, EXACT: constexpr):
    """The recurrence on the coefficients: A_ts = sum_i q_t E_t[s] (over BM rows: one A per group of rows), q_t F_t, q_t D(t, n)
    and S_n, S with the state before each sub-chunk. GRADIENT: again, with g_t = <h_t, dy_t> from Y = <dy, H>, M_ts = <dy_t, x_s>:
    q, Y_n, dphi = r g, hx_l = <h_{t-1}, x_t> - n_{t-1}, c, the token's own part of kappa, the chunk's part of a_1^2 kappa_1."""
    bc, i, row0, left = place(T, N, m, C, BM, tl.arange(0, BM))
    u, rows, F = tl.arange(0, SUB), i < m, tl.full([BM], 1.0, tl.float32)
    A += tl.program_id(0).to(tl.int64) * C * C
    length, k = tl.load(n0 + bc * m + i, mask=rows, other=0.0), tl.zeros([BM], tl.float32)
    for n in range(0, tl.minimum(left, C), SUB):
        put(S_n, row0 + n, u, i, left - n, m, before(S, K, near, sub, F, bc, row0, left, n, i, m, C, EXACT))
        if GRADIENT:
            put(Y_n, row0 + n, u, i, left - n, m, before(Y, M, near, sub, F, bc, row0, left, n, i, m, C, EXACT))
        tl.debug_barrier()
        # Zeros, held by the threads as a loaded tile is: half the work for sums over its rows and its columns.
        E, P = 0.0 * tile(near, row0 + n, u, i, left - n, m), tl.full([BM], 1.0, tl.float32)
        for t in range(tl.minimum(left - n, SUB)):
            at, row = (row0 + n + t) * m + i, (bc * C + n + t) * C + n
            th = tl.load(theta + at, mask=rows, other=0.0)
            a = 1 - th
            hx = P * tl.load(S_n + at, mask=rows, other=0.0) + tl.sum(E * tl.load(K + row + u)[:, None], 0)
            if GRADIENT:
                tl.store(hx_l + at, hx - length, mask=rows)
            length = tl.maximum(a * a * length + th * (2 * a * hx + th * tl.load(K + row + t)), 0.0)
            r = tl.rsqrt(length / d + eps)
            q_t = tl.load(phi + at, mask=rows, other=0.0) * r
            E, P = tl.where(u[:, None] == t, th[None, :], E * a[None, :]), P * a
            tl.store(A + (n + t) * C + n + u, tl.sum(E * q_t[None, :], 1).to(A.dtype.element_ty))
            tl.store(qP + at, q_t * P, mask=rows)
            if GRADIENT:
                g = P * tl.load(Y_n + at, mask=rows, other=0.0) + tl.sum(E * tl.load(M + row + u)[:, None], 0)
                c_t, F_t = q_t * r * r * g / d, F * P
                k += F_t * F_t * c_t
                tl.store(q + at, q_t, mask=rows)
                tl.store(dphi + at, r * g, mask=rows)
                tl.store(c + at, c_t, mask=rows)
        across(A, qF, qP, near, sub, F, bc, row0, left, n, i, m, C, EXACT)
        F *= P
    if GRADIENT:
        tl.store(kappa_out + bc * m + i, k, mask=rows)


@jit
def read_kernel(w1, states1, A1, v1, w2, states2, A2, v2, out, T, N, m: constexpr, d: constexpr, C: constexpr, BM: constexpr,
                BR: constexpr, BD: constexpr, BACKWARD: constexpr, OPERAND: constexpr, PRECISION: constexpr):
    """Forward: y = w1 states1 + A1 v1. BACKWARD: dx = w1 states1 + A1^T v1 + w2 states2 + (A2 + A2^T, diagonal once) v2."""
    bc, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    b, c = bc // N, bc % N
    t, row0, left = tl.arange(0, C), b * T + c * C, T - c * C
    acc, a1, a2 = tl.zeros([C, BD], tl.float32), tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for start in range(0, m, BM):
        i = start + tl.arange(0, BM)
        acc = dot(tile(w1, row0, t, i, left, m), tile(states1, bc * m, i, e, m, d), acc, OPERAND, PRECISION)
        if BACKWARD:
            acc = dot(tile(w2, row0, t, i, left, m), tile(states2, bc * m, i, e, m, d), acc, OPERAND, PRECISION)
    below = t[:, None] >= t[None, :]                                        # what is above was not stored
    for slab in range(bc * tl.cdiv(m, BR) * C, (bc + 1) * tl.cdiv(m, BR) * C, C):
        if BACKWARD:
            a1 += tl.where(t[:, None] <= t[None, :], tile_T(A1, slab, t, t, left, C), 0.0)
            a2 += tl.where(below, tile(A2, slab, t, t, left, C), tile_T(A2, slab, t, t, left, C))
        else:
            a1 += tl.where(below, tile(A1, slab, t, t, left, C), 0.0)
    acc = dot(a1, tile(v1, row0, t, e, left, d), acc, OPERAND, PRECISION)
    if BACKWARD:
        acc = dot(a2, tile(v2, row0, t, e, left, d), acc, OPERAND, PRECISION)
    put(out, row0, t, e, left, d, acc)


# ------------------------------------------------------------------------------------------------------------ backward

@jit
def mix_back_kernel(theta, c, kappa_out, keep, near, sub, kappa, kappa_0, wP, A, wF, T, N, m: constexpr, C: constexpr,
                    BM: constexpr, EXACT: constexpr):
    """kappa_t = c_t + a_{t+1}^2 kappa_{t+1}, from what all chunks behind this one leave over, to kappa_0, that of the first
    state; then as above with w_t = -theta_t kappa_t."""
    bc, i, row0, left = place(T, N, m, C, BM, tl.arange(0, BM))
    u, rows, F = tl.arange(0, SUB), i < m, tl.full([BM], 1.0, tl.float32)
    A += tl.program_id(0).to(tl.int64) * C * C
    k, D, behind, tokens = 0.0 * F, F, N - 1 - (bc % N).to(tl.int32), tl.minimum(left, C)
    for j in range(0, behind, SUB):                     # SUB chunks at a time: kappa_out, decayed by the chunks before it
        a = tl.where((j + u)[:, None] == 0, 1.0, tile(keep, bc, j + u, i, behind, m))
        E = D[None, :] * tl.cumprod(a * a, 0)
        k += tl.sum(E * tile(kappa_out, bc + 1, j + u, i, behind, m), 0)
        D = tl.sum(tl.where(u[:, None] == SUB - 1, E, 0.0), 0)
    for back in range(tokens):
        at = (row0 + tokens - 1 - back) * m + i
        a = 1 - tl.load(theta + at, mask=rows, other=0.0)
        k += tl.load(c + at, mask=rows, other=0.0)
        tl.store(kappa + at, k, mask=rows)
        k *= a * a
    tl.store(kappa_0 + bc // N * m + i, k, mask=i < tl.where(behind == N - 1, m, 0))
    tl.debug_barrier()
    for n in range(0, tokens, SUB):
        E, P = 0.0 * tile(near, row0 + n, u, i, left - n, m), tl.full([BM], 1.0, tl.float32)
        for t in range(tl.minimum(left - n, SUB)):
            at = (row0 + n + t) * m + i
            th = tl.load(theta + at, mask=rows, other=0.0)
            a, w = 1 - th, -th * tl.load(kappa + at, mask=rows, other=0.0)
            E, P = tl.where(u[:, None] == t, th[None, :], E * a[None, :]), P * a
            tl.store(A + (n + t) * C + n + u, tl.sum(E * w[None, :], 1).to(A.dtype.element_ty))
            tl.store(wP + at, w * P, mask=rows)
        across(A, wF, wP, near, sub, F, bc, row0, left, n, i, m, C, EXACT)
        F *= P


@jit
def theta_kernel(theta, q, kappa, hx_l, S, K, Y, M, S_n, Y_n, qP, wP, Z, HL, near, sub, dtheta, T, N, m: constexpr, C: constexpr,
                 BM: constexpr, EXACT: constexpr):
    """dtheta_j = <lambda_j, x_j - h_{j-1}> - a_j kappa_j hx_l_j, without a division by a_j. With L, what comes in from e on,
    lambda_j = D(e, j) L + sum_{u >= j} D(u, j) (q_u dy_u - theta_u kappa_u x_u). Needed of h_{j-1} are its inner products with L,
    v, and with the brackets, X_u. They obey eq. 10, and move to those of x_j, Z_j = <x_j, L> and W_u, by the share theta_j.
    From the last sub-chunk to the first, Z (in place) and hl = <H, L> go over from the L of e to that of n."""
    bc, i, row0, left = place(T, N, m, C, BM, tl.arange(0, BM))
    u, rows, hl = tl.arange(0, SUB), i < m, tl.load(HL + bc * m + i, mask=i < m, other=0.0)
    last = (tl.minimum(left, C) - 1) // SUB
    for back in range(last + 1):
        n = (last - back) * SUB
        P = tl.load(sub + (bc * (C // SUB) + n // SUB) * m + i, mask=i < m, other=0.0)
        y_P, x_P = tile(qP, row0 + n, u, i, left - n, m), tile(wP, row0 + n, u, i, left - n, m)
        v, D = tl.zeros([BM], tl.float32), tl.full([BM], 1.0, tl.float32)
        for earlier in range(n // SUB):
            s = n - SUB - earlier * SUB
            Z_s = tile(Z, row0 + s, u, i, left - s, m)
            v += D * tl.sum(tile(near, row0 + s, u, i, left - s, m) * Z_s, 0)
            D *= tl.load(sub + (bc * (C // SUB) + s // SUB) * m + i, mask=i < m, other=0.0)
            Z_s = tl.dot(tile_T(M, bc * C + n, u, s + u, SUB, C), y_P, Z_s * P[None, :], input_precision=EXACT)
            Z_s = tl.dot(tile_T(K, bc * C + n, u, s + u, SUB, C), x_P, Z_s, input_precision=EXACT)
            put(Z, row0 + s, u, i, left - s, m, Z_s)
        v += D * hl
        hl = P * hl + tl.sum(y_P * tile(Y, row0 + n, u, i, left - n, m) + x_P * tile(S, row0 + n, u, i, left - n, m), 0)
        tl.debug_barrier()
        th, wy = tile(theta, row0 + n, u, i, left - n, m), tile(q, row0 + n, u, i, left - n, m)
        wx, a = -th * tile(kappa, row0 + n, u, i, left - n, m), 1 - th
        X = wy * tile(Y_n, row0 + n, u, i, left - n, m) + wx * tile(S_n, row0 + n, u, i, left - n, m)
        for j in range(tl.minimum(left - n, SUB)):
            at, col = (row0 + n + j) * m + i, (bc * C + n + u) * C + n + j
            D_u = tl.cumprod(tl.where(u[:, None] > j, a, 1.0), 0)               # D(u, j) for u >= j
            to_W = wy * tl.load(M + col)[:, None] + wx * tl.load(K + col)[:, None] - X
            to_Z = tl.load(Z + at, mask=rows, other=0.0) - v
            D_ej, th_j = tl.sum(tl.where(u[:, None] == SUB - 1, D_u, 0.0), 0), tl.load(theta + at, mask=rows, other=0.0)
            grad = D_ej * to_Z + tl.sum(tl.where(u[:, None] >= j, D_u * to_W, 0.0), 0)
            grad -= (1 - th_j) * tl.load(kappa + at, mask=rows, other=0.0) * tl.load(hx_l + at, mask=rows, other=0.0)
            tl.store(dtheta + at, grad, mask=rows)
            X, v = X + th_j[None, :] * to_W, v + th_j * to_Z


# ----------------------------------------------------------------------------------------------------------- operators

@functools.cache
def tiles(m: int, d: int, dtype: torch.dtype) -> dict:
    """Compile-time numbers for a shape (m a multiple of 16) and x's dtype; BR is BM for what goes token by token. Next to no
    kernel spills registers, none needs more than 99 KB of shared memory, which tests/test_kernel_builds.py asserts."""
    size, bf16 = 32 if dtype == torch.float32 else 64, dtype == torch.bfloat16
    # fp16 cannot hold kappa, nor TF32 the 24 bits of float32: fp16 is multiplied in TF32, float32 without tensor cores.
    operand = tl.bfloat16 if bf16 and not INTERPRETED else tl.float32       # Triton interprets products of bf16 wrongly
    BM, BR = (min(n, triton.next_power_of_2(m)) for n in (size, 32))
    return dict(C=size, BM=BM, BR=BR, BD=size, OPERAND=operand, PRECISION="ieee" if size == 32 else "tf32")


@functools.cache
def launches(m: int, d: int, dtype: torch.dtype) -> dict:
    """Every launch of the scan for a shape: kernel, compile-time arguments and launch options."""
    t = tiles(m, d, dtype)
    dots = dict(m=m, d=d, **{k: v for k, v in t.items() if k != "BR"}, num_warps=4, num_stages=2)
    states = dict(dots, num_warps=4 if t["BM"] == 64 else 8)
    few = dict(dots, BM=16, BD=32, num_stages=3)
    serial = dict(m=m, C=t["C"], BM=t["BR"], num_warps=1)           # a single warp waits for no other
    exact = dict(serial, EXACT="ieee" if dtype == torch.float32 else "tf32x3")
    return dict(decays=(decays_kernel, serial),
                states=(states_kernel, dict(states, BACKWARD=False, num_stages=3)),
                states_back=(states_kernel, dict(states, BACKWARD=True)),
                few_states=(states_kernel, dict(few, BACKWARD=False)),
                few_states_back=(states_kernel, dict(few, BACKWARD=True)),
                products=(products_kernel, dict(dots, GRAM=True, ROWDOT=True)),
                products_dy=(products_kernel, dict(dots, GRAM=True, ROWDOT=False)),
                products_L=(products_kernel, dict(dots, GRAM=False, ROWDOT=True)),
                mix=(mix_kernel, dict(exact, d=d, GRADIENT=False)),
                read=(read_kernel, dict(dots, BR=t["BR"], BACKWARD=False)),
                read_back=(read_kernel, dict(dots, BR=t["BR"], BACKWARD=True, num_warps=8, num_stages=1)),
                rows=(mix_kernel, dict(exact, d=d, GRADIENT=True)),
                mix_back=(mix_back_kernel, exact),
                theta=(theta_kernel, exact))


class Launcher:
    """Launches of `launches` by name, each over the chunks, and blocks of rows or columns, that its kernel divides."""

    def __init__(self, theta: Tensor, x: Tensor):
        (self.B, self.T, self.m), self.d = theta.shape, x.shape[2]
        m, d = int(self.m), int(self.d)                 # SymInts, where the compiler traces other shapes, cannot be cached
        self.launches, t = launches(m, d, x.dtype), tiles(m, d, x.dtype)
        self.C, self.N = t["C"], -(-self.T // t["C"])
        self.MB, self.MR, self.DB = (-(-n // size) for n, size in ((self.m, t["BM"]), (self.m, t["BR"]), (self.d, t["BD"])))
        self.low = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        self.grids = {read_kernel: (self.B * self.N, self.DB), products_kernel: (self.B * self.N * self.MB,)}

    @property
    def few(self):                                      # Few long texts are few programs; with smaller tiles they are more.
        return "few_" if self.N > 4 and self.B * self.MB * self.DB <= 32 else ""

    def __call__(self, name: str, *args):
        kernel, o = self.launches[name]
        states = self.B, -(-self.m // o["BM"]), -(-self.d // o.get("BD", 1))
        grid = states if kernel is states_kernel else self.grids.get(kernel, (self.B * self.N * self.MR,))
        kernel[grid](*args, self.T, self.N, **o)


def room(run: Launcher, theta: Tensor) -> tuple:
    """Empty tensors for what `common` computes besides hT."""
    B, N, m, new, low = run.B, run.N, run.m, theta.new_empty, dict(dtype=run.low)
    return (torch.empty_like(theta, **low), torch.empty_like(theta), new(B, N, m), new(B, N, run.C // SUB.value, m),
            new(B, N, m, run.d, **low), torch.empty_like(theta), new(B, N, run.C, run.C), new(B, N, m))


def common(run: Launcher, theta, x, h0):
    """What forward and backward begin with: decays, the states, and the inner products of x with them and itself."""
    hT, (write, near, keep, sub, states, S, K, n0) = torch.empty_like(h0), room(run, theta)
    run("decays", theta, write, near, keep, sub)
    run(run.few + "states", write, x, write, x, keep, h0, states, hT)
    run("products", x, x, states, states, S, K, n0)
    return hT, write, near, keep, sub, states, S, K, n0


def forward(theta: Tensor, phi: Tensor, x: Tensor, h0: Tensor, eps: float, recompute: bool
            ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scan_triton for m and d in multiples of 16: y, hT and the rest of `common` for the gradient, empty if recompute."""
    theta, phi, x, h0 = (v.contiguous() for v in (theta, phi, x, h0))
    run = Launcher(theta, x)
    with torch.cuda.device_of(x):
        hT, *kept = common(run, theta, x, h0)
        write, near, _, sub, states, S, K, n0 = kept
        y, A, qF = torch.empty_like(x), write.new_empty(run.B * run.N, run.MR, run.C, run.C), torch.empty_like(write)
        S_n, qP = theta.new_empty(2, *theta.shape).unbind()
        run("mix", theta, phi, S, K, n0, near, sub, S_n, qP, A, qF, *8 * [S], eps)
        run("read", qF, states, A, x, qF, states, A, x, y)
    return y, hT, *(v.new_empty(0) if recompute else v for v in kept)


def backward(theta: Tensor, phi: Tensor, x: Tensor, h0: Tensor, write: Tensor, near: Tensor, keep: Tensor, sub: Tensor,
             states: Tensor, S: Tensor, K: Tensor, n0: Tensor, dy: Tensor, dhT: Tensor, eps: float
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of theta, phi, x and h0."""
    theta, phi, x, h0, dy, dhT = (v.contiguous() for v in (theta, phi, x, h0, dy, dhT))
    run = Launcher(theta, x)
    with torch.cuda.device_of(x):
        if not states.numel():
            _, write, near, keep, sub, states, S, K, n0 = common(run, theta, x, h0)
        dphi, dtheta, M, kappa_0 = (torch.empty_like(v) for v in (theta, theta, K, h0[..., 0]))
        Y, Z, q, kappa, hx_l, S_n, Y_n, qP, wP = theta.new_empty(9, *theta.shape).unbind()     # few allocations
        HL, kappa_out = keep.new_empty(2, *keep.shape).unbind()
        run("products_dy", dy, x, states, states, Y, M, n0)
        # A and q F for the gradient of the reads, and the like with -theta kappa for that of the writes and norms.
        A, A2 = write.new_empty(2, run.B * run.N, run.MR, run.C, run.C).unbind()
        qF, wF = write.new_empty(2, *write.shape).unbind()
        run("rows", theta, phi, S, K, n0, near, sub, S_n, qP, A, qF, Y, M, Y_n, q, dphi, dtheta, hx_l, kappa_out, eps)
        run("mix_back", theta, dtheta, kappa_out, keep, near, sub, kappa, kappa_0, wP, A2, wF)     # dtheta is still room for c
        Ls, dh0, dx = torch.empty_like(states), torch.empty_like(h0), torch.empty_like(x)
        run(run.few + "states_back", qF, dy, wF, x, keep, dhT, Ls, dh0)
        run("products_L", x, x, Ls, states, Z, M, HL)
        run("read_back", write, Ls, A, dy, wF, states, A2, x, dx)
        run("theta", theta, q, kappa, hx_l, S, K, Y, M, S_n, Y_n, qP, wP, Z, HL, near, sub, dtheta)
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


# -------------------------------------------------------------------------------------------------- the checked function

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
    carried state are float32; with x in bf16 the products that grow with d are bf16. For the gradient the states before the
    chunks are kept, and a few numbers for each token and row; with recompute=True only the inputs.
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
