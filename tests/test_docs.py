"""Pages that are computed: the plan for larger models, the results."""
import contextlib
import io
import json
import re
import statistics

import pytest
import torch

from data.corpora import CORPORA
from experiments import report
from experiments import run as experiments
from fmem import FMem, FMemConfig
from tests.helpers import ROOT


def kept_for_backward(n_layer, T, d_model):
    """Bytes that autograd keeps, but for the parameters themselves, under autocast to bf16."""
    model, kept = FMem(FMemConfig(vocab_size=1000, n_layer=n_layer, d_model=d_model, n_rows=64, k_rows=8)), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor     # alive, so that no address comes twice
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(torch.zeros(1, T, dtype=torch.long))
    del out
    return sum(size for size, _ in kept.values())


def test_the_plan_for_larger_models_adds_up():
    """docs/scaling.md: its code prints its tables, and the bytes kept per token and layer are those of the code (to 2 %)."""
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    code, = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "scaling.md", "exec"), {})
    lines = printed.getvalue().splitlines()
    assert len(lines) == 8 and all(line in page for line in lines), printed.getvalue()
    bytes_per_token = (kept_for_backward(2, 512, 512) - kept_for_backward(1, 512, 512)
                       - kept_for_backward(2, 256, 512) + kept_for_backward(1, 256, 512)) / 256
    said = float(re.search(r"^\| 512 \| ([\d,]+) \|", page, flags=re.M)[1].replace(",", ""))
    assert bytes_per_token == pytest.approx(said, rel=0.02)


def test_the_results_pages_are_what_report_writes():
    """The results page and the tables of README.md and docs/robustness.md, from the files under experiments/results/."""
    for path, text in report.pages(draw=False).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is not what python -m experiments.report writes"
    memory, done = (ROOT / "docs/memory.md").read_text(encoding="utf-8"), experiments.results()
    assert len(memory.splitlines()) <= 150
    nats = {name: [done[f"changes/{name}_{seed}"]["result"]["nats"] for seed in seeds]
            for name, seeds in (("shared+conv", experiments.SEEDS), ("conv", experiments.SEEDS[:1]))}
    assert f"{statistics.mean(nats['shared+conv']):.3f} nats, the mean of three seeds" in memory
    assert f"the convolution alone has {nats['conv'][0]:.3f}" in memory
    page = (ROOT / "experiments/RESULTS.md").read_text(encoding="utf-8")
    assert all((ROOT / "experiments" / picture).is_file() for picture in re.findall(r"\]\((results/.*?)\)", page))
    known = experiments.experiments()
    assert all(known.get(name) == line["command"] for name, line in experiments.results().items())


def test_the_page_on_other_tools_says_what_was_measured():
    """docs/ecosystem.md: the ratios of bench_threads, the table of the harness, the list of corpora; as recorded, as printed."""
    page = (ROOT / "docs/ecosystem.md").read_text(encoding="utf-8")
    threads = json.loads((ROOT / "experiments/results/threads.json").read_text())
    assert f"that is {threads['beside']['ratio']} times" in page and f"alone {threads['alone']['ratio']} times" in page
    found = json.loads((ROOT / "experiments/results/harness.json").read_text())
    for task, metrics in found["own"].items():
        for metric, value in metrics.items():
            line = f"{task:12}{found['documents'][task]:10}  {metric:14}{found['harness'][task][metric]:10.5f}{value:10.5f}"
            assert line in page
    faster = json.loads((ROOT / "experiments/results/decode.json").read_text())["speedup"]
    words = " ".join((ROOT / "docs/speed.md").read_text(encoding="utf-8").split())
    claim = "one text {} times as fast, {} with sample.py's choice of tokens; eight at once {} and {}."
    assert claim.format(*faster.values()) in words
    for name, corpus in CORPORA.items():
        assert f"{name:16}{corpus.size:60}{corpus.licence:18}" in page


def test_the_page_on_speed_says_what_the_compiler_made():
    """docs/speed.md: what the recurrences execute, before there were sub-chunks and now."""
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    before, now = ({row["kernel"]: row for row in json.loads((ROOT / f"experiments/results/{name}.json").read_text())}
                   for name in ("builds_sm90_before", "builds_sm90"))
    for name in ("mix", "mix_back", "rows", "theta"):
        pairs = [(row["warps"], row["registers"], round(row["warps"] * row["executed"] / row["C"] * 64 / row["rows"]))
                 for row in (before[name], now[name])]
        assert f"| {name} | " + " | ".join(f"{a:,} -> {b:,}" for a, b in zip(*pairs, strict=True)) + " |" in page
    for version, found in json.loads((ROOT / "experiments/results/builds_triton.json").read_text()).items():
        assert f"| {version} | {found['compiled']} | {len(found['spills'])} |" in page
