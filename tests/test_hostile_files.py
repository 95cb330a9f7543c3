"""Damaged and hostile files: refused in one line, or loaded to the same."""
import ast
import contextlib
import json
import math
import pickle
import random
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

import sample as sample_py
import train as train_py
from data import messages, prepare, token_files, tokenizer
from experiments import evaluate
from fmem import FMem
from sampling import text_state
from tests.helpers import (
    EVERY_KIND,
    MUTATIONS,
    SLOW,
    SOURCES,
    Evil,
    mutated,
    replaced,
    same,
    survived,
    tiny,
    zoo,
)
from training import checkpoint, sharded
from training.checkpoint import check_state, load_checkpoint, model_from, save_checkpoint


def test_damaged_checkpoints_are_refused_in_one_line(run20, tmp_path):
    whole = (run20[0] / "last.pt").read_bytes()
    foreign = tmp_path / "foreign.pt"
    torch.save({"model": {}}, foreign)
    evil = tmp_path / "evil.pt"
    torch.save({"format": checkpoint.FORMAT, "model": Evil()}, evil)
    contents = {"cut": whole[:len(whole) // 2], "empty": b"", "text": b"hello", "foreign": foreign.read_bytes(),
                "evil": evil.read_bytes()}
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError) as e:
            load_checkpoint(path)
        assert name in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="does not exist"):
        load_checkpoint(tmp_path / "nothing.pt")
    assert not Evil.ran


@pytest.mark.slow
@pytest.mark.parametrize("what", ["checkpoint", "state"])
def test_no_mutation_of_a_checkpoint_loads_to_something_else(what, run20, tmp_path, capsys):
    """Bits turned, pieces lost, zeroed, doubled or put in: refused in one line, or, where nothing reads that byte, the same."""
    path, form = run20[0] / "last.pt", checkpoint.FORMAT
    if what == "state":
        path, form = tmp_path / "text.state", text_state.FORMAT
        sample_py.main(["--checkpoint", str(run20[0] / "best.pt"), "--max_new_tokens", "5", "--save-state", str(path)])
    whole, g, outcomes = path.read_bytes(), random.Random(0), Counter()
    want = load_checkpoint(path, form=form)
    for _ in range(MUTATIONS):
        kind, raw = mutated(whole, g)
        (tmp_path / "x.pt").write_bytes(raw)
        try:
            assert same(load_checkpoint(tmp_path / "x.pt", form=form), want), kind
            outcomes["same"] += 1
        except ValueError as e:
            outcomes["several lines" if "\n" in str(e) else kind] += 1
    assert all(outcomes[kind] > MUTATIONS // 12 for kind in ("turned", "cut", "zeroed", "put in", "doubled")), outcomes
    assert not outcomes["several lines"] and outcomes["same"] < 0.1 * MUTATIONS, outcomes
    survived(f"mutations_{what}", mutations=MUTATIONS, refused=MUTATIONS - outcomes["same"])


@pytest.mark.slow
@pytest.mark.parametrize("program", ["sample", "eval", "resume", "state"])
def test_whole_files_with_wrong_content_get_one_line(program, run20, tmp_path, capsys, monkeypatch):
    """What no checksum can tell: files that are whole but were made by somebody else. They work, or get one line."""
    checkpoint, g, outcomes = load_checkpoint(run20[0] / "last.pt"), random.Random(0), Counter()
    best, state = str(run20[0] / "best.pt"), tmp_path / "text.state"
    sample_py.main(["--checkpoint", best, "--max_new_tokens", "5", "--save-state", str(state)])
    if program == "state":
        checkpoint = load_checkpoint(state, form=text_state.FORMAT)
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/last.pt"
    commands = {"sample": (sample_py.main, ["--checkpoint", str(path), "--max_new_tokens", "3"]),
                "eval": (evaluate.main, [str(path)]),
                "resume": (train_py.main, ["--out", str(path.parent), "--resume", "--max_steps", "21", "--sample_tokens", "1"]),
                "state": (sample_py.main, ["--checkpoint", best, "--load-state", str(path), "--max_new_tokens", "3"])}
    main, arguments = commands[program]
    n = {"sample": MUTATIONS, "eval": MUTATIONS // 5, "resume": MUTATIONS // 2, "state": MUTATIONS}[program]
    for i in range(n):
        # as save_checkpoint does, but without waiting for the disk
        torch.save(replaced(checkpoint, g), path)
        capsys.readouterr()
        try:
            main(arguments)
            outcomes["works"] += 1
        except SystemExit as e:
            said = e.code if isinstance(e.code, str) else capsys.readouterr().err.strip()
            assert re.match(r"(sample\.py|evaluate|train\.py): error: ", said), (i, said)
            assert said.isprintable() and len(said) < 600, (i, said)
            outcomes["refused"] += 1
        out = capsys.readouterr().out
        assert "\x1b" not in out
    assert outcomes["refused"] > 0.2 * n, outcomes
    survived(f"wrong_content_{program}", files=n, refused=outcomes["refused"])


def test_weights_and_states_that_are_not_finite_are_refused(run20, tmp_path):
    checkpoint = load_checkpoint(run20[0] / "last.pt")
    model = model_from(checkpoint, "cpu")
    with torch.no_grad():
        _, state = model(torch.zeros(1, 5, dtype=torch.long))
    check_state(model, state, torch.zeros(1, dtype=torch.long), "x")
    for wrong in ([h * math.nan for h in state], [h[:, 1:] for h in state], state * 2, 5):
        with pytest.raises(ValueError, match="x does not hold a state of this model"):
            check_state(model, wrong, torch.zeros(1, dtype=torch.long), "x")
    checkpoint["model"]["norm.weight"][3] = math.nan
    with pytest.raises(ValueError, match="not a finite number"):
        model_from(checkpoint, "cpu")


@pytest.mark.parametrize("change", [lambda c: c.pop("config"), lambda c: c["config"].update(d_model=17), lambda c: c.pop("model"),
                                    lambda c: c["config"].update(colour="red"), lambda c: c.update(model=[1, 2]),
                                    lambda c: c["config"].update(n_rows="many"), lambda c: c["model"].popitem()])
def test_a_checkpoint_without_a_model_is_refused_in_one_line(change, run20):
    checkpoint = load_checkpoint(run20[0] / "last.pt")
    larger = {**checkpoint, "config": {**checkpoint["config"], "n_layer": 50}}
    with pytest.raises(ValueError, match="parameters, which it does not have"):     # before they are built
        model_from(larger, "cpu")
    change(checkpoint)
    with pytest.raises(ValueError) as e:
        model_from(checkpoint, "cpu")
    assert "\n" not in str(e.value)


def sharded_model(seed):
    torch.manual_seed(seed)
    model = sharded.shard(FMem(tiny(n_layer=1, d_model=8, d_memory=8)), torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.arange(20)[None])[0].square().sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.slow
def test_no_mutation_of_a_checkpoint_in_parts_loads_to_something_else(alone, run20, tmp_path):
    """Those of --fsdp: refused in one line, by the checksums; and code in PyTorch's table of contents, a pickle, does not run."""
    model, optimizer = sharded_model(1)
    run = {**run20[1], "model": None, "optimizer": None}
    sharded.save(tmp_path, 5, model, optimizer, lambda path: save_checkpoint(run, path))
    folder = sharded.newest(tmp_path)
    want = {name: value.clone() for name, value in sharded.tensors(model, optimizer).items()}
    other, moments = sharded_model(2)
    assert not same(want, sharded.tensors(other, moments))
    sharded.load(folder, other, moments)
    assert same(want, sharded.tensors(other, moments)) and "optimizer.blocks.0.memory.W_i.weight.exp_avg_sq" in want
    g, outcomes, bad = random.Random(0), Counter(), tmp_path / "bad"
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) == 4
    data, = (name for name in files if name.endswith(".distcp"))
    for i in range(1000 if SLOW else 200):
        shutil.copytree(folder, bad, dirs_exist_ok=True)
        name = files[i // 2 % 4] if i % 2 else data     # half of them the weights
        (bad / name).write_bytes(mutated((bad / name).read_bytes(), g)[1])
        try:
            assert same(load_checkpoint(bad / "run.pt"), run)
            sharded.load(bad, other, moments)
            assert same(want, sharded.tensors(other, moments))
            outcomes["same"] += 1
        except (ValueError, OSError) as e:
            outcomes["several lines" if "\n" in str(e) else name] += 1
    assert not outcomes["several lines"] and outcomes["same"] < 0.2 * (i + 1) and len(outcomes) >= 4, outcomes
    survived("mutations_in_parts", mutations=i + 1, refused=i + 1 - outcomes["same"])
    shutil.copytree(folder, bad, dirs_exist_ok=True)
    for evil in (pickle.dumps(Evil()), pickle.dumps({"a": torch.distributed.checkpoint.metadata.BytesStorageMetadata()})):
        (bad / ".metadata").write_bytes(evil)
        (bad / "sums-0.txt").write_text(f"{token_files.file_hash(bad / '.metadata')}  .metadata\n")
        with pytest.raises(OSError, match="which no checkpoint of ours does"):
            sharded.load(bad, other, moments)
    assert not Evil.ran
    (folder / "run.pt").unlink()                        # as a kill before the end of `save` leaves it
    assert sharded.newest(tmp_path) is None


def test_no_program_runs_what_a_file_says():
    """No eval, exec or unpickling in the sources, except the unpickler of sharded.py, which knows a list of names only."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                options = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if name in ("eval", "exec", "compile") or re.match("(pickle|marshal|shelve|dill|yaml)\\.", name) or (
                        name == "torch.load" and options.get("weights_only") != "True") or "allow_pickle" in options:
                    found.append((path.name, name))
    assert {file for file, _ in found if not file.startswith("test_")} <= {"sharded.py"}
    assert [name for file, name in found if file == "sharded.py"] == ["pickle.UnpicklingError"]


@pytest.mark.slow
@pytest.mark.parametrize("resigned", [False, True])
def test_no_mutation_of_the_data_loads_to_something_else(resigned, corpus, tmp_path):
    """resigned: with checksums that agree, as somebody would who means harm; then what loads can at least be worked with."""
    g, outcomes = random.Random(0), Counter()
    *want, fields, meta = token_files.load(corpus)
    names = "train-00000.bin", "val-00000.bin", "tokenizer.tiktoken", "meta.json"
    for i in range(MUTATIONS * len(names)):
        folder = tmp_path / "data"
        shutil.copytree(corpus, folder, dirs_exist_ok=True)
        path = folder / names[i % 4]
        path.write_bytes(mutated(path.read_bytes(), g)[1])
        if resigned:
            if path.name == "meta.json":
                path.write_text(json.dumps(replaced(meta, g), default=str))
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                new = json.loads((folder / "meta.json").read_text())
                new["files"] = {name: token_files.file_hash(folder / name) for name in names[:3]}
                (folder / "meta.json").write_text(json.dumps({**new, "sha256": token_files.meta_hash(new)}))
        try:
            *got, got_fields, got_meta = token_files.load(folder)
            enc = tokenizer.load_tokenizer(got_fields)
            if resigned:
                assert enc.n_vocab <= 2**24 and tokenizer.encode(enc, EVERY_KIND).max() < enc.n_vocab
                assert max(int(tokens[:].max()) for tokens in got) < enc.n_vocab
            else:
                assert all(np.array_equal(a[:], b[:]) for a, b in zip(got, want, strict=True)) and got_fields == fields
                assert got_meta == meta or "sha256" not in got_meta     # its name was hit: taken for a folder from before
            outcomes["works"] += 1
        except messages.DataError as e:
            outcomes["several lines" if "\n" in str(e) else path.name] += 1
    assert outcomes["several lines"] == 0 and len(outcomes) >= 5 - resigned, outcomes
    assert resigned or outcomes["works"] < 0.05 * (i + 1), outcomes
    survived(f"mutations_data{'_resigned' * resigned}", mutations=i + 1, refused=i + 1 - outcomes["works"])


@pytest.mark.slow
def test_damaged_input_to_prepare_gets_one_line(tmp_path, capsys):
    zoo(tmp_path / "in", documents=8)
    g, outcomes = random.Random(0), Counter()
    paths = sorted(path for path in (tmp_path / "in").rglob("*") if path.suffix in (".txt", ".jsonl", ".gz", ".parquet"))
    for i in range(MUTATIONS):
        path = paths[i % len(paths)]
        bad = tmp_path / path.name
        bad.write_bytes(mutated(path.read_bytes() or b"x", g)[1])
        try:
            prepare.main(["--input", str(bad), "--out", str(tmp_path / "out"), "--vocab_size", "257", "--overwrite"])
            outcomes["works"] += 1
        except SystemExit as e:
            outcomes[path.suffix if re.match(r"data/prepare\.py: error: ", e.code) and e.code.isprintable() else e.code] += 1
    assert len(outcomes) == len({path.suffix for path in paths}) + 1, outcomes
    assert not list(tmp_path.glob(".*"))
    survived("mutations_corpora", mutations=MUTATIONS, refused=MUTATIONS - outcomes["works"])
