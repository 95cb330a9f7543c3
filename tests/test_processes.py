"""Several processes: the losses of one, the model whole in each or split, and what happens when one dies."""
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import train as train_py
from fmem import FMem
from tests.helpers import error, finished, like, parent, settings, survived, tiny, together, torchrun
from training import sharded
from training.checkpoint import load_checkpoint


def test_fsdp_says_what_is_wrong(corpus, run20, tmp_path):
    with pytest.raises(ValueError, match="start them with torchrun"):
        train_py.train(settings(corpus, tmp_path / "out", fsdp=True))
    shutil.copytree(run20[0], tmp_path / "run")
    with pytest.raises(ValueError, match="was begun without --fsdp"):
        train_py.train({"out": str(tmp_path / "run"), "resume": True, "fsdp": True})


def test_split_gradients_add_up_in_float32(alone):
    """In bf16 the matrices and the gradients of one part are bf16; their sum over parts and processes is not."""
    torch.manual_seed(0)
    model = sharded.shard(FMem(tiny(n_layer=1)), torch.device("cpu"), torch.bfloat16)
    for i in range(2):
        model.set_requires_gradient_sync(i == 1)
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randint(50, (2, 20)))[0].square().sum().backward()
    grad = model.blocks[0].mlp.W_up.weight.grad.full_tensor()
    assert grad.dtype == torch.float32 and not torch.equal(grad, grad.bfloat16().float())


@pytest.mark.parametrize("n, options", [(2, []), (4, []), (2, ["--fsdp"]), (4, ["--fsdp", "--micro_batch", 1]),
                                        (2, ["--fsdp", "--dtype", "bf16"])])
def test_processes_train_like_one(n, options, corpus, tmp_path):
    """2 and 4 processes, the model whole in each of them or split over them, have the losses and weights of one process."""
    if options and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 on a CPU needs a newer PyTorch")
    given = settings(corpus, tmp_path / "one", max_steps=6, eval_every=3, dropout=0.0, batch_size=8, d_memory=24)
    processes = together(n, tmp_path / "n", given, *options)
    one = train_py.train({**given, "dtype": "bf16" if "bf16" in options else "float32"})
    for code, _, errors in map(finished, processes):
        assert code == 0, errors
    rounding = 1e-3 if "bf16" in options else 1e-5      # bf16 has 8 bits, and the losses are means over 192 tokens
    like(tmp_path / "n", tmp_path / "one", rel=rounding)
    best, whole = (load_checkpoint(tmp_path / run / "best.pt") for run in ("n", "one"))
    assert best["step"] == whole["step"] == 6 and best["model"].keys() == whole["model"].keys()
    for a, b in zip(best["model"].values(), one["model"].values(), strict=True):
        assert error(a, b) < 10 * rounding                      # as for gradient accumulation
    names = {path.name for path in (tmp_path / "n").iterdir() if path.suffix != ".png"}
    assert names == {"best.pt", "log.csv", "step-6" if options else "last.pt"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("options, processes", [([], (2, 1)), (["--fsdp"], (2, 4))])
def test_a_dead_process_ends_the_run_which_resumes_with_another_number(options, processes, corpus, tmp_path):
    if options and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 on a CPU needs a newer PyTorch")
    given = settings(corpus, tmp_path / "n", max_steps=10**6, eval_every=4, dropout=0.0, batch_size=8, min_lr=1.0)
    run = torchrun(processes[0], tmp_path / "n", given, *options)
    deadline = time.time() + 120

    def saved():
        return [*(tmp_path / "n").glob("last.pt"), *(tmp_path / "n").glob("step-*/run.pt")]

    while time.time() < deadline and not saved():
        time.sleep(0.02)
    ranks = [path.parent.name for path in Path("/proc").glob("[0-9]*/stat") if parent(path) == run.pid]
    os.kill(int(ranks[-1]), signal.SIGKILL)
    begun = time.time()
    code, _, errors = finished(run)
    assert code != 0 and time.time() - begun < 60
    assert len(ranks) == processes[0] and not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert "train.py: error: another process of this run has ended" in errors and 'train.py", line' not in errors, errors
    steps = 4 + max(load_checkpoint(path)["step"] for path in saved())
    code, said, errors = finished(torchrun(processes[1], tmp_path / "n", {"max_steps": steps}, "--resume"))
    assert code == 0 and "resumed" in said, errors
    train_py.train({**given, "out": str(tmp_path / "one"), "max_steps": steps})
    like(tmp_path / "n", tmp_path / "one", rel=1e-4)
    survived(f"dead_process{''.join(options)}", processes=processes[0], resumed_with=processes[1])
