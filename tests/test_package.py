"""pip install .: one package of all rooms; bounds of the requirements; the log for TensorBoard."""
import ast
import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest

import train as train_py
from tests.helpers import ROOT, contents, settings


def setup_module_of_ours():
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    spec = importlib.util.spec_from_file_location("fmem_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def installed(folder):
    """The package as a wheel holds it, in `folder`."""
    setup = setup_module_of_ours()
    for name, file in setup.files().items():
        target = folder / "fmem" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text(encoding="utf-8")
        target.write_text(setup.packaged(text) if file.suffix == ".py" else text, encoding="utf-8")
    return setup


def test_every_import_is_inside_the_package(tmp_path):
    """And every file of the rooms is in it, those of the page included."""
    setup = installed(tmp_path)
    ours = {*setup.ROOMS, *setup.SCRIPTS, "kernel"}
    files = sorted((tmp_path / "fmem").rglob("*.py"))
    assert len(files) > 30 and {"page.html", "page.css", "page.js"} <= {f.name for f in (tmp_path / "fmem/inside").iterdir()}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & ours, file
        assert not re.search(r"python (train|sample|look|data/prepare)\.py", file.read_text(encoding="utf-8"))
    of_the_repository = subprocess.run(["git", "ls-files", *setup.ROOMS], cwd=ROOT, capture_output=True, text=True)
    if of_the_repository.returncode == 0 and of_the_repository.stdout:
        assert {f"fmem/{name}" for name in of_the_repository.stdout.split()} <= {
            file.relative_to(tmp_path).as_posix() for file in (tmp_path / "fmem").rglob("*")}


def test_the_installed_commands(tmp_path, corpus):
    """In an empty folder: all that is written is written there, nothing into the package; and import fmem is the whole model."""
    site, home = tmp_path / "site", tmp_path / "home"
    installed(site)
    home.mkdir()
    before = sorted(site.rglob("*"))
    env = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "0"}

    def run(*words):
        done = subprocess.run([sys.executable, *map(str, words)], cwd=home, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    given = settings(corpus, "out", max_steps=2, eval_every=2)
    said = run("-m", "fmem.commands.train", *(f"--{k}={v}" for k, v in given.items()))
    assert "fmem-sample --checkpoint" in said or "fmem-sample writes more" in said
    assert run("-m", "fmem.commands.sample", "--max_new_tokens", "5", "--prompt", "the", "--num_samples", "2").count("the") >= 2
    run("-m", "fmem.commands.look", "--prompt", "the river of a memory")
    (home / "a.txt").write_text("words and words\n" * 300)
    run("-m", "fmem.data.prepare", "--input", "a.txt", "--vocab_size", "260")
    assert sorted(path.name for path in home.iterdir()) == ["a.txt", "data", "look.html", "out"]
    assert (home / "data/a/meta.json").is_file()
    assert sorted(path for path in site.rglob("*") if "__pycache__" not in path.parts) == before
    code = ("import sys, torch, fmem, fmem.commands.sample;"
            "m = fmem.FMem(fmem.FMemConfig(n_layer=1, d_model=16, n_rows=4, k_rows=2));"
            "print(m(torch.zeros(1, 5, dtype=torch.long))[0].shape, callable(fmem.sample), fmem.fast is not None,"
            "sorted(n for n in sys.modules if n.split('.')[0] in ('training', 'data', 'variants', 'fast', 'kernel', 'train')))")
    assert run("-c", code).strip() == "torch.Size([1, 5, 1025]) True True []"


def bounds(text):
    """{package: bounds} of requirements."""
    found = dict(re.findall(r"^\s*\"?([a-z]+)([<>=][^\s;\"]*)", text, re.MULTILINE))
    return {name: dict(re.findall(r"(>=|<)([\d.]+)", value)) for name, value in found.items()}


def test_every_requirement_has_both_bounds():
    """The same in requirements.txt and in the package, which does not need pytest."""
    listed = bounds((ROOT / "requirements.txt").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    packaged = bounds(re.search(r"^dependencies = \[(.*?)\]", project, re.MULTILINE | re.DOTALL)[1].replace(", \"", "\n\""))
    assert all(some.keys() == {">=", "<"} for some in listed.values()) and len(listed) == 6
    assert packaged == {name: some for name, some in listed.items() if name != "pytest"}


# ---------------------------------------------------------------------------------------------------------- TensorBoard

def test_tensorboard_holds_the_log(corpus, tmp_path):
    """The numbers of log.csv under the same names, after a resumed run too, whose steps were done twice."""
    pytest.importorskip("tensorboard", reason="the tensorboard package is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train_py.train(settings(corpus, tmp_path, log="tensorboard", max_steps=12, keep_every=5))
    shutil.copy(tmp_path / "step-10.pt", tmp_path / "last.pt")          # as if it had been killed then
    train_py.train({"out": str(tmp_path), "resume": True, "max_steps": 20, "device": "cpu"})
    events = EventAccumulator(str(tmp_path)).Reload()
    with open(tmp_path / "log.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    for name in ("train_loss", "val_loss", "lr", "tokens_per_second"):
        want = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        got = [(event.step, event.value) for event in events.Scalars(name)]
        assert len(got) > 3 and [(s, pytest.approx(v, rel=1e-5)) for s, v in want] == got


def test_without_tensorboard_one_line(corpus, tmp_path, monkeypatch):
    """And what the folder holds is not touched."""
    for name in [name for name in sys.modules if re.match(r"(torch\.utils\.)?tensorboard\b", name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    train_py.train(settings(corpus, tmp_path / "out", max_steps=1))
    before, given = contents(tmp_path), settings(corpus, tmp_path / "out", log="tensorboard")
    with pytest.raises(SystemExit, match="^train.py: error: --log tensorboard needs the package .*; pip install tensorboard$"):
        train_py.main([*(f"--{k}={v}" for k, v in given.items()), "--overwrite"])
    assert before == contents(tmp_path)
