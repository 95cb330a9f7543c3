"""look.py: the command, and its page in a real browser."""
import json
import math
import re

import pytest
import torch

import look
from data.tokenizer import token_strings
from fmem import FMemConfig
from inside.browser import browser, missing, opened
from inside.page import MARK, page, page_data, visible, words_of
from inside.record import record
from tests.helpers import ROOT, error, tiny_model
from tests.test_look import LAYERS
from training.checkpoint import load_checkpoint, tokenizer_of
from variants.build import ModelConfig, build

needs_browser = pytest.mark.skipif(bool(missing()), reason=str(missing()))


@pytest.fixture(scope="module")
def chrome():
    with browser() as one:
        yield one


def made_page(folder, model, n=30, state=None, words=None):
    """A page of random tokens; -> its path, what was recorded, the tokens."""
    tokens = torch.randint(model.config.vocab_size, (n,), generator=torch.Generator().manual_seed(3))
    layers, logits = record(model.eval(), tokens, state)
    words = words or [f" w{i}" + "\n" * (i % 7 == 0) for i in range(model.config.vocab_size)]
    path = folder / "page.html"
    data = page_data(layers, logits, tokens, words, model.config.norm_eps, about="a test", state=state is not None)
    path.write_text(page(data), encoding="utf-8")
    return path, layers, tokens


def shares_on(page):
    shares = page.eval_on_selector_all("#text span", "spans => spans.map(s => Number(s.dataset.share))")
    return torch.tensor(shares, dtype=torch.float64)


CELLS = "rows => rows.map(r => [r.className, ...[...r.children].map(c => c.textContent)])"


@needs_browser
@pytest.mark.parametrize("name", ["paper", "dense", "both", "untied", "norm_after", "no_renorm", "attention", "mamba2"])
def test_the_shading_is_the_weight(name, chrome, tmp_path):
    """Clicked or reached with keys, in every layer: the shades are the shares that record.py computes, to float32's rounding."""
    model = tiny_model(**LAYERS[name])
    with torch.no_grad():
        _, state = model(torch.randint(50, (1, 11)))
    path, layers, tokens = made_page(tmp_path, model, state=state)
    with opened(chrome, path) as page:
        for layer, keys, t in ((0, ["Home"], 0), (1, ["2", "End"], 29), (1, ["ArrowLeft", "ArrowLeft"], 27), (0, ["1"], 27)):
            for key in keys:
                page.keyboard.press(key)
            shares, start = layers[layer].shares()
            assert error(shares_on(page), torch.cat([shares[t, :t + 1], torch.zeros(29 - t)])) < 1e-5
            assert float(page.get_attribute("#text", "data-before")) == pytest.approx(start[t].item(), abs=1e-6)
        page.click("#token-12")
        shares, _ = layers[0].shares()
        assert error(shares_on(page)[:13], shares[12, :13]) < 1e-5
        shades = page.eval_on_selector_all("#text span", "spans => spans.map(s => Number(s.style.getPropertyValue('--shade')))")
        assert shades == pytest.approx([math.sqrt(abs(v)) for v in shares_on(page).tolist()], abs=1e-4)
        # the list has the ten largest, in order
        rows = [row[1:] for row in page.eval_on_selector_all("#reads-body tr", CELLS)]
        best = shares[12, :13].abs().argsort(descending=True)[:10].tolist()
        assert [int(row[1]) for row in rows[:10]] == [12 - s for s in best]
        assert [float(row[2]) for row in rows[:10]] == pytest.approx(layers[0].A.mean(0)[12, best].tolist(), rel=0.06)
        page.keyboard.press("0")                        # the mean of all layers
        mean = sum(seen.shares()[0] for seen in layers) / 2
        assert error(shares_on(page)[:13], mean[12, :13]) < 1e-5
        assert not page.said


@needs_browser
def test_what_each_row_holds_is_shown(chrome, tmp_path):
    model = tiny_model(k_rows=2)
    path, layers, tokens = made_page(tmp_path, model)
    seen = layers[0]
    with opened(chrome, path) as page:
        page.click("#token-20")
        rows = page.eval_on_selector_all("#rows-body tr", CELLS)
        held, before = seen.contents(20)
        assert len(rows) == 8
        for i, (kind, number, _, most, start, rms, age, half) in enumerate(rows):
            best = held[:, i].argmax().item()
            assert int(number) == i and ("chosen" in kind) == bool(seen.theta[20, i] > 0)
            assert float(start) == pytest.approx(100 * before[i].item(), abs=0.51)
            assert float(rms) == pytest.approx(seen.rms[21, i].item(), rel=0.06)
            if held[:, i].sum() > 1e-3:
                assert most.startswith(f"␣w{tokens[best].item()}")
                mean = (held[:, i] * torch.arange(20, -1, -1)).sum() / held[:, i].sum()
                assert float(age) == pytest.approx(mean.item(), abs=0.06)
            if seen.half_life()[i] < 100:
                assert float(half) == pytest.approx(seen.half_life()[i].item(), rel=0.01)
        assert "shared" not in page.inner_text("#rows-body")
        assert any("still" in row[0] for row in rows) == bool((seen.half_life() > 0.69 * 30 / 1e-3).any())


@needs_browser
def test_a_shared_row_is_shown_apart(chrome, tmp_path):
    path, layers, _ = made_page(tmp_path, tiny_model(shared_row=True, shift=True))
    assert layers[0].shared and layers[0].entropy.max() <= math.log(7) + 1e-9
    with opened(chrome, path) as page:
        names = [row[1] for row in page.eval_on_selector_all("#rows-body tr", CELLS)]
        assert names == [*map(str, range(7)), "shared"] and "of 1.95 nats" in page.inner_text("#rates")     # ln 7
        assert "the last for all tokens" in page.inner_text("#bars-at") and not page.said


# Machado, Oliveira and Fernandes (2009): linear RGB as people without one kind of cones see it.
BLIND = {"protan": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
         "deutan": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
         "tritan": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304))}


def test_the_two_colours_can_be_told_apart():
    """By colour-blind people too, in both schemes: at least a quarter of the way from black to white apart."""
    css = (ROOT / "inside/page.css").read_text(encoding="utf-8")
    pairs = re.findall(r"--one: (#\w{6}); --two: (#\w{6})", css)
    assert len(pairs) == 2
    for pair in pairs:
        linear = [[(int(c[i:i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)] for c in pair]
        for kind, matrix in BLIND.items():
            seen = [[max(sum(w * v for w, v in zip(row, colour, strict=True)), 0) ** (1 / 2.2) for row in matrix]
                    for colour in linear]
            assert math.dist(*seen) > 0.25 * math.sqrt(3), kind


HOSTILE = ("</script><script>document.title='run'</script>", "<img src=x onerror=\"document.title='run'\">", "<!--", "]]>",
           "&lt;", "\u2028\u2029", "\u202e\u200b\x00\x1b[31m", "${document.title='run'}", "'\"`\\", "{{js}} {{data}}",
           "<!-- fmem look -->")


@needs_browser
def test_nothing_in_a_text_can_run(run20, chrome, tmp_path):
    """Prompts and corpora of any characters, hostile ones too, are shown as they are and do nothing."""
    prompt = "\n".join(HOSTILE)
    best, out = str(run20[0] / "best.pt"), str(tmp_path / "a.html")
    look.main(["--checkpoint", best, "--prompt", prompt, "--out", out, "--generate", "5"])
    with opened(chrome, tmp_path / "a.html") as page:
        assert page.title() == "Inside the memory" and not page.said
        assert all(url.startswith(("file:", "data:")) for url in page.asked)
        text = page.eval_on_selector_all("#text span", "spans => spans.map(s => s.textContent).join('')")
        assert text.startswith("<|endoftext|></script><script>document.title='run'</script>⏎\n<img src=x onerror")
        assert "{{js}} {{data}}" in text and "\\x1b[31m" in text and all(c.isprintable() or c == "\n" for c in text)
        assert page.locator("script").count() == 2 and page.locator("img").count() == 0
        # what was put in by a hole in the page would not run either
        page.evaluate("document.body.append(make('script', {textContent: 'document.title = 1'}))")
        assert page.title() == "Inside the memory" and "Content Security Policy" in page.said[-1]


@needs_browser
def test_no_single_token_can_end_the_data(chrome, tmp_path):
    words = [HOSTILE[i % len(HOSTILE)] for i in range(50)]
    path, _, tokens = made_page(tmp_path, tiny_model(), words=words)
    with opened(chrome, path) as page:
        assert page.title() == "Inside the memory" and not page.said and page.locator("script").count() == 2
        text = page.eval_on_selector_all("#text span", "spans => spans.map(s => s.textContent)")
        assert text == [words[token] for token in tokens.tolist()]


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_stays_where_it_is(width, dark, run20, chrome, tmp_path):
    """Nothing moves while tokens and layers are chosen, nothing is wider than the window, keys suffice, no complaint."""
    model = build(ModelConfig(vocab_size=60, n_layer=6, d_model=16, n_rows=40, k_rows=4))
    path, *_ = made_page(tmp_path, model, n=90)
    with opened(chrome, path, width, dark=dark) as page:
        page.evaluate("""window.moved = []; new PerformanceObserver(list => window.moved.push(...list.getEntries().map(e =>
            e.value + ' ' + e.sources.map(s => s.node?.id || s.node?.nodeName))))
            .observe({type: 'layout-shift', buffered: false})""")
        before = page.evaluate("document.documentElement.scrollHeight")
        for key in ["ArrowUp", "ArrowUp", "ArrowDown", "Home", "ArrowRight", "End", *"1234560", "ArrowLeft", "3"]:
            page.keyboard.press(key)
            page.wait_for_timeout(20)
            assert page.evaluate("document.documentElement.scrollHeight") == before, key
        page.wait_for_timeout(100)
        assert page.evaluate("window.moved") == [] and not page.said
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[view.t, view.layer]") == [88, 2]
        page.focus("[role=tab][aria-selected=true]")
        page.keyboard.press("ArrowRight")
        assert page.evaluate("view.layer") == 3 and page.evaluate("document.activeElement.textContent") == "Layer 4"
        page.focus("button[value=phi]")
        page.keyboard.press("Enter")
        assert page.evaluate("view.heat") == "phi"
        for shown, words in (("#read-map", "of its read from token"), ("#heat-map", "θ ="), ("#bars svg", "reads φ")):
            page.hover(shown, position={"x": 3, "y": 60} if shown == "#read-map" else None)
            assert words in page.inner_text("#" + {"#read-map": "read-at", "#heat-map": "heat-at"}.get(shown, "bars-at"))
        page.click("#read-map", position={"x": 5, "y": 100})
        height = page.evaluate("document.getElementById('read-map').getBoundingClientRect().height")
        assert page.evaluate("view.t") == pytest.approx(90 * 101 / height, abs=1.5)
        # text on the deepest shade can be read: contrast of at least 4.5 (WCAG 2, AA)
        colours = page.evaluate("""['--ink', '--panel', '--one', '--two', '--soft'].map(style)""")
        ink, panel, one, two, soft = ([int(c[i:i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours)
        deep = float(page.evaluate("style('--deep')").removesuffix("%")) / 100
        for hue in (one, two):
            assert contrast(ink, [deep * h + (1 - deep) * p for h, p in zip(hue, panel, strict=True)]) > 4.5
        assert contrast(soft, panel) > 4.5


def contrast(a, b):
    light = [sum(weight * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
                 for weight, c in zip((0.2126, 0.7152, 0.0722), colour, strict=True)) for colour in (a, b)]
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("change", [{}, dict(k_rows=None), dict(mixer="attention", n_head=4), dict(mixer="mamba2")],
                         ids=["sparse", "dense", "attention", "mamba2"])
def test_a_page_is_small(change, tmp_path):
    """256 tokens and 8 layers, as large as the GPU's preset: under 3 MB."""
    model = build(ModelConfig(n_layer=8, d_model=32, n_rows=64, **{"k_rows": 16, **change}))
    path, *_ = made_page(tmp_path, model, n=256, words=["word"] * FMemConfig.vocab_size)
    assert 100_000 < path.stat().st_size < 3_000_000


def test_tokens_as_they_are_shown(run20):
    assert [visible(b) for b in ("é".encode(), b"\xc3", b" a\n", b"\t", b"\x1b", "\u202e".encode(), "🙂".encode()[:2])] == [
        "é", "\\xc3", " a\n", "\\t", "\\x1b", "\\u202e", "\\xf0\\x9f"]
    enc = tokenizer_of(load_checkpoint(run20[0] / "best.pt"))
    words = words_of(enc)
    assert words[enc.eot_token] == "<|endoftext|>" and len(words) == len(token_strings(enc))


def test_look_command(run20, corpus, recall_runs, tmp_path, monkeypatch, capsys):
    """Without arguments, with each of them, and what is said where it cannot work."""
    monkeypatch.chdir(tmp_path)
    best = str(run20[0] / "best.pt")

    def run(*arguments):
        look.main(["--checkpoint", best, *arguments])
        said = capsys.readouterr().out
        text = (tmp_path / said.split(":")[0]).read_text(encoding="utf-8")
        return json.loads(re.search(r'id="data">(.*?)</script>', text)[1])

    data = run()
    assert len(data["tokens"]) == 120 == data["made"] and len(data["layers"]) == 1 and "a test corpus" in data["about"]
    assert (tmp_path / "look.html").read_text().splitlines()[1] == MARK
    words = run("--tokens", "30", "--out", "b.html")
    assert len(words["tokens"]) == 30 == len(words["loss"]) == len(words["top"])
    for p in words["top"]:
        assert len(p) == 8 and [v for _, v in p] == sorted((v for _, v in p), reverse=True) and sum(v for _, v in p) <= 1.0001
    made = run("--prompt", "the river", "--generate", "7")
    assert len(made["tokens"]) == made["made"] + 7 and made == run("--prompt", "the river", "--generate", "7")
    assert made["tokens"][-7:] != run("--prompt", "the river", "--generate", "7", "--seed", "2")["tokens"][-7:]
    (tmp_path / "p.txt").write_text("the river", encoding="utf-8")
    assert run("--prompt", "FILE:p.txt", "--generate", "7") == made
    import sample as sample_py
    sample_py.main(["--checkpoint", best, "--prompt", "the river", "--max_new_tokens", "5", "--save-state", "s.state"])
    capsys.readouterr()
    later = run("--load-state", "s.state", "--prompt", " keeps")
    assert later["state"] and len(later["tokens"]) < 8
    task = ["--checkpoint", str(recall_runs / "mqar/best.pt")]
    assert run(*task)["words"]["128"] == " ?"
    (tmp_path / "c.pt").write_bytes(b"a checkpoint")
    for arguments, message in [(["--out", "c.pt"], "is not a page of look.py"), (["--tokens", "1"], "--tokens must be"),
                               (["--prompt", ""], "one token"), (["--prompt", "x " * 2000], "up to 1,024 tokens"),
                               ([*task, "--prompt", "x"], "trained on mqar"), (["--data", "nowhere"], "not a prepared folder"),
                               (["--checkpoint", "nothing.pt"], "python train.py makes one"),
                               (["--generate", "-1"], "--generate")]:
        with pytest.raises(SystemExit, match=message) as e:
            run(*arguments)
        assert "\n" not in str(e.value)
    assert (tmp_path / "c.pt").read_bytes() == b"a checkpoint" and not list(tmp_path.glob(".*"))
