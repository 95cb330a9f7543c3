"""Shared by the tests: a small prepared corpus, a small finished run, a fixed random seed."""

import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny tensors gain nothing from two

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

SENTENCE = "the river of a king runs to sea and in it his ship was lost, so said she when I asked"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that are marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: python -m pytest --slow runs it"))


@pytest.fixture(autouse=True)
def seeded():
    """A test gets the same random numbers whether it runs alone or after others."""
    torch.manual_seed(0)


def words(count, seed):
    """A text of `count` random words from SENTENCE."""
    rng = random.Random(seed)
    choices = SENTENCE.split()
    return " ".join(rng.choice(choices) + rng.choice(["", "", ",", ".\n"]) for _ in range(count))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small prepared folder."""
    from data import prepare

    folder = tmp_path_factory.mktemp("data") / "corpus"
    documents = {f"document{i}": words(700, seed=i) for i in range(12)}
    prepare.prepare(folder, documents, corpus="a test corpus", vocab_size=300)
    return folder


@pytest.fixture(scope="session")
def small(corpus):
    """Settings for a run that takes a second."""
    model = dict(n_layer=1, d_model=16, n_rows=8, k_rows=2, dropout=0.1, context=24)
    steps = dict(batch_size=4, max_steps=20, warmup=2, lr=4e-3)
    every = dict(eval_every=5, eval_tokens=100, log_every=1)
    return {"data": str(corpus), "device": "cpu", **model, **steps, **every}


@pytest.fixture(scope="session")
def run(small, tmp_path_factory):
    """The folder of a finished run, with last.pt, best.pt and log.csv."""
    import train

    folder = tmp_path_factory.mktemp("runs") / "out"
    train.train({**small, "out": str(folder)})
    return folder
