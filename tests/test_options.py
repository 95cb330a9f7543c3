"""Every option of every program with absurd values: it works, or one line says what is wrong."""
import dataclasses
import re
import shutil

import pytest

import look
import sample as sample_py
import train as train_py
from data import prepare
from experiments import bench_scan, evaluate, run
from integrations import harness, hf
from tests.helpers import settings, some_text
from training.options import Settings, parse


@pytest.mark.parametrize("options, message", [
    (["--learning_rate", "1"], "--learning_rate is not an option"), (["--nrows", "4"], "did you mean --n_rows?"),
    (["--max_steps", "many"], "whole number"), (["--lr", "nan"], "number"), (["--max_steps", "0"], "--max_steps must be"),
    (["--k_rows", "99"], "k_rows must be"), (["--device", "gpu"], "not a device"),
    (["--context", "99999999"], "--context must be"),
    (["--data", "nowhere"], "not a prepared folder"), (["--resume"], "there is no"), (["--scan", "slow"], "scan must be"),
    (["--micro_batch", "3"], "--micro_batch"), (["--preset", "tpu"], "--preset must be"), (["--seed", "-1"], "--seed must be"),
    (["--dtype", "int8"], "--dtype must be")])
def test_train_command_says_what_is_wrong(options, message, corpus, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        train_py.main(["--data", str(corpus), "--out", str(tmp_path / "out"), "--device", "cpu", *options])
    said = str(e.value) if isinstance(e.value.code, str) else capsys.readouterr().err.removesuffix("\n")
    assert e.value.code not in (0, None) and message in said and "\n" not in said
    assert not (tmp_path / "out/last.pt").exists()


ABSURD = "0", "-1", "nan", "inf", "1e12", "1000000000000", "x", "", "-0.0", "9" * 40, "none", "\0"


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Settings)])
def test_absurd_values_get_a_line_each(name, corpus, tmp_path, capsys, monkeypatch):
    """Every option with every one of these: it runs, or says in one line what is wrong."""
    given = settings(corpus, tmp_path / "out", max_steps=1, eval_every=1, sample_tokens=1)
    tiny_run = [f"--{k}={v}" for k, v in given.items() if k != name]
    monkeypatch.chdir(tmp_path)
    for value in ABSURD:
        if name in ("max_steps", "sample_tokens") and len(value) > 9:
            continue                                    # that many were asked for
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        try:
            train_py.main([*tiny_run, f"--{name}={value}"])
        except SystemExit as e:
            said = e.code if isinstance(e.code, str) else capsys.readouterr().err.strip()
            assert said.startswith("train.py: error: ") and "\n" not in said and len(said) < 400, said
        capsys.readouterr()


def test_options_are_taken_in_either_spelling():
    assert parse(["--max-steps=7", "--d_model", "8", "--no-carry-state"]) == parse(
        ["--max_steps", "7", "--d-model", "8", "--no-carry_state"]) == {"max_steps": 7, "d_model": 8, "carry_state": False}


VALUES = ["0", "a\nb", "-1", "nan", "inf", "1000000000000", "x", "", "1e400", "\udcff", "\x1b[2J"]


@pytest.mark.parametrize("program, option", [
    *(("sample", o) for o in ("checkpoint", "prompt", "num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "seed",
                              "device", "save-state", "load-state", "stop")),
    *(("eval", o) for o in ("long", "tokens", "data", "json", "figure", "device", "split")), ("eval", None),
    *(("prepare", o) for o in ("input", "val", "out", "field", "tokenizer", "vocab_size", "workers", "shard_tokens", "check",
                               "corpus", "gb")),
    *(("look", o) for o in ("checkpoint", "prompt", "generate", "tokens", "data", "load-state", "seed", "out")),
    *(("hf", o) for o in ("out", "check", None)), *(("harness", o) for o in ("data", "documents", "batch_size", "json", None)),
    *(("bench", o) for o in ("out",)), *(("experiments", o) for o in ("jobs",))])
def test_absurd_values_for_the_other_programs(program, option, run20, corpus, tmp_path, capsys, monkeypatch):
    """Every option that takes a value, with every one of these: it works, or one line says what is wrong."""
    best = str(run20[0] / "best.pt")
    (tmp_path / "a.txt").write_text(some_text(300), encoding="utf-8")
    base = {"sample": {"checkpoint": best, "max_new_tokens": "2"}, "eval": {"tokens": "500"},
            "look": {"checkpoint": best, "tokens": "20"},
            "prepare": {"input": str(tmp_path / "a.txt"), "out": str(tmp_path / "out"), "vocab_size": "260"},
            "bench": {}, "experiments": {}, "hf": {"out": "exported"}, "harness": {}}[program]
    main = {"sample": sample_py, "look": look, "eval": evaluate, "prepare": prepare, "bench": bench_scan,
            "experiments": run, "hf": hf, "harness": harness}[program].main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "DEFAULT", tmp_path / "default")       # prepared folders belong beside it
    monkeypatch.setattr(bench_scan, "table_forms", lambda quick: [])
    for table in ("table_memory", "table_growth", "table_step"):
        monkeypatch.setattr(bench_scan, table, bench_scan.table_forms)
    bench_scan.table_forms.__doc__ = "no table"
    monkeypatch.setattr(run, "run", lambda names, jobs: None)
    monkeypatch.setattr(harness, "harness_results", lambda folder, work, docs, batch_size: {})
    for value in VALUES:
        if option in ("num_samples", "max_new_tokens") and len(value) > 9:
            continue                                    # that many were asked for
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        arguments = [f"--{k}={v}" for k, v in base.items() if k != option]
        checkpoint = [value if option is None else best]
        arguments += {"eval": checkpoint, "hf": checkpoint, "harness": checkpoint, "bench": ["--quick"]}.get(program, [])
        if program == "eval" and option == "figure":
            arguments.append("--routing")
        try:
            main(arguments + ([f"--{option}={value}"] if option else []))
        except SystemExit as e:
            said = e.code if isinstance(e.code, str) else capsys.readouterr().err.strip()
            assert re.match(r"((data/)?\w+\.py|evaluate|bench_scan|experiments\.run|integrations\.\w+): error: ", said), said
            assert said.isprintable() and len(said) < 500, said
        out, _ = capsys.readouterr()
        assert "\x1b" not in out
