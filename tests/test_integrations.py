"""integrations/: the export for transformers and the evaluation harness. Most of it needs those packages."""
import itertools
import json
import os
import random
import re
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F

import sample as sample_py
from data import prepare, token_files, tokenizer
from integrations import harness, hf
from tests.helpers import ROOT, SLOW, mutated, settings, some_text, survived
from tests.test_data import PATTERNS
from train import train
from training.checkpoint import load_checkpoint, model_from

MODELS = {"memory": {}, "dense": {"k_rows": None}, "mamba2": {"mixer": "mamba2", "d_state": 8},
          "attention": {"mixer": "attention"}, "extended": {"shared_row": True, "shift": True, "conv": 4, "gate": True},
          "ablated": {"ablation": "untied"}}
THREE = "memory", "mamba2", "attention"                 # those that the harness compares


def speeches(seed):
    """Paragraphs of some lines, as in a play."""
    g = random.Random(seed)
    lines = (some_text(g.randrange(5, 9), seed=g.random()).replace("\n", "") for _ in itertools.count())
    return "\n\n".join("\n".join(itertools.islice(lines, g.randrange(2, 6))) for _ in range(40)) + "\n"


@pytest.fixture(scope="module")
def plays(tmp_path_factory):
    out = tmp_path_factory.mktemp("plays") / "data"
    prepare.prepare(out, {f"play{i}": speeches(i) for i in range(12)}, corpus="made plays", vocab_size=300)
    return out


@pytest.fixture(scope="module")
def checkpoints(plays, tmp_path_factory):
    """A short run with each kind of layer: {name: path}."""
    out = tmp_path_factory.mktemp("runs")
    for name, options in MODELS.items():
        train(settings(plays, out / name, max_steps=30, eval_every=30, lr=1e-2, **options))
    return {name: out / name / "best.pt" for name in MODELS}


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """The package, with its caches in a folder of the tests and no network."""
    os.environ.update(HF_HOME=str(tmp_path_factory.mktemp("hf")), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    return pytest.importorskip("transformers", reason="the transformers package is not installed")


@pytest.fixture(scope="module")
def exported(transformers, checkpoints, tmp_path_factory):
    """{name: (folder, transformers model, transformers tokenizer, our model, our tokenizer)}"""
    made = {}
    for name, path in checkpoints.items():
        folder = tmp_path_factory.mktemp("exported") / name
        hf.main([str(path), "--out", str(folder)])
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        words = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        checkpoint = load_checkpoint(path)
        enc = tokenizer.load_tokenizer(checkpoint["tokenizer"])
        made[name] = folder, model.eval(), words, model_from(checkpoint, "cpu"), enc
    return made


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_states_are_ours(name, exported):
    _, theirs, _, own, _ = exported[name]
    tokens = torch.randint(300, (3, 50))
    with torch.no_grad():
        want, _ = own(tokens)
        got = theirs(tokens)
        assert torch.allclose(got.logits, want, atol=1e-5) and want.std() > 0.1
        first = theirs(tokens[:, :20])                  # and split, then by steps
        rest = theirs(tokens[:, 20:40], past_key_values=first.past_key_values)
        steps = [theirs(tokens[:, t:t + 1], past_key_values=rest.past_key_values).logits for t in range(40, 50)]
        assert torch.allclose(torch.cat([first.logits, rest.logits, *steps], 1), want, atol=1e-5)
        assert torch.equal(theirs(tokens, logits_to_keep=1).logits, got.logits[:, -1:])


def test_any_text_becomes_the_same_tokens(exported):
    """10,000 random texts of every script, and back again."""
    _, _, words, _, enc = exported["memory"]
    for text in hf.probes(10_000, seed=1):
        want = tokenizer.encode(enc, text).tolist()
        assert words(text, add_special_tokens=False).input_ids == want, repr(text)
        assert words.decode(want) == enc.decode(want)
    assert words("a").input_ids[0] == enc.eot_token == words.eos_token_id == words.bos_token_id
    assert words("<|endoftext|>", add_special_tokens=False).input_ids == enc.encode_ordinary("<|endoftext|>")


@pytest.mark.parametrize("name", PATTERNS)
def test_the_patterns_of_other_tokenizers(name, transformers, corpus):
    """Those of GPT-2 and later ones: at the export 2,000 texts are compared; here more of them, and every character."""
    many = tokenizer.make_tokenizer("bpe", [some_text(2000) + " it'll x12345678" * 500 + "\n\n87654321\r\n" * 500], 600)
    enc = tokenizer.load_tokenizer({**tokenizer.dump_tokenizer(many), "pat_str": PATTERNS[name]})
    made = hf.fast_tokenizer(enc)
    some = (c for c in range(0x110000) if not 0xd800 <= c < 0xe000 and (SLOW or c % 7 == 0 or c < 3000))
    characters = (f"a{c}b {c}1'{c}" for c in map(chr, some))
    for text in itertools.chain(hf.probes(5000, seed=2), characters, ("x12345678", "87654321", "1234567", "it'll", "\r\n\n")):
        assert made.encode(text, add_special_tokens=False).ids == enc.encode_ordinary(text), repr(text)


def test_the_order_of_merges(transformers):
    """A tokenizer of many tokens that overlap, on pieces of the text that it is made of, cut anywhere."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "fmem.py", "kernel.py"))
    enc, g = tokenizer.make_tokenizer("bpe", [text], 3000), random.Random(0)
    made = hf.fast_tokenizer(enc)
    for _ in range(3000):
        at = g.randrange(len(text))
        piece = text[at:at + g.randrange(200)].replace(" ", g.choice([" ", ""]))
        assert made.encode(piece, add_special_tokens=False).ids == enc.encode_ordinary(piece), piece


def test_a_tokenizer_that_cannot_be_exported_is_refused(transformers, corpus):
    """A pattern that the two libraries read differently: {1,2}+ is possessive in one and a repetition in the other."""
    fields = {**token_files.load(corpus)[2], "pat_str": r"(?:\p{L}){1,2}+|" + tokenizer.GPT2_PATTERN}
    with pytest.raises(ValueError, match=r"cannot be exported: as a tokenizer.json it cuts '.*' differently"):
        hf.fast_tokenizer(tokenizer.load_tokenizer(fields))


@pytest.mark.parametrize("name", MODELS)
def test_generate_says_what_sample_says(name, exported, checkpoints, monkeypatch, capsys):
    """Greedily; and after the prompt every call reads one token only, so that the cost of a token is that of a step."""
    _, theirs, words, _, _ = exported[name]
    sample_py.main(["--checkpoint", str(checkpoints[name]), "--prompt", "the river", "--temperature", "0", "--device", "cpu",
                    "--max_new_tokens", "40", "--json"])
    line = json.loads(capsys.readouterr().out)
    shapes, read = [], theirs.model.forward
    monkeypatch.setattr(theirs.model, "forward", lambda tokens, state: shapes.append(tuple(tokens.shape)) or read(tokens, state))
    prompt = words("the river", return_tensors="pt")
    made = theirs.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt.input_ids.shape[1]:]
    assert made.tolist() == line["tokens"]
    assert shapes == [tuple(prompt.input_ids.shape)] + [(1,)] * (len(made) - 1)


@pytest.mark.parametrize("name", MODELS)
def test_padding_is_not_read(name, exported):
    """Texts of several lengths side by side, padded on the left: each as alone. And beams, with and without the kept state."""
    _, theirs, words, _, _ = exported[name]
    texts = ["the", "über naïve 東京 and the river keeps", "a river", "memory of a", "the"]
    batch = words(texts, return_tensors="pt", padding=True)
    assert not batch.attention_mask.all()
    together = theirs.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for i, text in enumerate(texts):
        alone = theirs.generate(**words(text, return_tensors="pt"), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert together[i, -12:].tolist() == alone[0, -12:].tolist()
    with torch.no_grad():
        logits = theirs(**batch).logits
        for i, text in enumerate(texts):
            n = int(batch.attention_mask[i].sum())
            assert torch.allclose(logits[i, -n:], theirs(words(text, return_tensors="pt").input_ids).logits[0], atol=1e-5)
    beams = [theirs.generate(**batch, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=use_cache)
             for use_cache in (True, False)]
    assert torch.equal(*beams)


def test_trainer_trains_it(transformers, exported, tmp_path, monkeypatch):
    """Its first loss is ours; after some steps it is lower; what it saves can be loaded again."""
    pytest.importorskip("accelerate", reason="Trainer needs the package accelerate")
    folder, _, _, own, _ = exported["memory"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = torch.randint(300, (16, 25))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    with torch.no_grad():
        want = F.cross_entropy(own(tokens)[0][:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
        assert theirs(tokens, labels=tokens).loss.item() == pytest.approx(want, rel=1e-5)
        labels = tokens.clone()
        labels[:, :10] = -100
        part = F.cross_entropy(own(tokens)[0][:, 9:-1].flatten(0, 1), tokens[:, 10:].flatten()).item()
        assert theirs(tokens, labels=labels).loss.item() == pytest.approx(part, rel=1e-5)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=15,
        learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, warmup_steps=0)
    trainer = transformers.Trainer(model=theirs, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(want, rel=0.05) and losses[-1] < losses[0] - 0.3     # dropout 0.1 in training
    trainer.save_model(str(tmp_path / "saved"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs.eval()(tokens).logits)


def test_the_code_is_ours_as_it_stands(exported):
    """Every file but for its imports; and those are relative, but for what fmem.py can do without."""
    folder = exported["memory"][0]
    for name, path in hf.CODE.items():
        got, want = (text.splitlines() for text in ((folder / name).read_text("utf-8"), (ROOT / path).read_text("utf-8")))
        changed = [(a, b) for a, b in zip(got, want, strict=True) if a != b]
        assert all(re.match(r"from \.\w+ import ", a) and re.match(r"from (variants\.)?\w+ import ", b) for a, b in changed)
        assert not re.search(r"^(from|import) (fmem|variants|training|data|kernel)\b", "\n".join(got), re.MULTILINE)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_harness_finds_what_we_find(batch_size, transformers, checkpoints, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="the evaluation harness is not installed")
    bits = set()
    for name in THREE:
        harness.main([str(checkpoints[name]), "--documents", "25", "--batch_size", str(batch_size),
                      "--json", str(tmp_path / "r.json")])
        result = json.loads((tmp_path / "r.json").read_text())
        for task, metrics in result["own"].items():
            assert result["harness"][task] == pytest.approx(metrics, rel=1e-5) and result["documents"][task] >= 20
        bits.add(result["own"]["fmem_bits"]["bits_per_byte"])
        assert 0 < result["own"]["fmem_next"]["acc"] < 1
    assert len(bits) == 3


# ----------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.slow
def test_damaged_exports_are_noticed(exported, tmp_path):
    """Bits turned, pieces lost or put in, in every file: --check says so in one line; whole folders pass."""
    folder, g, n = exported["memory"][0], random.Random(0), 60 if SLOW else 12
    shutil.copytree(folder, tmp_path / "x")
    hf.main(["--check", str(tmp_path / "x")])
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "fmem.py", "SHA256SUMS"):
        whole = (folder / name).read_bytes()
        for _ in range(n):
            kind, raw = mutated(whole, g)
            if raw == whole:
                continue
            (tmp_path / "x" / name).write_bytes(raw)
            with pytest.raises(SystemExit, match=r"integrations.hf: error: .* (is damaged|is not an exported folder)") as e:
                hf.main(["--check", str(tmp_path / "x")])
            assert e.value.code.isprintable(), (name, kind)
        (tmp_path / "x" / name).write_bytes(whole)
    hf.main(["--check", str(tmp_path / "x")])
    survived("exports", mutations=6 * n)


@pytest.mark.parametrize("change", [{"d_model": 17}, {"n_rows": 0}, {"mixer": "x"}, {"vocab_size": "301"}, {"k_rows": 99},
                                    {"new": 1}])
def test_a_wrong_config_is_refused(change, transformers, exported, tmp_path):
    """Before anything is computed: by the checks of ModelConfig, or because the weights do not fit."""
    shutil.copytree(exported["memory"][0], tmp_path / "x")
    config = json.loads((tmp_path / "x/config.json").read_text())
    config["model"].update(change)
    (tmp_path / "x/config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x", trust_remote_code=True)


def test_what_cannot_be_exported_gets_one_line(checkpoints, recall_runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "cut.pt").write_bytes(checkpoints["memory"].read_bytes()[:999])
    cases = [([str(checkpoints["memory"]), "--out", str(tmp_path / "there")], "exists already"),
             ([str(tmp_path / "cut.pt"), "--out", str(tmp_path / "a")], "cannot be read as a checkpoint"),
             ([str(tmp_path / "none.pt"), "--out", str(tmp_path / "a")], "does not exist"),
             ([str(recall_runs / "mqar/best.pt"), "--out", str(tmp_path / "a")], "not on text|pip install"),
             (["--check", str(tmp_path)], "is not an exported folder")]
    for arguments, message in cases:
        with pytest.raises(SystemExit, match=f"integrations.hf: error: .*({message})") as e:
            hf.main(arguments)
        assert e.value.code.isprintable()
    for package in ("tokenizers", "safetensors"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            patch.setitem(sys.modules, f"{package}.torch", None)
            with pytest.raises(SystemExit, match="integrations.hf: error: exporting needs the package .*pip install"):
                hf.main([str(checkpoints["memory"]), "--out", str(tmp_path / "a")])
    for arguments in ([], ["--out", "x"], ["--nonsense"]):
        with pytest.raises(SystemExit):
            hf.main(arguments)
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "a").exists() and not list(tmp_path.glob(".a*"))


def test_the_harness_says_what_is_wrong(checkpoints, run20, corpus, tmp_path, monkeypatch):
    for arguments, message in [([str(checkpoints["memory"]), "--documents", "0"], "--documents must be"),
                               ([str(checkpoints["memory"]), "--batch_size", "-1"], "--batch_size"),
                               ([str(checkpoints["memory"]), "--data", str(tmp_path)], "not a prepared folder"),
                               ([str(tmp_path / "x.pt")], "does not exist")]:
        with pytest.raises(SystemExit, match=f"integrations.harness: error: .*{message}") as e:
            harness.main(arguments)
        assert e.value.code.isprintable()
    with pytest.raises(ValueError, match="too few paragraphs"):
        harness.documents("a\n\nb", 5)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install .lm-eval"):
        harness.harness_results(tmp_path, tmp_path, {name: [] for name in harness.TASKS}, 1)
    assert token_files.load(corpus)
