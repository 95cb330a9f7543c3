"""Texts without end: the memory of the process stays as it is."""
import itertools
import os
from pathlib import Path

import pytest
import torch

from fmem import FMem, FMemConfig
from tests.helpers import SLOW, error, survived


def resident():
    """Memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def endless_model():
    torch.manual_seed(0)
    return FMem(FMemConfig(vocab_size=300, n_layer=2, d_model=64, n_rows=32, k_rows=8)).eval()


def flat(sizes):
    """By how much the second half is larger than the first, as a share of it. (The peaks: an allocator breathes.)"""
    half = len(sizes) // 2
    return max(sizes[half:]) / max(sizes[:half]) - 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_endless_generation(capsys):
    """A million tokens with FMEM_SLOW, else 3,000: the memory of the process stays as it is, all numbers finite."""
    n, model, sizes = (10**6 if SLOW else 3000), endless_model(), []
    texts, seen = model.generate(torch.zeros(1, 1, dtype=torch.long), n, generator=torch.Generator().manual_seed(0)), set()
    for i in itertools.count():
        try:
            seen.add(next(texts).item())
        except StopIteration as end:
            state = end.value
            break
        if i % (n // 20) == n // 40:                    # the first after a fortieth: caches have been filled
            sizes.append(resident())
    assert i == n and len(seen) > 100 and len(sizes) == 20
    assert all(h.isfinite().all() for h in state) and flat(sizes) < 0.01
    survived("endless_generation", tokens=n, growth_percent=round(100 * flat(sizes), 3), megabytes=sizes[0] >> 20)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_endless_reading():
    """Ten million tokens with FMEM_SLOW, else 100,000, in pieces of 4,096."""
    n, model, sizes, state = (10**7 if SLOW else 10**5), endless_model(), [], None
    g, pieces = torch.Generator().manual_seed(0), 0
    with torch.no_grad():
        for pieces in range(n // 4096 + 1):
            logits, state = model(torch.randint(300, (1, 4096), generator=g), state)
            if pieces >= 5:
                sizes.append(resident())
            assert logits[:, -1].isfinite().all()
    assert all(h.isfinite().all() for h in state) and flat(sizes) < 0.01
    survived("endless_reading", tokens=(pieces + 1) * 4096, growth_percent=round(100 * flat(sizes), 3), megabytes=sizes[0] >> 20)


@pytest.mark.slow
def test_step_and_chunks_agree_after_a_long_text():
    """100,000 tokens with FMEM_SLOW, else 2,000: one at a time and 4,096 at a time, and the same in float64."""
    n, model = (10**5 if SLOW else 2000), endless_model()
    tokens = torch.randint(300, (1, n), generator=torch.Generator().manual_seed(0))
    results = {}
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            state, by_step = None, None
            for piece in tokens.split(4096, 1):
                logits, state = model.to(dtype)(piece, state)
            for token in tokens[0]:
                step, by_step = model(token[None], by_step)
            results[dtype] = logits[:, -1], torch.stack(state), step, torch.stack(by_step)
    chunked, state, step, by_step = results[torch.float32]
    exact, exact_state, exact_step, _ = results[torch.float64]
    assert error(exact_step, exact) < 1e-10             # the two forms are the same to rounding
    # The forget of a memory forgets its rounding errors too, so they do not grow with the length.
    errors = {"logits": error(step, chunked), "state": error(by_step, state), "chunked": error(chunked, exact),
              "step": error(step, exact), "state_exact": error(by_step, exact_state)}
    assert all(e < 1e-5 for e in errors.values()), errors
    survived("step_and_chunks", tokens=n, **{name: float(f"{e:.1e}") for name, e in errors.items()})
