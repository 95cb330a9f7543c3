"""look.py: the exact maps of what is read, the page that shows them; and the notebook."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import look
from fmem import FactorizationMemory, FMem, FMemConfig, load, scan_loop
from lab.layers import Attention, ExtendedMemory

ROOT = Path(look.__file__).parent

# What is compared in float64 was summed in another order: rounding of a few hundred operations.
EXACT = 1e-12

LAYERS = {
    "paper": {},
    "dense": dict(k_rows=8),
    "shared": dict(shared_row=True),
    "shift": dict(shift=True),
    "conv_gate": dict(conv=4, gate=True),
    "all": dict(conv=4, gate=True, shared_row=True, shift=True),
}


def tiny_model(name="paper", **changes):
    """Two layers with weights that make every rate differ from token to token."""
    extensions = dict(LAYERS[name])
    sizes = dict(vocab_size=50, n_layer=2, d_model=16, d_memory=24, n_rows=8, tau=0.5)
    sizes["k_rows"] = extensions.pop("k_rows", 3)
    layer = ExtendedMemory if extensions else FactorizationMemory
    model = FMem(FMemConfig(**{**sizes, **changes}), layer, extensions)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.eval()


def error(got, want):
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("before", [0, 9])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_the_map_is_what_the_layer_reads(name, before):
    """A times the inputs, and the part of the memory before them, is the read of the recurrence."""
    layer = tiny_model(name, scan="loop").double().blocks[0].memory
    x = torch.randn(1, before + 23, 16, dtype=torch.float64)
    state = layer(x[:, :before])[1] if before else None
    x = x[:, before:]
    scans = []
    scan = layer.scan

    def spy(*inputs):
        scans.append(scan(*inputs))
        return scans[-1]

    layer.scan = spy
    layer(x, state)
    y, h = scans[0]
    seen = look.record_layer(layer, x, state)
    assert error(seen.A @ seen.xbar + seen.rest, y[0]) < EXACT
    assert error(seen.rms[-1], h[0].square().mean(-1).sqrt()) < EXACT
    assert not seen.A.triu(1).any() and (seen.A >= 0).all() and (seen.start >= 0).all()
    assert (error(seen.A @ seen.xbar, y[0]) > 1e-3) == bool(before)  # an earlier memory counts
    share, start = seen.shares()
    assert error(share.sum(1) + start, torch.ones_like(start)) < EXACT
    # The routed rows' weights add up to the rates.
    assert error(seen.theta[:, : seen.n_routed].sum(1), seen.eta) < EXACT
    assert error(seen.phi[:, : seen.n_routed].sum(1), seen.mu) < EXACT
    assert ((seen.entropy > 0) & (seen.entropy < math.log(seen.n_routed))).all()


def contents(seen, t):
    """E_t [t + 1, m] and F_t [m] of look.py's docstring, as products."""
    E = torch.stack([seen.theta[s] * (1 - seen.theta[s + 1 : t + 1]).prod(0) for s in range(t + 1)])
    return E, (1 - seen.theta[: t + 1]).prod(0)


@torch.no_grad()
def test_what_the_rows_hold():
    """Their weights give each row, add up to 1, and give the read; an untouched row stays."""
    layer = tiny_model().double().blocks[0].memory
    x = torch.randn(1, 31, 16, dtype=torch.float64)
    h0 = torch.randn(1, 8, 24, dtype=torch.float64)
    seen = look.record_layer(layer, x, h0)
    for t in (0, 1, 17, 30):
        theta, phi, xbar = (v[None, : t + 1] for v in (seen.theta, seen.phi, seen.xbar))
        y, h = scan_loop(theta, phi, xbar, h0)
        E, F = contents(seen, t)
        assert error(E.T @ seen.xbar[: t + 1] + F[:, None] * h0[0], h[0]) < EXACT
        assert error(E.sum(0) + F, torch.ones(8)) < EXACT
        q = seen.phi[t] * torch.rsqrt(seen.rms[t + 1].square() + layer.config.norm_eps)
        assert error(E @ q, seen.A[t, : t + 1]) < EXACT
    assert ((seen.theta > 0).sum(1) == 3).all()
    assert torch.equal(seen.rms[1:][seen.theta == 0], seen.rms[:-1][seen.theta == 0])


@pytest.mark.parametrize("name", ["paper", "all"])
def test_a_text_split_in_two_gives_the_same_map(name):
    """The weight of the tokens before the split is then that of the memory; nothing is changed."""
    model = tiny_model(name)
    tokens = torch.randint(50, (1, 40))
    with torch.no_grad():
        want, _ = model(tokens)
        _, state = model(tokens[:, :15])
    whole, _ = look.record(model, tokens[0])
    layers, logits = look.record(model, tokens[0, 15:], state)
    assert error(logits, want[0, 15:]) < 1e-5  # float32
    assert not any(block.memory._forward_pre_hooks for block in model.blocks)
    for a, b in zip(whole, layers, strict=True):
        assert error(b.A, a.A[15:, 15:]) < 1e-5
        assert error(b.start, a.A[15:, :15].sum(1) + a.start[15:]) < 1e-5


def test_a_model_without_rows_is_refused():
    model = FMem(FMemConfig(vocab_size=20, n_layer=1, d_model=16), Attention)
    with pytest.raises(ValueError, match="Attention"):
        look.record(model, torch.zeros(5, dtype=torch.long))


HOSTILE = (
    "</script><script>document.title='run'</script>",
    "<img src=x onerror=\"document.title='run'\">",
    "<!--",
    "]]>",
    "&lt;",
    "${document.title='run'}",
    "'\"`\\",
    "{{hash}} {{data}}",
    look.MARK,
)


def make_page(folder, model, state=None, n=30, words=None):
    """A page of random tokens: its path, the records, the tokens."""
    tokens = torch.randint(model.config.vocab_size, (n,))
    layers, logits = look.record(model, tokens, state)
    words = words or [f" w{i}" + "\n" * (i % 7 == 0) for i in range(model.config.vocab_size)]
    eps = model.config.norm_eps
    data = look.page_data(layers, logits, tokens, words, eps=eps, about="a test")
    path = folder / "page.html"
    look.write(path, look.page(data))
    return path, layers, tokens


def data_of(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text("utf-8"))[1])


def test_no_word_can_end_the_data(tmp_path):
    words = [HOSTILE[i % len(HOSTILE)] for i in range(50)]
    path, _, tokens = make_page(tmp_path, tiny_model(), words=words)
    data = data_of(path)
    assert [data["words"][str(token)] for token in tokens.tolist()] == [words[t] for t in tokens]
    text = path.read_text("utf-8")
    assert text.count("<script") == 2 and text.count(look.MARK) == 1 and "onerror" in text
    assert not re.search(r"[<>&\u2028\u2029]", re.search(r'id="data">(.*?)</script>', text)[1])


def test_bytes_as_they_are_shown():
    """Whole characters as they are, all else as escapes that cannot be mistaken for layout."""
    pieces = ["é".encode(), b"\xc3", b" a\n", b"\t", b"\x1b", "\u202e".encode(), b"\xf0\x9f"]
    shown = ["é", "\\xc3", " a\n", "\\t", "\\x1b", "\\u202e", "\\xf0\\x9f"]
    assert [look.visible(piece) for piece in pieces] == shown


def test_a_page_is_small(tmp_path):
    """256 tokens in 8 layers of 64 rows, all of them touched by each token: a few megabytes."""
    model = FMem(FMemConfig(vocab_size=50, n_layer=8, d_model=16, n_rows=64, k_rows=None)).eval()
    path, *_ = make_page(tmp_path, model, n=256)
    assert path.stat().st_size < 3e6


def chromium():
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture
def open_page():
    """open_page(path, width, scheme) -> the page in a browser, and what its console said."""
    reason = "needs playwright: pip install playwright"
    api = pytest.importorskip("playwright.sync_api", reason=reason)
    if not chromium():
        pytest.skip("needs the browser Chromium, which is not installed here")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])

        def open_page(path, width, scheme):
            size = {"width": width, "height": 800}
            page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
            said = []
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: said.append(f"asks for {request.url}"))
            page.goto(path.as_uri())
            assert said.pop(0) == f"asks for {path.as_uri()}"
            return page, said

        yield open_page
        browser.close()


CELLS = "rows => rows.map(row => [row.className, ...[...row.children].map(c => c.textContent)])"
WATCH = """window.moved = [];
new PerformanceObserver(list => window.moved.push(...list.getEntries().map(entry => entry.value)))
    .observe({type: 'layout-shift', buffered: false})"""


def check_reads(page, layer, t):
    """The shades are the shares that look.py computes, and the table has the largest of them."""
    share, start = layer.shares()
    spans = page.eval_on_selector_all("#text span", "spans => spans.map(s => +s.dataset.share)")
    assert spans == pytest.approx(share[t].tolist(), abs=1e-5)  # float32
    before = float(page.get_attribute("#text", "data-before"))
    assert before == pytest.approx(start[t].item(), abs=1e-5)
    rows = page.eval_on_selector_all("#reads-body tr", CELLS)
    largest = share[t].sort(descending=True).values[: min(10, t + 1)]
    for (_, _, ago, weight, percent), value in zip(rows, largest.tolist(), strict=False):
        s = t - int(ago)
        assert share[t, s].item() == pytest.approx(value, abs=1e-5)
        assert float(weight) == pytest.approx(layer.A[t, s].item(), rel=0.06)  # two digits
        assert float(percent[:-2]) == pytest.approx(100 * value, abs=0.51)


def check_rows(page, layer, t):
    """The table of rows has what each holds after token t, by the formulas of look.py."""
    E, F = contents(layer, t)
    rows = page.eval_on_selector_all("#rows-body tr", CELLS)
    assert len(rows) == 8
    for i, (kind, name, _, words, before, rms, age, half_life) in enumerate(rows):
        assert name == (str(i) if i < layer.n_routed else "shared")
        assert ("chosen" in kind) == bool(layer.theta[t, i] > 0)
        held = E[:, i].sum().item()
        numbers = [(before, 100 * F[i].item()), (rms, layer.rms[t + 1, i].item())]
        if held > 1e-3:
            mean_age = (E[:, i] @ torch.arange(t, -1, -1.0).double()).item() / held
            most = re.search(r" ([\d.]+) %", words)[1]
            numbers += [(age, mean_age), (most, 100 * E[:, i].max().item())]
        if layer.theta[:, i].sum() > 0.1:
            mean_log_kept = torch.log1p(-layer.theta[:, i]).mean().item()
            numbers.append((half_life.replace(",", ""), math.log(0.5) / mean_log_kept))
        for text, value in numbers:  # two digits are shown
            assert float(text) == pytest.approx(value, rel=0.06, abs=0.06), (name, numbers)


@pytest.mark.parametrize(
    ("name", "width", "scheme"), [("paper", 1280, "light"), ("all", 390, "dark")]
)
def test_the_page_in_a_browser(name, width, scheme, open_page, tmp_path):
    """What it shows is what look.py computed; nothing moves, is loaded or can be smuggled in."""
    model = tiny_model(name)
    with torch.no_grad():
        _, state = model(torch.randint(50, (1, 11)))
    words = [HOSTILE[i] if i < len(HOSTILE) else f" w{i}" for i in range(50)]
    words[20] = " ends a line\n"
    path, layers, tokens = make_page(tmp_path, model, state, n=60, words=words)
    page, said = open_page(path, width, scheme)
    spans = page.eval_on_selector_all("#text span", "spans => spans.map(s => s.textContent)")
    assert spans == [words[token].replace("\n", "⏎") for token in tokens.tolist()]
    assert page.title() == "Inside the memory" and page.locator("script").count() == 2

    page.evaluate(WATCH)
    height = page.evaluate("document.documentElement.scrollHeight")
    for keys, layer, t in (
        (["Home"], 0, 0),
        (["2", "End"], 1, 59),
        (["ArrowLeft", "ArrowLeft"], 1, 57),
        (["1"], 0, 57),
    ):
        for key in keys:
            page.keyboard.press(key)
        check_reads(page, layers[layer], t)
        check_rows(page, layers[layer], t)
    page.keyboard.press("ArrowUp")
    above = page.evaluate("view.t")
    page.keyboard.press("ArrowDown")
    assert above < min(57, page.evaluate("view.t"))
    page.keyboard.press("0")  # the mean of all layers
    t = page.evaluate("view.t")
    mean = sum(layer.shares()[0][t] for layer in layers) / 2
    shown = page.eval_on_selector_all("#text span", "spans => spans.map(s => +s.dataset.share)")
    assert shown == pytest.approx(mean.tolist(), abs=1e-5)
    page.keyboard.press("2")
    page.wait_for_timeout(100)
    assert page.evaluate("window.moved") == []
    assert page.evaluate("document.documentElement.scrollHeight") == height
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    page.click("#token-12")
    check_reads(page, layers[1], 12)
    data = data_of(path)
    next_tokens = page.inner_text("#next-note") + page.inner_text("#next-body")
    percents = [float(p) for p in re.findall(r"([\d.]+) %", next_tokens)]
    p = [math.exp(-data["loss"][13]), *(p for _, p in data["top"][12])]
    assert percents == pytest.approx([100 * v for v in p], abs=0.51)
    page.hover("#read-map", position={"x": 3, "y": 60})
    t = int(re.match(r"token (\d+)", page.inner_text("#read-at"))[1]) - 1
    page.click("#read-map", position={"x": 3, "y": 60})
    check_reads(page, layers[1], t)
    page.click("#phi")
    assert page.evaluate("view.heat") == "phi"
    assert said == []
    # What came into the page through a hole would not run either.
    page.evaluate("document.body.append(make('script', {textContent: 'document.title = 1'}))")
    assert page.title() == "Inside the memory" and "Content Security Policy" in said[0]


def look_at(capsys, *arguments):
    """The command: the path that it names, and the data in that page."""
    look.main([str(argument) for argument in arguments])
    path = Path(capsys.readouterr().out.split(": ")[0])
    return path, data_of(path)


def test_the_command(run, tmp_path, capsys):
    best = ["--checkpoint", run / "best.pt"]
    out = tmp_path / "a.html"
    path, data = look_at(capsys, *best)
    assert path == run / "look.html" and len(data["tokens"]) == data["given"] == look.PASSAGE
    assert len(data["layers"]) == 1 and "a test corpus" in data["about"]

    _, data = look_at(capsys, *best, "--tokens", 30, "--out", out)
    assert len(data["tokens"]) == len(data["loss"]) == len(data["top"]) == 30
    for likeliest in data["top"]:
        p = [probability for _, probability in likeliest]
        assert len(p) == 8 and p == sorted(p, reverse=True) and sum(p) <= 1.0001

    prompt = ["--prompt", "the river", "--generate", 7, "--out", out]
    _, data = look_at(capsys, *best, *prompt)
    assert len(data["tokens"]) == data["given"] + 7
    assert data == look_at(capsys, *best, *prompt)[1]
    assert data["tokens"][-7:] != look_at(capsys, *best, *prompt, "--seed", 2)[1]["tokens"][-7:]
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfthe river")  # with a byte-order mark
    prompt[1] = f"FILE:{tmp_path / 'prompt.txt'}"
    assert data == look_at(capsys, *best, *prompt)[1]


def test_of_a_long_text_the_end_is_shown_with_the_memory_of_the_rest(run, tmp_path, capsys):
    arguments = ["--checkpoint", run / "best.pt", "--out", tmp_path / "a.html", "--prompt"]
    _, whole = look_at(capsys, *arguments, "the river runs to sea " * 20)
    tokens = torch.tensor(whole["tokens"])
    logits, _ = load(run / "best.pt")[0](tokens[None])
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[1:], reduction="none")
    assert whole["loss"][1:] == pytest.approx(loss.tolist(), rel=1e-4)  # as they are rounded
    _, end = look_at(capsys, *arguments, "the river runs to sea " * 20, "--tokens", 25)
    assert end["tokens"] == whole["tokens"][-25:] and end["before"] == len(whole["tokens"]) - 25
    assert end["loss"][1:] == pytest.approx(whole["loss"][-24:], rel=1e-4)
    _, long = look_at(capsys, *arguments, "the river " * 5000)
    assert len(long["tokens"]) == look.MOST_TOKENS and long["before"] > 5000


def test_a_recall_model_is_shown_with_numbers_as_words(tmp_path, run, capsys):
    saved = torch.load(run / "best.pt", weights_only=True)
    torch.save({**saved, "tokenizer": None, "corpus": "mqar"}, tmp_path / "mqar.pt")
    arguments = ["--checkpoint", tmp_path / "mqar.pt", "--prompt"]
    path, data = look_at(capsys, *arguments, "3 1 4 1 5")
    assert path == tmp_path / "look.html" and data["tokens"] == [3, 1, 4, 1, 5]
    assert data["words"]["4"] == " 4"
    for prompt in ("3 x", "3 1000000", ""):
        with pytest.raises(SystemExit, match="numbers of tokens"):
            look_at(capsys, *arguments, prompt)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tokens", "1"], 2, "--tokens"),
        (["--generate", "x"], 2, "--generate"),
        (["--unknown"], 2, "--unknown"),
        (["--prompt", ""], 1, "one token"),
        (["--data", "nowhere"], 1, "nowhere"),
        (["--checkpoint", "nothing.pt"], 1, "train.py"),
        (["--prompt", "the", "--out", "look.html"], 1, "look.html"),  # no page: the template itself
        (["--prompt", "the", "--out", "nowhere/a.html"], 1, "nowhere"),
    ],
)
def test_what_cannot_work_is_one_line(arguments, code, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    template = shutil.copy(look.TEMPLATE, tmp_path)
    with pytest.raises(SystemExit) as end:
        look.main(["--checkpoint", str(run / "best.pt"), *arguments])
    said = capsys.readouterr().err if end.value.code == 2 else end.value.code + "\n"
    assert message in said and said.count("\n") == 1
    assert (end.value.code == 2) == (code == 2)
    assert list(tmp_path.iterdir()) == [Path(template)]
    assert Path(template).read_bytes() == look.TEMPLATE.read_bytes()


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.html"
    page = f"<!doctype html>\n{look.MARK}\n"
    look.write(path, page + "first")

    def full(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(look.os, "replace", full)
        with pytest.raises(OSError, match="full"):
            look.write(path, page + "second")
    assert path.read_text() == page + "first" and list(tmp_path.iterdir()) == [path]
    look.write(path, page + "second")
    assert path.read_text() == page + "second"


def check_claims(cells, most_loss):
    """What the notebook says of its cells holds for what they printed, on every machine."""
    said = []
    figures = 0
    for cell in cells:
        streams = [output["text"] for output in cell["outputs"] if "text" in output]
        said.append("".join("".join(text) for text in streams))
        figures += sum("image/png" in output.get("data", {}) for output in cell["outputs"])
    assert len(cells) == 12 and figures == 8

    def numbers(cell, pattern):
        return [float(v.replace(",", "")) for v in re.findall(pattern, said[cell - 1])]

    assert max(numbers(3, r"([\d.]+e-\d+) in")) < 1e-7  # scan_chunked in float64
    assert max(numbers(4, r"by (\S+)")) < 1e-12
    assert max(numbers(5, r"float64.*by (\S+) of")) < 1e-7
    assert max(numbers(5, r"float32.*by (\S+) of")) < 3e-6
    assert 0 < numbers(5, r"(\d+)% of them are not a number")[0] < 100
    assert numbers(6, r"final.* ([\d.]+) nats")[0] < most_loss
    assert "KING HENRY:" in said[6] and numbers(7, r"state: ([\d,]+) numbers") == [3072]
    assert max(numbers(8, r"to (\S+) of it")) < 1e-12
    sizes = numbers(10, r"state of +([\d,]+)")
    assert sizes[:4] == [16384] * 4 and sizes[7] == 16384 * 1024
    paper, shifted = numbers(11, r"(\d+) % of the answers")
    assert shifted > paper + 25
    assert "look.html" in said[11]


def test_what_the_notebook_says_holds_for_its_stored_outputs():
    notebook = json.loads((ROOT / "learn.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, 13))
    check_claims(cells, most_loss=5.2)  # a guess has ln 1025 = 6.9


def test_the_notebook_runs(corpus, tmp_path):
    """From top to bottom, with a small corpus and a few steps of training."""
    reason = "needs nbclient and ipykernel: pip install nbclient ipykernel"
    nbclient = pytest.importorskip("nbclient", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    nbformat = pytest.importorskip("nbformat", reason=reason)
    notebook = nbformat.read(ROOT / "learn.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    first = code[0].source
    for old, new in (
        ("STEPS = 500", "STEPS = 60"),
        ('DATA = "data/default"', f"DATA = {str(corpus)!r}"),
        ('OUT = "out-learn"', f"OUT = {str(tmp_path / 'out')!r}"),
    ):
        assert old in first
        first = first.replace(old, new)
    code[0].source = first
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    check_claims(code, most_loss=5.5)  # a guess has ln 300 = 5.7
