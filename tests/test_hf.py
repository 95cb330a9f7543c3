"""lab/hf.py: an exported model is the same model in transformers. And the wheel is the model."""

import importlib.util
import os
import subprocess
import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F

import fmem
import train
from data import tokenizer
from lab import hf
from lab.layers import Attention, ExtendedMemory
from lab.tasks import AssociativeRecall

LAYERS = {
    "paper": (fmem.FactorizationMemory, {}),
    "extended": (ExtendedMemory, {"conv": 3, "gate": True, "shared_row": True, "shift": True}),
}
# The chunks of a text that is padded or split begin elsewhere: float32 rounds differently.
CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """The package, without a network, and with its copies of our code in a folder of the tests."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module", params=LAYERS)
def exported(request, transformers, small, tmp_path_factory):
    """The checkpoint of a short run; the model and tokenizer of transformers made of it."""
    folder = tmp_path_factory.mktemp("run")
    train.train({**small, "out": str(folder / "out"), "lr": 2e-2}, *LAYERS[request.param])
    hf.main([str(folder / "out/best.pt"), "--out", str(folder / "model")])
    auto = {"pretrained_model_name_or_path": folder / "model", "trust_remote_code": True}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**auto)
    words = transformers.AutoTokenizer.from_pretrained(**auto)
    return folder / "out/best.pt", theirs.eval(), words


def state_of(output):
    """The state under the name that the installed version has for it."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


@torch.no_grad()
def test_logits_and_states_are_ours(exported):
    """In one piece, and split and stepped with the state under either name."""
    checkpoint, theirs, _ = exported
    tokens = torch.randint(300, (3, 50))
    expected, _ = fmem.load(checkpoint)[0](tokens)
    assert torch.allclose(theirs(tokens).logits, expected, **CLOSE)
    assert torch.allclose(theirs(tokens, logits_to_keep=2).logits, expected[:, -2:], **CLOSE)
    for name in ("cache", "past_key_values"):
        parts = [theirs(tokens[:, :20])]
        state = {name: state_of(parts[0])}
        parts.append(theirs(tokens[:, 20:40], **state))
        parts += [theirs(tokens[:, t : t + 1], **state) for t in range(40, 50)]
        assert torch.allclose(torch.cat([part.logits for part in parts], 1), expected, **CLOSE)


def test_generate_is_ours(exported, monkeypatch):
    """The same tokens; and after the prompt every call reads one token, from the state before."""
    checkpoint, theirs, words = exported
    prompt = words("the river of", return_tensors="pt")
    ours = fmem.load(checkpoint)[0].generate(prompt.input_ids, 40, temperature=0)
    shapes = []
    hidden = theirs.model.hidden

    def watched(tokens, state=None):
        shapes.append(tuple(tokens.shape))
        return hidden(tokens, state)

    monkeypatch.setattr(theirs.model, "hidden", watched)
    tokens = theirs.generate(**prompt, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert tokens[0, prompt.input_ids.shape[1] :].tolist() == [int(token) for token in ours]
    assert shapes == [tuple(prompt.input_ids.shape)] + [(1,)] * 39


@torch.no_grad()
def test_nothing_is_swallowed(exported, transformers):
    """What would lose the state, or read padding into it, is refused in a line."""
    _, theirs, _ = exported
    tokens = torch.randint(300, (2, 9))
    state = state_of(theirs(tokens))
    mask = torch.ones(2, 10, dtype=torch.long)
    padded = mask.clone()
    padded[1, 5:] = 0
    padded_right = state_of(theirs(tokens, attention_mask=padded[:, :9]))
    token = {"input_ids": tokens[:, :1]}
    cases = [
        ({**token, "memory": state}, "does not know the arguments memory"),
        ({**token, "cache": transformers.DynamicCache()}, "one that this model"),
        ({"input_ids": tokens[:1], "cache": state}, "2 sequences, input_ids 1"),
        ({**token, "attention_mask": mask}, "for every token so far"),
        ({**token, "cache": state, "attention_mask": padded}, "after the first call"),
        ({**token, "cache": padded_right}, "padded left"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            theirs(**arguments)
    assert state.get_seq_length() == 9  # none of them has touched it


def test_padding_on_the_left_is_not_read(exported):
    """Texts of several lengths side by side: each as alone. And beams, with and without state."""
    _, theirs, words = exported
    texts = ["the", "über naïve 東京 and the river", "a king", "in it his ship was lost", "the"]
    batch = words(texts, return_tensors="pt", padding=True)
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = theirs.generate(**batch, **greedy)
    for i, text in enumerate(texts):
        alone = theirs.generate(**words(text, return_tensors="pt"), **greedy)
        assert together[i, -12:].tolist() == alone[0, -12:].tolist()
    beams = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    with_state = theirs.generate(**batch, **beams)
    assert torch.equal(with_state, theirs.generate(**batch, **beams, use_cache=False))


def test_loss_gradient_and_saving(exported, transformers, tmp_path):
    """The loss of the labels that count, a gradient for each weight; saved and loaded again."""
    _, theirs, _ = exported
    tokens = torch.randint(300, (4, 25))
    labels = tokens.clone()
    labels[:, :10] = -100
    output = theirs(tokens, labels=labels)
    expected = F.cross_entropy(output.logits[:, 9:-1].flatten(0, 1), tokens[:, 10:].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    output.loss.backward()
    assert all(weight.grad is not None for weight in theirs.parameters())
    theirs.save_pretrained(tmp_path)
    kind = transformers.AutoModelForCausalLM
    again = kind.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(again(tokens).logits, output.logits)


def test_any_text_becomes_the_same_tokens(exported):
    """And a tokenizer that would cut differently is refused."""
    checkpoint, _, words = exported
    fields = fmem.load(checkpoint)[1]["tokenizer"]
    enc = tokenizer.load_tokenizer(fields)
    for text in [tokenizer.EOT, *hf.probes(1000, seed=1)]:
        tokens = tokenizer.encode(enc, text).tolist()
        assert words(text, add_special_tokens=False).input_ids == tokens, repr(text)
        assert words.decode(tokens) == enc.decode(tokens)
    assert words("a").input_ids[0] == enc.eot_token == words.eos_token_id == words.pad_token_id
    # {1,2}+ is possessive in one library, in the other a repetition.
    other = {**fields, "pat_str": r"(?:\p{L}){1,2}+|" + fields["pat_str"]}
    with pytest.raises(ValueError, match="cannot be exported"):
        hf.fast_tokenizer(tokenizer.load_tokenizer(other))


@pytest.mark.parametrize(
    "other, message",
    [
        ({"task": AssociativeRecall}, "not trained on text"),
        ({"layer": Attention}, "transformers has its own"),
    ],
)
def test_what_cannot_be_exported_gets_a_line(other, message, transformers, small, tmp_path, capsys):
    train.train({**small, "out": str(tmp_path / "out"), "max_steps": 1}, **other)
    with pytest.raises(SystemExit):
        hf.main([str(tmp_path / "out/best.pt"), "--out", str(tmp_path / "model")])
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "model").exists()


def test_wheel_is_the_model(tmp_path):
    """Unpacked, `import fmem` in an empty folder gives the model; on a GPU, with its kernel."""
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    built = next(wheel.WheelBuilder(str(hf.ROOT)).build(directory=str(tmp_path)))
    zipfile.ZipFile(built).extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    code = """import torch
torch.cuda.is_available = lambda: True
import fmem
model = fmem.FMem(fmem.FMemConfig(n_layer=1, d_model=16, n_rows=4, k_rows=2))
print(model(torch.zeros(1, 5, dtype=torch.long))[0].shape[-1], fmem.__file__, fmem.kernel)"""
    words = [sys.executable, "-c", code]
    where = {"cwd": tmp_path / "empty", "env": {**os.environ, "PYTHONPATH": f"{tmp_path}/site"}}
    ran = subprocess.run(words, **where, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith(f"1025 {tmp_path / 'site' / 'fmem' / '__init__.py'} ")
    assert ("fmem.kernel" in ran.stdout) == bool(importlib.util.find_spec("triton"))
