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

# What is compared in float64 was summed in another order: rounding of a few hundred operations.
EXACT = 1e-12

EXTENSIONS = dict(conv=4, gate=True, shared_row=True, shift=True)


def tiny_model(extensions=None):
    """Two layers with weights that make every rate differ from token to token."""
    sizes = dict(vocab_size=50, n_layer=2, d_model=16, d_memory=24, n_rows=8, k_rows=3, tau=0.5)
    layer = ExtendedMemory if extensions else FactorizationMemory
    model = FMem(FMemConfig(**sizes), layer, extensions)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.eval()


def error(got, want):
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def contents(seen, t):
    """E_t [t + 1, m] and F_t [m] of look.py's docstring, as products."""
    E = torch.stack([seen.theta[s] * (1 - seen.theta[s + 1 : t + 1]).prod(0) for s in range(t + 1)])
    return E, (1 - seen.theta[: t + 1]).prod(0)


@pytest.mark.parametrize("extensions", [None, EXTENSIONS], ids=["paper", "extended"])
@torch.no_grad()
def test_the_maps_are_exact(extensions):
    """What record_layer says of the reads and the rows is what the recurrence computes."""
    layer = tiny_model(extensions).double().blocks[0].memory
    x = torch.randn(1, 32, 16, dtype=torch.float64)
    _, state = layer(x[:, :9])
    _, end = layer(x[:, 9:], state)
    h0, h_end = (s[0] if extensions else s for s in (state, end))
    seen = look.record_layer(layer, x[:, 9:], state)
    y, h = scan_loop(seen.theta[None], seen.phi[None], seen.xbar[None], h0)
    assert error(h, h_end) < 1e-7  # which the layer computes in chunks
    assert error(seen.A @ seen.xbar + seen.rest, y[0]) < EXACT
    for t in (0, 11, 22):
        E, F = contents(seen, t)
        rows = E.T @ seen.xbar[: t + 1] + F[:, None] * h0[0]
        assert error(E.sum(0) + F, torch.ones_like(F)) < EXACT
        assert error(seen.rms[t + 1], rows.square().mean(-1).sqrt()) < EXACT
        q = seen.phi[t] * torch.rsqrt(seen.rms[t + 1].square() + layer.config.norm_eps)
        assert error(seen.A[t, : t + 1], E @ q) < EXACT
        assert error(seen.start[t], F @ q) < EXACT
    # The routed rows' weights add up to the rates.
    assert error(seen.theta[:, : seen.n_routed].sum(1), seen.eta) < EXACT
    assert error(seen.phi[:, : seen.n_routed].sum(1), seen.mu) < EXACT
    assert ((seen.entropy > 0) & (seen.entropy < math.log(seen.n_routed))).all()


def test_a_model_without_rows_is_refused():
    model = FMem(FMemConfig(vocab_size=20, n_layer=1, d_model=16), Attention)
    with pytest.raises(ValueError, match="Attention"):
        look.record(model, torch.zeros(5, dtype=torch.long))


HOSTILE = (
    "</script><script>document.title='run'</script>",
    "<img src=x onerror=\"document.title='run'\">",
    "&lt;<!--'\"`\\${document.title='run'}{{data}}",
    look.MARK,
)
WORDS = [*HOSTILE, *(f" w{i}" + "\n" * (i % 7 == 0) for i in range(len(HOSTILE), 50))]


def make_page(folder, extensions=None):
    """A page of 60 random tokens after others: its path, the records, the tokens."""
    model = tiny_model(extensions)
    before, tokens = torch.randint(50, (71,)).split([11, 60])
    with torch.no_grad():
        _, state = model(before[None])
    layers, logits = look.record(model, tokens, state)
    more = dict(eps=model.config.norm_eps, about="a test", given=60, before=11, conv=0)
    path = folder / "page.html"
    look.write(path, look.page(look.page_data(layers, logits, tokens, WORDS, **more)))
    return path, layers, tokens.tolist()


def data_of(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text("utf-8"))[1])


def test_no_word_can_end_the_data(tmp_path):
    path, _, tokens = make_page(tmp_path)
    data = data_of(path)
    assert [data["words"][str(token)] for token in tokens] == [WORDS[token] for token in tokens]
    text = path.read_text("utf-8")
    assert text.count("<script") == 2 and text.count(look.MARK) == 1 and "onerror" in text


def test_bytes_as_they_are_shown():
    """Whole characters as they are, all else as escapes that cannot be mistaken for layout."""
    pieces = ["é".encode(), b"\xc3", b" a\n", b"\t", b"\x1b", "\u202e".encode()]
    shown = ["é", "\\xc3", " a\n", "\\t", "\\x1b", "\\u202e"]
    assert [look.visible(piece) for piece in pieces] == shown


def table(page, body):
    """The table's rows: the class of each, and the text of its cells."""
    script = (
        "rows => rows.map(row => [row.className, ...[...row.children].map(c => c.textContent)])"
    )
    return page.eval_on_selector_all(f"#{body} tr", script)


def check_shades(page, share):
    script = "spans => spans.map(span => span.style.getPropertyValue('--shade') ** 2)"
    shades = page.eval_on_selector_all("#text span", script)
    assert shades == pytest.approx(share.tolist(), abs=2e-4)  # four digits of the root are written


def check_reads(page, layer, t):
    """The shades are the shares that look.py computes, and the table has the largest of them."""
    share, start = layer.shares()
    check_shades(page, share[t])
    *rows, (*_, percent_before) = table(page, "reads-body")
    assert float(percent_before[:-2]) == pytest.approx(100 * start[t].item(), abs=0.51)
    largest = share[t].sort(descending=True).values[: min(10, t + 1)]
    for (_, _, ago, weight, percent), value in zip(rows, largest.tolist(), strict=False):
        assert share[t, t - int(ago)].item() == pytest.approx(value, abs=1e-5)
        assert float(weight) == pytest.approx(layer.A[t, t - int(ago)].item(), rel=0.06)  # 2 digits
        assert float(percent[:-2]) == pytest.approx(100 * value, abs=0.51)


def check_rows(page, layer, t):
    """The table of rows has what each holds after token t, by the formulas of look.py."""
    E, F = contents(layer, t)
    ages = torch.arange(t, -1, -1.0).double()
    rows = table(page, "rows-body")
    assert len(rows) == 8
    for i, (kind, name, _, words, before, rms, age, half_life) in enumerate(rows):
        assert name == (str(i) if i < layer.n_routed else "shared")
        assert ("chosen" in kind) == bool(layer.theta[t, i] > 0)
        numbers = {
            before: 100 * F[i].item(),
            re.search(r" ([\d.]+) %", words)[1]: 100 * E[:, i].max().item(),
            rms: layer.rms[t + 1, i].item(),
            age: (ages @ E[:, i] / E[:, i].sum()).item(),
            half_life: math.log(0.5) / torch.log1p(-layer.theta[:, i]).mean().item(),
        }
        for text, value in numbers.items():  # two digits are shown
            assert float(text) == pytest.approx(value, rel=0.06, abs=0.06), (name, numbers)


WATCH = """window.moved = [];
new PerformanceObserver(list => window.moved.push(...list.getEntries().map(entry => entry.value)))
    .observe({type: 'layout-shift', buffered: false})"""


def test_the_page_in_a_browser(tmp_path):
    """What it shows is what look.py computed; nothing moves, is loaded or can be smuggled in."""
    reason = "needs playwright: pip install playwright"
    api = pytest.importorskip("playwright.sync_api", reason=reason)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs the browser Chromium, which is not installed here")
    path, layers, tokens = make_page(tmp_path, EXTENSIONS)
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
        check_page(page, path, layers, tokens)


def check_page(page, path, layers, tokens):
    events = []
    page.on("console", lambda message: events.append(message.text))
    page.on("pageerror", lambda error: events.append(str(error)))
    page.on("request", lambda request: events.append(request.url))
    page.goto(path.as_uri())
    spans = page.eval_on_selector_all("#text span", "spans => spans.map(s => s.textContent)")
    assert spans == [WORDS[token].replace("\n", "⏎") for token in tokens]
    page.evaluate(WATCH)
    height = page.evaluate("document.documentElement.scrollHeight")

    page.click("#token-0")
    check_reads(page, layers[0], 0)
    page.click("#token-58")
    page.keyboard.press("2")
    page.keyboard.press("ArrowLeft")
    check_reads(page, layers[1], 57)
    check_rows(page, layers[1], 57)
    data = data_of(path)
    next_tokens = page.inner_text("#next-note") + page.inner_text("#next-body")
    percents = [float(p) for p in re.findall(r"([\d.]+) %", next_tokens)]
    p = [math.exp(-data["loss"][58]), *(p for _, p in data["top"][57])]
    assert percents == pytest.approx([100 * v for v in p], abs=0.51)
    page.hover("#read-map", position={"x": 3, "y": 60})
    t = int(re.match(r"token (\d+)", page.inner_text("#read-at"))[1]) - 1
    page.click("#read-map", position={"x": 3, "y": 60})
    check_reads(page, layers[1], t)
    page.click("#phi")
    assert page.get_attribute("#phi", "aria-pressed") == "true"
    page.keyboard.press("0")  # the mean of all layers
    check_shades(page, sum(layer.shares()[0][t] for layer in layers) / 2)

    page.wait_for_timeout(100)
    assert page.evaluate("window.moved") == []
    assert page.evaluate("document.documentElement.scrollHeight") == height
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.title() == "Inside the memory" and page.locator("script").count() == 2
    assert events == [path.as_uri()]  # no message, no error, and nothing else is asked for


def look_at(capsys, *arguments):
    """The command: the path that it names, and the data in that page."""
    look.main([str(argument) for argument in arguments])
    path = Path(capsys.readouterr().out.split(": ")[0])
    return path, data_of(path)


def test_the_command(run, tmp_path, capsys):
    best = ["--checkpoint", run / "best.pt"]
    path, data = look_at(capsys, *best, "--tokens", 30)
    assert path == run / "look.html" and "a test corpus" in data["about"]
    assert len(data["tokens"]) == len(data["loss"]) == len(data["top"]) == data["given"] == 30

    prompt = ["--prompt", "the river", "--generate", 7, "--out", tmp_path / "a.html"]
    _, data = look_at(capsys, *best, *prompt)
    assert len(data["tokens"]) == data["given"] + 7
    assert data["tokens"][-7:] != look_at(capsys, *best, *prompt, "--seed", 2)[1]["tokens"][-7:]
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfthe river")  # with a byte-order mark
    prompt[1] = f"FILE:{tmp_path / 'prompt.txt'}"
    assert data == look_at(capsys, *best, *prompt)[1]


def test_of_a_long_text_the_end_is_shown_with_the_memory_of_the_rest(run, tmp_path, capsys):
    arguments = ["--checkpoint", run / "best.pt", "--out", tmp_path / "a.html", "--prompt"]
    arguments.append("the river runs to sea " * 20)
    tokens = torch.tensor(look_at(capsys, *arguments)[1]["tokens"])
    logits, _ = load(run / "best.pt")[0](tokens[None])
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[1:], reduction="none")
    _, end = look_at(capsys, *arguments, "--tokens", 25)
    assert end["tokens"] == tokens[-25:].tolist() and end["before"] == len(tokens) - 25
    assert end["loss"][1:] == pytest.approx(loss[-24:].tolist(), rel=1e-4)  # as they are rounded


def test_a_recall_model_is_shown_with_numbers_as_words(tmp_path, run, capsys):
    saved = torch.load(run / "best.pt", weights_only=True)
    torch.save({**saved, "tokenizer": None, "corpus": "mqar"}, tmp_path / "mqar.pt")
    arguments = ["--checkpoint", tmp_path / "mqar.pt", "--prompt"]
    _, data = look_at(capsys, *arguments, "3 1 4 1 5")
    assert data["tokens"] == [3, 1, 4, 1, 5] and data["words"]["4"] == " 4"
    with pytest.raises(SystemExit, match="numbers of tokens"):
        look_at(capsys, *arguments, "3 1000000")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1"], "--tokens"),
        (["--prompt", ""], "one token"),
        (["--data", "nowhere"], "nowhere"),
        (["--prompt", "the", "--out", "notes.html"], "notes.html"),  # which is no page of ours
    ],
)
def test_what_cannot_work_is_one_line(arguments, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("notes.html").write_text("mine")
    with pytest.raises(SystemExit) as end:
        look.main(["--checkpoint", str(run / "best.pt"), *arguments])
    line = f"{end.value.code}\n" + capsys.readouterr().err
    assert message in line and line.removeprefix("2\n").count("\n") == 1
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def check_claims(cells, trained):
    """What the notebook says of its cells holds for what they printed, on every machine."""
    printed = []
    figures = 0
    for cell in cells:
        streams = [output["text"] for output in cell["outputs"] if "text" in output]
        printed.append("".join("".join(text) for text in streams))
        figures += sum("image/png" in output.get("data", {}) for output in cell["outputs"])
    assert len(cells) == 12 and figures == 8

    def numbers(cell, pattern):
        return [float(v.replace(",", "")) for v in re.findall(pattern, printed[cell - 1])]

    assert max(numbers(3, r"([\d.]+e-\d+) in")) < 1e-7  # scan_chunked in float64
    assert max(numbers(4, r"by (\S+)")) < 1e-12
    assert max(numbers(5, r"float64.*by (\S+) of")) < 1e-7
    assert max(numbers(5, r"float32.*by (\S+) of")) < 3e-6
    assert 0 < numbers(5, r"(\d+)% of them are not a number")[0] < 100
    assert numbers(7, r"state: ([\d,]+) numbers") == [3072]
    assert max(numbers(8, r"to (\S+) of it")) < 1e-12
    sizes = numbers(10, r"state of +([\d,]+)")
    assert sizes[:4] == [16384] * 4 and sizes[7] == 16384 * 1024
    assert "look.html" in printed[11]
    if trained:
        assert numbers(6, r"final.* ([\d.]+) nats")[0] < 5.2  # a guess has ln 1025 = 6.9
        paper, shifted = numbers(11, r"(\d+) % of the answers")
        assert shifted > paper + 25


def test_what_the_notebook_says_holds_for_its_stored_outputs():
    notebook = json.loads(look.TEMPLATE.with_name("learn.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, 13))
    check_claims(cells, trained=True)


def test_the_notebook_runs(corpus, tmp_path):
    """A copy, from top to bottom, with a small corpus and a few steps of each training."""
    reason = "needs nbclient, ipykernel and matplotlib"
    for name in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(name, reason=reason)
    import nbclient
    import nbformat

    notebook = nbformat.read(look.TEMPLATE.with_name("learn.ipynb"), 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell, old, new in (
        (1, "STEPS = 500", "STEPS = 20"),
        (1, 'DATA = "data/default"', f"DATA = {str(corpus)!r}"),
        (1, 'OUT = "out-learn"', f"OUT = {str(tmp_path / 'out')!r}"),
        (6, "--eval_every 50", "--eval_every 10"),
        (11, "range(121)", "range(21)"),
    ):
        source = code[cell - 1].source
        assert old in source
        code[cell - 1].source = source.replace(old, new)
    resources = {"metadata": {"path": str(look.TEMPLATE.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    check_claims(code, trained=False)
