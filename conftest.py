"""Fixtures: the same random numbers for every test, a small prepared corpus, a small run, recall runs."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")           # before torch: tiny tensors gain nothing from a second thread

os.environ.setdefault("FMEM_CHECK", "0")                # before fast: seconds in the interpreter; test_check.py does it

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")      # before anything imports Triton: the kernels run on the CPU, slowly

import fast
import train as train_py
from data import prepare, recall
from tests.helpers import settings, some_text
from tests.test_kernel_builds import start_builds


def pytest_collection_modifyitems(items):
    """What is compiled in the background (`builds`) is looked at last."""
    items.sort(key=lambda item: item.name.startswith("test_kernels_compile"))


@pytest.fixture(scope="session", autouse=True)
def builds(request, tmp_path_factory):
    """The process that compiles the kernels, if a test asks for it, and the folder of its output."""
    process, folder = None, tmp_path_factory.mktemp("builds")
    if any(item.name.startswith("test_kernels_compile") for item in request.session.items):
        process = start_builds(folder)
    yield process, folder
    if process:
        process.kill()


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in a test whether it runs alone or after others."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """What torch.empty and its like return is full of NaN: an output that is not written is noticed."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def fresh_choice():
    fast.no_kernel.cache_clear()
    yield
    fast.no_kernel.cache_clear()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small prepared folder."""
    out = tmp_path_factory.mktemp("data") / "corpus"
    documents = {f"doc{i}": some_text(700, seed=i) for i in range(12)}
    prepare.prepare(out, documents, corpus="a test corpus", vocab_size=300)
    return out


@pytest.fixture(scope="session")
def run20(corpus, tmp_path_factory):
    """A run of 20 steps that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, train_py.train(settings(corpus, out))


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 on a CPU needs a newer PyTorch")
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "group").as_uri(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def recall_runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("recall")
    for task in recall.TASKS:
        train_py.train(settings(task, out / task, context=32, max_steps=4, eval_every=4, k_rows=2))
    return out
