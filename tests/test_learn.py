"""learn.ipynb, run from top to bottom, and the figures it is made of."""
import copy
import io
import json
import re
import time

import pytest
import torch

from data.token_files import DEFAULT
from inside.figures import curves, heat, png, ticks
from tests.helpers import ROOT

NOTEBOOK = ROOT / "learn.ipynb"


def cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(cell):
    return "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")


def kinds(cell):
    """What a cell puts out, apart from its content: text, or the kinds of a figure. Text in pieces counts once."""
    outputs = cell["outputs"]
    return list(dict.fromkeys("text" if out["output_type"] == "stream" else tuple(sorted(out["data"])) for out in outputs))


def check_numbers(code):
    """What the notebook says must hold in every run of it, on every machine."""
    exact = "".join(printed(code[i]) for i in (2, 3, 4, 7))
    differences = [float(v) for v in re.findall(r"\d\.?\d*e-\d+", exact)]
    assert len(differences) == 8 and max(differences) < 1e-12           # float64 sums in another order
    assert re.search(r"decays .*: (\d+)% of them are not a number", printed(code[4]))[1] not in ("0", "100")
    final = re.search(r"final .*validation ([\d.]+) nats", printed(code[5]))
    assert float(final[1]) < 5.2                  # a guess has ln 1025 = 6.9; slow machines take fewer steps
    assert "KING HENRY:" in printed(code[6]) and "3,072 numbers" in printed(code[6])
    sizes = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:numbers|after)", printed(code[9]))]
    paper, shifted = (int(v) for v in re.findall(r"(\d+) % of the answers", printed(code[10])))
    assert shifted > paper + 25 and paper < 25
    assert printed(code[11]).startswith("look-learn.html: ")
    assert sizes[0] == sizes[1] < sizes[2] < sizes[3] / 100


def test_the_notebook_as_it_is_committed():
    """Small, whole, in order, and every figure has words on both axes."""
    raw = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(raw)
    code = cells(notebook)
    assert len(raw) < 500_000 and len(code) == 12 and [cell["execution_count"] for cell in code] == list(range(1, 13))
    check_numbers(code)
    pictures = [out["data"]["image/svg+xml"] for cell in code for out in cell["outputs"] if "data" in out]
    assert len(pictures) == 8
    for picture in map("".join, pictures):
        assert picture.startswith("<svg") and "</svg>" in picture and picture.count('text-anchor="middle"') > 3
    assert not re.search(r"/tmp/|/home/|/Users/|0x[0-9a-f]{6}", raw)


def test_the_notebook_runs(tmp_path):
    """With outputs of the same kinds as those committed, and what it says still holds."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install nbclient ipykernel")
    if not (DEFAULT / "meta.json").is_file():
        pytest.skip("the default corpus is not prepared here: python data/prepare.py")
    import nbformat
    notebook = nbformat.read(NOTEBOOK, 4)
    before = copy.deepcopy(cells(notebook))
    start = time.perf_counter()
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    print(f"learn.ipynb took {time.perf_counter() - start:.0f} s")
    assert [kinds(cell) for cell in cells(notebook)] == [kinds(cell) for cell in before]
    check_numbers(cells(notebook))


def test_figures():
    assert ticks(0, 1, False) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]) and ticks(64, 16384, True) == [100, 1000, 10000]
    assert ticks(-3, 117, False) == [0, 20, 40, 60, 80, 100]
    text = curves({"a < b": ([1, 2, 3], [4, float("nan"), 8])}, "t", "x", "y", zero=True, dots=True).text
    points = re.search(r'points="([^"]+)"', text)[1].split()
    # 406 pixels wide from 64 on, 220 high; the y axis goes from 0 to 8, so 4 is half way
    assert points == ["64.0,144.0", "470.0,34.0"] and "a &lt; b" in text
    shades = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    data = png(shades, "#0b62ad")
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    import base64
    read = image.open(io.BytesIO(base64.b64decode(data.split(",")[1])))
    assert read.size == (2, 2) and read.getpixel((0, 0)) == (255, 255, 255) and read.getpixel((1, 0)) == (0x0b, 0x62, 0xad)
    assert "href" in heat(shades, "t", "x", "y", "u").text
