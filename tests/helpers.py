"""What the tests share: inputs, errors, small runs, damage done to files."""
import csv
import gzip
import importlib.util
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fmem import FMemConfig, scan_loop
from variants.build import ModelConfig, build

try:
    import triton

    import kernel
    from fast.step_gpu import step_tiles, step_triton
except ImportError:
    triton = kernel = step_tiles = step_triton = None

GPU = torch.cuda.is_available()
torch.set_flush_denormal(True)
ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for path in ROOT.glob("**/*.py") if not {part for part in path.relative_to(ROOT).parts
                                                                if part.startswith((".", "out")) or part == "build"})

# FMEM_SLOW=1 python -m pytest -m slow runs the tests of endurance at full length; their figures go to
# experiments/results/survives.json and from there, by experiments.report, to docs/robustness.md. Else each runs a short form.
SLOW = bool(os.environ.get("FMEM_SLOW"))


def survived(test, **figures):
    """Note what an endurance test ran and found."""
    print(f"\n{test}: {figures}")
    if SLOW:
        path = ROOT / "experiments/results/survives.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, test: figures}, indent=1, sort_keys=True) + "\n")


# Two ways to round the same float64 sum differ by about 1e-16 per operation; a few hundred operations follow each other.
EXACT = 1e-12


def error(got, want, floor=1e-30):
    """Relative root mean square error; floor: what the size of `want` counts for at least, where it may be zero."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(floor)).item()


TINY = dict(vocab_size=50, n_layer=2, d_model=16, d_memory=24, n_rows=8, k_rows=3, tau=0.5)


def tiny(**changes):
    return FMemConfig(**{**TINY, **changes})


def tiny_config(**changes):
    """The same with the fields of the variants."""
    return ModelConfig(**{**TINY, **changes})


def tiny_model(**changes):
    return build(tiny_config(**changes))


def scan_inputs(B=2, T=37, m=6, d=10, sharp=3.0, ends=True, h0=True, sparse=None, seed=0):
    """theta, phi, x, h0 in float64, from values that float32 holds exactly. ends: with theta of exactly 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    alpha = torch.softmax(torch.randn(B, T, m, generator=g) * sharp, -1)
    if sparse:
        top, rows = alpha.topk(sparse, -1)
        alpha = torch.zeros_like(alpha).scatter(-1, rows, top / top.sum(-1, keepdim=True))
    theta = torch.sigmoid(torch.randn(B, T, 1, generator=g) * sharp) * alpha
    phi = torch.sigmoid(torch.randn(B, T, 1, generator=g)) * alpha
    if ends:
        theta[0, ::7, 0] = 1.0
        theta[-1, T // 2:T // 2 + 20, 1] = 1.0              # many in a row, over the end of a chunk
        theta[-1, ::5] = 0.0
        theta[0, -1, -1] = 1 - 2**-24                       # the largest float32 below 1
    x = torch.randn(B, T, d, generator=g)
    h = torch.randn(B, m, d, generator=g) if h0 else None
    return [v if v is None else v.double() for v in (theta, phi, x, h)]


def with_gradients(scan, inputs, dtype=torch.float64, **options):
    """[y, hT, gradients of all inputs] of a random linear function of y and hT."""
    leaves = [v if v is None else v.to(dtype).detach().requires_grad_() for v in inputs]
    y, hT = scan(*leaves, **options)
    g = torch.Generator().manual_seed(1)
    weigh = [torch.randn(v.shape, generator=g, dtype=torch.float64).to(v.device, dtype) for v in (y, hT)]
    grads = torch.autograd.grad((y * weigh[0]).sum() + (hT * weigh[1]).sum(), [v for v in leaves if v is not None])
    return [y, hT, *grads]


needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not GPU, reason="no NVIDIA GPU here: the kernels were run in Triton's interpreter only")
DEVICE = "cuda" if GPU else "cpu"
# float32: as for the chunked form. fp16 is multiplied in TF32 and bf16 as it is: 11 and 8 bits, a few roundings each.
KERNEL_ERROR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def kernel_errors(inputs, dtype):
    """Relative errors of y, hT and all gradients against the loop in float64 on the same (rounded) x."""
    inputs = [inputs[0], inputs[1], inputs[2].to(dtype).double(), inputs[3]]
    want = with_gradients(scan_loop, inputs)
    inputs = [v if v is None else v.to(DEVICE) for v in inputs]
    got = with_gradients(lambda theta, phi, x, h0: kernel.scan_triton(theta, phi, x.to(dtype), h0), inputs, torch.float32)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    return [error(g.cpu(), w) for g, w in zip(got, want, strict=True)]


def by_steps(model, tokens):
    """Logits of each step, and the last state."""
    logits, state = [], None
    for token in tokens.unbind(1):
        out, state = model(token, state)
        logits.append(out)
    return logits, state


# All tile configurations that ship: a dtype and a block of rows each, with one block, and several with a rest; the largest.
SHIPPED = [(dtype, m, d) for dtype in KERNEL_ERROR for m, d in ((16, 1024), (32, 1024), (64, 1024), (80, 48))]
SHIPPED += [(torch.bfloat16, 512, 4096)]


# ---------------------------------------------------------------------------------------------------------- text and runs

WORDS = "the memory of a river keeps the water that went by, über naïve façades – 東京 🙂 1905".split()


EVERY_KIND = "a\r\n\tb   c'll 12,345\x00\x1b[31m " + "".join(map(chr, range(0x80, 0x250))) + " 東京 🙂🙃 \U0010ffff"


def some_text(n, seed=0):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) + rng.choice(["", "", ",", ".\n"]) for _ in range(n))


def zoo(folder, documents=60, words=300):
    """Files of every kind that prepare.py reads, with what each document is: {name: [texts]}."""
    folder.mkdir()
    texts = [some_text(words, seed=i) for i in range(documents)]
    (folder / "sub").mkdir()
    (folder / "sub/a.txt").write_text(texts[0], encoding="utf-8", newline="")
    (folder / "b.txt").write_text("", encoding="utf-8")
    lines = ["".join(json.dumps({"text": t, "id": i}, ensure_ascii=bool(i % 2)) + "\n\n" for i, t in enumerate(part))
             for part in (texts[1:documents // 2], texts[documents // 2:])]
    (folder / "c.jsonl").write_text(lines[0], encoding="utf-8")
    with gzip.open(folder / "d.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write(lines[1])
    (folder / "notes.md").write_text("not a corpus", encoding="utf-8")
    named = {"c.jsonl": texts[1:documents // 2], "d.jsonl.gz": texts[documents // 2:], "sub/a.txt": texts[:1]}
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        import pyarrow.parquet
        rows = [some_text(50, seed=1000 + i) for i in range(40)]
        pyarrow.parquet.write_table(pyarrow.table({"text": rows, "n": list(range(40))}), folder / "e.parquet", row_group_size=7)
        named["e.parquet"] = rows
    return {name: named[name] for name in sorted(named)}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def settings(corpus, out, **more):
    return {**dict(data=str(corpus), out=str(out), device="cpu", n_layer=1, d_model=16, n_rows=8, k_rows=2, context=24,
                   batch_size=4, max_steps=20, eval_every=5, eval_tokens=100, log_every=1, sample_tokens=3, warmup=2,
                   dropout=0.1, lr=4e-3, tau=0.25, alpha_std=1.0), **more}


def log_rows(out, column):
    with open(Path(out) / "log.csv", newline="", encoding="utf-8") as f:
        return [(int(r["step"]), float(r[column])) for r in csv.DictReader(f) if r[column]]


def same(a, b):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def limited(run, *options, limit=None, during=""):
    """train.py --resume, started in a process of its own that cannot write files beyond `limit` bytes; `during` runs at its sixth
    step."""
    code = f"""
import os, resource, shutil, signal, sys
import train
from training.batches import Batches
if {limit}:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
call = Batches.__call__
def batch(self, step, *part):
    if step == 25:
        {during or "pass"}
    return call(self, step, *part)
Batches.__call__ = batch
train.main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, "--out", str(run), "--resume", "--max_steps", "40", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")


def mutated(whole, g):
    """-> (what was done, the bytes after it)."""
    raw, at, n = bytearray(whole), g.randrange(len(whole)), g.randrange(1, 200)
    kind = g.choice(["turned", "cut", "zeroed", "put in", "doubled"])
    if kind == "turned":
        raw[at] ^= 1 << g.randrange(8)
    elif kind == "cut":
        del raw[at:]
    elif kind == "zeroed":
        raw[at:at + n] = bytes(len(raw[at:at + n]))
    elif kind == "put in":
        raw[at:at] = g.randbytes(n)
    else:
        raw[at:at] = raw[at:at + n]
    return kind, bytes(raw)


MUTATIONS = 1000 if SLOW else 100


JUNK = [None, -1, 0, 10**12, 2**63, 1e308, math.nan, "", "\x1b[2J", "x" * 1000, b"x", [], [1], {}, {"a": 1}, (), True,
        torch.zeros(0), torch.full((3, 3), math.nan), torch.zeros(2, dtype=torch.int64)]


def replaced(value, g):
    """The same, but for something in it, at any depth, which is now something else, or gone."""
    if isinstance(value, dict) and value and g.random() < 0.9:
        key, value = g.choice(list(value)), dict(value)
        if g.random() < 0.2:
            del value[key]
        else:
            value[key] = replaced(value[key], g)
        return value
    if isinstance(value, (list, tuple)) and value and g.random() < 0.9:
        i, items = g.randrange(len(value)), list(value)
        items[i] = replaced(items[i], g)
        return type(value)(items)
    if isinstance(value, torch.Tensor) and g.random() < 0.5:
        return g.choice([value * math.nan, value * 1e38, value.double(), value.flatten()[:1], value.flatten(),
                         value.expand(2, *value.shape)])
    return g.choice(JUNK)


class Evil:
    ran = False

    def __reduce__(self):
        return setattr, (Evil, "ran", True)


def torchrun(n, out, given, *options):
    """train.py in n processes, started."""
    options = [w for k, v in given.items() if k != "out" for w in (f"--{k}", str(v))] + list(map(str, options))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), str(ROOT / "train.py")]
    popen = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", start_new_session=True)
    return subprocess.Popen([*command, "--out", str(out), *options], env={**os.environ, "OMP_NUM_THREADS": "1"}, **popen)


def together(n, out, given, *options):
    """train.py in n processes as torchrun would start them, but without it: [process]."""
    options = [w for k, v in given.items() if k != "out" for w in (f"--{k}", str(v))] + list(map(str, options))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(out), *options]
    popen = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", start_new_session=True)
    return [subprocess.Popen(command, env={**world, "RANK": str(i), "LOCAL_RANK": str(i)}, **popen) for i in range(n)]


def finished(process):
    try:
        said, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, said, errors


def like(a, b, rel=1e-5):
    """The same losses to rounding."""
    for column in ("train_loss", "val_loss"):
        want = [(step, pytest.approx(value, rel=rel)) for step, value in log_rows(b, column)]
        assert len(want) > 1 and log_rows(a, column) == want


def parent(stat):
    """The parent of the process whose /proc/PID/stat this is: the second word after its name, which may hold anything."""
    try:
        return int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:                                     # it has ended
        return None


def raw_text(g, n):
    """n bytes of all sorts: any bytes, control sequences, halves of characters, text."""
    controls = b"\x1b[2J\x1b]0;x\x07", b"\x9b31m", b"\xc2\x9b", b"\r", b"\0", b"\x7f"
    kinds = (lambda: g.randbytes(g.randrange(1, 20)), lambda: g.choice(controls),
             lambda: g.choice(WORDS).encode() + b" ", lambda: chr(g.randrange(0x110000)).encode("utf-8", "surrogatepass"),
             lambda: g.choice([b" ", b"\n", b"a", b"<|endoftext|>"]) * g.randrange(1, 50))
    raw = b""
    while len(raw) < n:
        raw += g.choice(kinds)()
    return raw


def shown(capsys):
    """What was printed, which must be nothing that steers a terminal."""
    out, err = capsys.readouterr()
    assert all(c.isprintable() or c in "\n\t" for c in out + err)
    return out, err
