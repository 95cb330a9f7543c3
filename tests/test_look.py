"""look.py: the exact read maps, and the page that shows them. Also the notebook."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import look
from fmem import FactorizationMemory, FMem, FMemConfig, load, scan_loop
from lab.layers import ExtendedMemory

# Sums in another order, in float64: the rounding of a few hundred operations.
EXACT = 1e-12

EXTENSIONS = dict(conv=4, gate=True, shared_row=True, shift=True)


def tiny_model(extensions=None):
    """Two layers with weights that make every rate vary from token to token."""
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
    """E_t [t + 1, m] and F_t [m] from the docstring of look.py, as products."""
    E = torch.stack([seen.theta[s] * (1 - seen.theta[s + 1 : t + 1]).prod(0) for s in range(t + 1)])
    return E, (1 - seen.theta[: t + 1]).prod(0)


@pytest.mark.parametrize("extensions", [None, EXTENSIONS], ids=["paper", "extended"])
@torch.no_grad()
def test_maps_are_exact(extensions):
    """record_layer's reads and rows match those that the recurrence computes."""
    layer = tiny_model(extensions).double().blocks[0].memory
    x = torch.randn(1, 32, 16, dtype=torch.float64)
    _, state = layer(x[:, :9])
    _, end = layer(x[:, 9:], state)
    h0, h_end = (s[0] if extensions else s for s in (state, end))
    seen = look.record_layer(layer, x[:, 9:], state)
    y, h = scan_loop(seen.theta[None], seen.phi[None], seen.xbar[None], h0)
    assert error(h, h_end) < 1e-7  # the layer computes in chunks
    assert error(seen.A @ seen.xbar + seen.rest, y[0]) < EXACT
    for t in (0, 11, 22):
        E, F = contents(seen, t)
        rows = E.T @ seen.xbar[: t + 1] + F[:, None] * h0[0]
        assert error(seen.rms[t + 1], rows.square().mean(-1).sqrt()) < EXACT
        q = seen.phi[t] * torch.rsqrt(seen.rms[t + 1].square() + layer.config.norm_eps)
        assert error(seen.A[t, : t + 1], E @ q) < EXACT
        assert error(seen.start[t], F @ q) < EXACT
    # The routed rows' weights add up to the rates.
    assert error(seen.theta[:, : seen.n_routed].sum(1), seen.eta) < EXACT
    assert error(seen.phi[:, : seen.n_routed].sum(1), seen.mu) < EXACT
    assert ((seen.entropy > 0) & (seen.entropy < math.log(seen.n_routed))).all()


HOSTILE = (
    "</script><script>document.title='run'</script>",
    "<img src=x onerror=\"document.title='run'\">",
    "&lt;<!--'\"`\\${document.title='run'}{{data}}",
    look.MARK,
)
WORDS = [*HOSTILE, *(f" w{i}" + "\n" * (i % 7 == 0) for i in range(len(HOSTILE), 50))]


def test_visible_bytes():
    """Whole characters stay as they are; the rest becomes escapes that do not affect the layout."""
    pieces = ["é".encode(), b"\xc3", b" a\n", b"\t", b"\x1b", "\u202e".encode()]
    shown = ["é", "\\xc3", " a\n", "\\t", "\\x1b", "\\u202e"]
    assert [look.escape_unprintable(piece) for piece in pieces] == shown


def table(page, body):
    """The table's rows, each with its class and the text of its cells."""
    script = "rows => rows.map(row => [row.className, ...[...row.cells].map(c => c.textContent)])"
    return page.eval_on_selector_all(f"#{body} tr", script)


def check_shades(page, share):
    script = "spans => spans.map(span => span.style.getPropertyValue('--shade') ** 2)"
    shades = page.eval_on_selector_all("#text span", script)
    assert shades == pytest.approx(share.tolist(), abs=2e-4)  # four digits of the root are written


def check_reads(page, layer, t):
    """The shades match the shares that look.py computes, and the table has the largest ones."""
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
    """The table shows the contents of each row after token t, by the formulas of look.py."""
    E, F = contents(layer, t)
    ages = torch.arange(t, -1, -1.0).double() @ E / E.sum(0)
    half_lives = math.log(0.5) / torch.log1p(-layer.theta).mean(0)
    want = torch.stack([100 * E.max(0).values, 100 * F, layer.rms[t + 1], ages, half_lives], 1)
    rows = table(page, "rows-body")
    shown = [[re.search(r" ([\d.]+) %", words)[1], *cells] for _, _, _, words, *cells in rows]
    numbers = torch.tensor([[float(cell) for cell in cells] for cells in shown])
    torch.testing.assert_close(numbers.double(), want, rtol=0.06, atol=0.06)  # two digits
    assert [cells[1] for cells in rows] == [*"0123456", "shared"]
    assert ["chosen" in cells[0] for cells in rows] == (layer.theta[t] > 0).tolist()


def test_page_in_a_browser(tmp_path):
    """It shows what look.py computed. It loads nothing, and no word can inject code."""
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("the browser Chromium is not installed")
    model = tiny_model(EXTENSIONS)
    before, tokens = torch.randint(50, (71,)).split([11, 60])
    with torch.no_grad():
        _, state = model(before[None])
    layers, logits = look.record(model, tokens, state)
    more = dict(eps=model.config.norm_eps, about="a test", given=60, before=11, conv=4)
    data = look.page_data(layers, logits, tokens, WORDS, **more)
    path = tmp_path / "page.html"
    look.write(path, look.page(data))
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
        events = []
        page.on("console", lambda message: events.append(message.text))
        page.on("pageerror", lambda error: events.append(str(error)))
        page.on("request", lambda request: events.append(request.url))
        page.goto(path.as_uri())
        spans = page.eval_on_selector_all("#text span", "spans => spans.map(s => s.textContent)")
        assert spans == [WORDS[token].replace("\n", "⏎") for token in tokens.tolist()]
        page.click("#token-0")
        check_reads(page, layers[0], 0)
        page.click("#token-58")
        page.keyboard.press("2")
        page.keyboard.press("ArrowLeft")
        check_reads(page, layers[1], 57)
        check_rows(page, layers[1], 57)
        percents = [float(cells[2][:-2]) for cells in table(page, "next-body")]
        assert percents == pytest.approx([100 * p for _, p in data["top"][57]], abs=0.51)
        page.hover("#read-map", position={"x": 3, "y": 60})
        t = int(re.match(r"token (\d+)", page.inner_text("#read-at"))[1]) - 1
        page.click("#read-map", position={"x": 3, "y": 60})
        check_reads(page, layers[1], t)
        page.keyboard.press("0")  # the mean of all layers
        check_shades(page, sum(layer.shares()[0][t] for layer in layers) / 2)

        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.title() == "Inside the memory" and page.locator("script").count() == 2
        assert events == [path.as_uri()]  # no message, no error, no other request


def look_at(capsys, *arguments):
    """Run the command. Returns the path that it prints, and the data in that page."""
    look.main([str(argument) for argument in arguments])
    path = Path(capsys.readouterr().out.split(": ")[0])
    return path, json.loads(re.search(r'id="data">(.*?)</script>', path.read_text("utf-8"))[1])


def test_command(run, tmp_path, capsys):
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

    recall = tmp_path / "recall.pt"  # has no tokenizer: its tokens are numbers
    saved = torch.load(best[1], weights_only=True)
    torch.save({**saved, "tokenizer": None, "corpus": "</script>"}, recall)
    _, data = look_at(capsys, "--checkpoint", recall, "--prompt", "3 1 4 1 5")
    assert data["tokens"] == [3, 1, 4, 1, 5] and data["words"]["4"] == " 4"
    assert "</script>" in data["about"]  # no text can end the page's data


def test_end_of_a_long_text_is_shown_with_the_state_of_the_rest(run, tmp_path, capsys):
    arguments = ["--checkpoint", run / "best.pt", "--out", tmp_path / "a.html", "--prompt"]
    arguments.append("the river runs to sea " * 20)
    tokens = torch.tensor(look_at(capsys, *arguments)[1]["tokens"])
    logits, _ = load(run / "best.pt")[0](tokens[None])
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[1:], reduction="none")
    _, end = look_at(capsys, *arguments, "--tokens", 25)
    assert end["tokens"] == tokens[-25:].tolist() and end["before"] == len(tokens) - 25
    assert end["loss"][1:] == pytest.approx(loss[-24:].tolist(), rel=1e-4)  # as they are rounded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "one token"),
        (["--data", "nowhere"], "nowhere"),
        (["--prompt", "the", "--out", "notes.html"], "notes.html"),  # not a page of ours
    ],
)
def test_invalid_input_gives_a_one_line_error(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.html").write_text("mine")
    with pytest.raises(SystemExit, match=rf"\Alook.py: error: .*{message}.*\Z"):
        look.main(["--checkpoint", str(run / "best.pt"), *arguments])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_notebook_runs(corpus, tmp_path):
    """Run a copy with little training. What needs no training must hold in it too."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("matplotlib")
    folder = Path(look.__file__).parent
    text = (folder / "learn.ipynb").read_text("utf-8")
    changes = {"STEPS = 500": "STEPS = 20", "range(121)": "range(11)"}
    changes |= {"data/default": corpus.as_posix(), "out-learn": (tmp_path / "out").as_posix()}
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    notebook = nbformat.reads(text, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()

    def printed(number, pattern):
        text = "".join(output.get("text", "") for output in cells[number - 1].outputs)
        return [float(v.replace(",", "")) for v in re.findall(pattern, text)]

    assert max(printed(3, r"([\d.]+e-\d+) in")) < 1e-7  # scan_chunked in float64
    assert max(printed(4, r"by (\S+)")) < 1e-12
    assert max(printed(5, r"float64.*by (\S+) of")) < 1e-7
    assert max(printed(5, r"float32.*by (\S+) of")) < 3e-6
    assert 0 < printed(5, r"(\d+)% of them are not a number")[0] < 100
    assert max(printed(8, r"relative error (\S+)")) < 1e-12
    assert printed(10, r"state of +([\d,]+)")[3:8:4] == [16384, 16384 * 1024]  # memory, cache
