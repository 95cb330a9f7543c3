"""The shape of the project: files that are read in one sitting, imports that point inwards only, plain words."""
import ast
import re

import pytest

from tests.helpers import ROOT, SOURCES

LINES = {"fmem.py": 400, "kernel.py": 520, "train.py": 220, "sample.py": 130, "test_fmem.py": 500, "README.md": 160}
FILE, FUNCTION = 450, 60
# A room may import from those before it only. data/ stands apart: all may import it, and it imports none of them.
ROOMS = [{"kernel"}, {"fast"}, {"fmem"}, {"variants"}, {"inside"}, {"training"}, {"sampling"}, {"train", "sample", "look"},
         {"experiments", "integrations"}, {"tests", "conftest", "setup"}]
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]


def room(path):
    top = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "tests" if top.startswith("test_") else top


def imported(tree):
    """The top-level names that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_a_file_is_read_in_one_sitting(path):
    name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES.get(name, FILE)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and room(path) not in ("tests", "kernel"):
            words = ast.get_docstring(node, clean=False)
            lines = node.end_lineno - node.lineno + 1 - (words.count("\n") + 1 if words else 0)
            assert lines <= (120 if (name, node.name) == ("train.py", "train") else FUNCTION), node.name


def test_the_front_page_is_short_and_the_idea_too():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LINES["README.md"]
    tree = ast.parse((ROOT / "fmem.py").read_text(encoding="utf-8"))
    idea, = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "scan_chunked")
    code = idea.end_lineno - idea.body[1].lineno + 1    # after the docstring
    assert code <= 45


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_imports_point_inwards(path):
    rooms = {room(p) for p in SOURCES}
    rank = {name: i for i, names in enumerate(ROOMS) for name in names}
    own = room(path)
    assert own in {*rank, "data"}, f"{own} has no place in ROOMS"
    used = {name for name in imported(ast.parse(path.read_text(encoding="utf-8"))) if name in rooms and name != own}
    if own == "data":
        assert not used
    else:                                               # the tests may import each other
        assert all(rank[name] < rank[own] or own == "conftest" for name in used - {"data"}), used


def test_fmem_needs_torch_alone():
    """What fmem.py imports beside the standard library; `fast` it can do without (test_fmem_alone in test_fmem.py)."""
    names = set(imported(ast.parse((ROOT / "fmem.py").read_text(encoding="utf-8"))))
    assert names == {"math", "collections", "dataclasses", "torch", "fast"}


def test_plain_words():
    """Words that no colleague would write."""
    odd = re.compile(r"foresee|foresaw|foreseen|goes on where|go on from|by the token\b|taken up again|says how to go on", re.I)
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*.md"), *ROOT.glob("experiments/results/*.md")]
    sources = [path for path in SOURCES if path.name != "test_house.py"]
    found = [f"{path.relative_to(ROOT)}: {match[0]}" for path in [*pages, *sources]
             for match in odd.finditer(path.read_text(encoding="utf-8"))]
    assert not found
