"""What needs an NVIDIA GPU: python -m pytest -k gpu. Skipped elsewhere."""

import pytest
import torch

import fast
from fmem import FMem
from tests.helpers import KERNEL_ERROR, SHIPPED, error, kernel, kernel_errors, needs_gpu, scan_inputs, tiny


@needs_gpu
@pytest.mark.parametrize("dtype, m, d", SHIPPED[:-1])
def test_gpu_kernels_are_the_loop(poisoned, dtype, m, d):
    """Every shipped configuration as compiled for this GPU, all gradients, against float64."""
    for T, sharp, sparse in ((200, 3.0, None), (64, 30.0, None), (129, 3.0, max(1, m // 4))):
        errors = kernel_errors(scan_inputs(T=T, m=m, d=d, sharp=sharp, sparse=sparse), dtype)
        assert all(e < KERNEL_ERROR[dtype] for e in errors), (T, sharp, sparse, errors)


@needs_gpu
def test_gpu_more_than_2_to_the_31_numbers():
    """The last text of a batch with B T d above 2^31 comes out as it does alone."""
    B, T, m, d = 3, 2**20, 16, 1024
    theta, phi = torch.rand(2, B, T, m, device="cuda")
    x = torch.randn(B, T, d, device="cuda", dtype=torch.bfloat16)
    y, hT = kernel.scan_triton(theta, phi, x)
    want_y, want_hT = kernel.scan_triton(theta[2:], phi[2:], x[2:])
    assert torch.equal(y[2:], want_y) and torch.equal(hT[2:], want_hT)


@needs_gpu
def test_gpu_compiled_model_is_the_eager_one():
    model = FMem(tiny(d_model=64, d_memory=64)).cuda()
    tokens = torch.randint(50, (2, 100), device="cuda")
    compiled = torch.compile(model)
    grads = [torch.autograd.grad(form(tokens)[0].square().mean(), list(model.parameters())) for form in (model, compiled)]
    assert all(error(g, w) < 1e-4 for g, w in zip(*grads, strict=True))     # float32, fused in another order


@needs_gpu
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_gpu_generation_from_a_graph_is_the_eager_one(temperature, monkeypatch):
    model, tokens = FMem(tiny()).cuda().eval(), torch.randint(50, (3, 9), device="cuda")

    def run():
        g = torch.Generator("cuda").manual_seed(1)
        return torch.stack(list(model.generate(tokens, 50, temperature, generator=g)))

    graph = run()
    monkeypatch.setattr(fast, "capture_step", lambda *a: None)
    assert torch.equal(graph, run())
