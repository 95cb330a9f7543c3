"""lab/hf.py: an exported model is the same model in transformers. And the wheel is the model."""

import copy
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fmem
import train
from data import tokenizer
from lab import hf
from lab.layers import Attention, ExtendedMemory
from lab.tasks import AssociativeRecall

ROOT = Path(__file__).resolve().parent.parent
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
def checkpoint(request, small, tmp_path_factory):
    """A short run with one of the layers that can be exported."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    layer, arguments = LAYERS[request.param]
    train.train({**small, "out": str(folder), "lr": 2e-2, "d_model": 32}, layer, arguments)
    return folder / "best.pt"


@pytest.fixture(scope="module")
def exported(transformers, checkpoint, tmp_path_factory):
    """The folder, the model and the tokenizer of transformers, and our model."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    hf.main([str(checkpoint), "--out", str(folder)])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    words = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return folder, theirs.eval(), words, fmem.load(checkpoint)[0]


def state_of(output):
    """The state under the name that the installed version has for it."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_logits_and_states_are_ours(name, exported):
    """In one piece, and split and stepped with the state under either name."""
    _, theirs, _, ours, *_ = exported
    tokens = torch.randint(300, (3, 50))
    expected, _ = ours(tokens)
    assert expected.std() > 0.1
    whole = theirs(tokens)
    assert torch.allclose(whole.logits, expected, **CLOSE)
    assert torch.allclose(theirs(tokens, logits_to_keep=2).logits, expected[:, -2:], **CLOSE)
    parts = [theirs(tokens[:, :20])]
    state = state_of(parts[0])
    parts.append(theirs(tokens[:, 20:40], **{name: state}))
    parts += [theirs(tokens[:, t : t + 1], **{name: state}) for t in range(40, 50)]
    assert torch.allclose(torch.cat([part.logits for part in parts], 1), expected, **CLOSE)


def test_generate_is_ours(exported, monkeypatch):
    """The same tokens; and after the prompt every call reads one token, from the state before."""
    _, theirs, words, ours = exported
    prompt = words("the river of", return_tensors="pt")
    expected = [int(token) for token in ours.generate(prompt.input_ids, 40, temperature=0)]
    shapes = []
    hidden = theirs.model.hidden

    def watched(tokens, state=None):
        assert shapes == [] or state is not None
        shapes.append(tuple(tokens.shape))
        return hidden(tokens, state)

    monkeypatch.setattr(theirs.model, "hidden", watched)
    made = theirs.generate(**prompt, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert made[0, prompt.input_ids.shape[1] :].tolist() == expected
    assert shapes == [tuple(prompt.input_ids.shape)] + [(1,)] * 39


@torch.no_grad()
def test_nothing_is_swallowed(exported, transformers):
    """What would lose the state, or read padding into it, is refused in a line."""
    _, theirs, *_ = exported
    tokens = torch.randint(300, (2, 9))
    state = state_of(theirs(tokens))
    token = tokens[:, :1]
    mask = torch.ones(2, 10, dtype=torch.long)
    holed = mask.clone()
    holed[0, 9] = 0
    right = torch.ones(2, 9, dtype=torch.long)
    right[1, 5:] = 0
    padded_right = state_of(theirs(tokens, attention_mask=right))
    cases = [
        ({"input_ids": token, "memory": state}, "does not know the arguments memory"),
        ({"input_ids": token, "output_hidden_states": True}, "output_hidden_states"),
        ({"input_ids": token, "cache": transformers.DynamicCache()}, "one that this model"),
        ({"input_ids": token[:1], "cache": state}, "2 sequences, input_ids 1"),
        ({"input_ids": token, "cache": state, "past_key_values": state}, "one of the two"),
        ({"input_ids": token, "attention_mask": mask}, "for every token so far"),
        ({"input_ids": token, "cache": state, "attention_mask": holed}, "after the first call"),
        ({"input_ids": token, "cache": padded_right}, "padded left"),
        ({"input_ids": tokens, "attention_mask": 0 * right}, "without a token"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            theirs(**arguments)
        assert "\n" not in str(error.value)
    assert state.get_seq_length() == 9  # none of them has touched it


@torch.no_grad()
def test_state_can_be_copied(exported):
    """Two continuations of one text, each from a copy."""
    _, theirs, *_ = exported
    tokens = torch.randint(300, (1, 12))
    state = state_of(theirs(tokens[:, :10]))
    first = theirs(tokens[:, 10:], cache=copy.deepcopy(state)).logits
    assert torch.equal(theirs(tokens[:, 10:], cache=state).logits, first)


def test_padding_on_the_left_is_not_read(exported):
    """Texts of several lengths side by side: each as alone. And beams, with and without state."""
    _, theirs, words, _ = exported
    texts = ["the", "über naïve 東京 and the river", "a king", "in it his ship was lost", "the"]
    batch = words(texts, return_tensors="pt", padding=True)
    assert not batch.attention_mask.all()
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = theirs.generate(**batch, **greedy)
    with torch.no_grad():
        logits = theirs(**batch).logits
    for i, text in enumerate(texts):
        alone = words(text, return_tensors="pt")
        assert together[i, -12:].tolist() == theirs.generate(**alone, **greedy)[0, -12:].tolist()
        with torch.no_grad():
            expected = theirs(**alone).logits[0]
        assert torch.allclose(logits[i, -len(expected) :], expected, **CLOSE)
    beams = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    with_state = theirs.generate(**batch, **beams)
    assert torch.equal(with_state, theirs.generate(**batch, **beams, use_cache=False))


def test_loss_gradient_and_saving(exported, transformers, tmp_path):
    """The loss of the labels that count, a gradient for each weight; saved and loaded again."""
    folder, theirs, _, ours = exported
    tokens = torch.randint(300, (4, 25))
    labels = tokens.clone()
    labels[:, :10] = -100
    loss = theirs(tokens, labels=labels).loss
    expected = F.cross_entropy(ours(tokens)[0][:, 9:-1].flatten(0, 1), tokens[:, 10:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert all(weight.grad is not None for weight in theirs.parameters())
    theirs.zero_grad()
    theirs.save_pretrained(tmp_path / "again")
    kind = transformers.AutoModelForCausalLM
    again = kind.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)


def test_any_text_becomes_the_same_tokens(exported, checkpoint):
    _, _, words, _ = exported
    enc = tokenizer.load_tokenizer(fmem.load(checkpoint)[1]["tokenizer"])
    for text in hf.probes(3000, seed=1):
        expected = tokenizer.encode(enc, text).tolist()
        assert words(text, add_special_tokens=False).input_ids == expected, repr(text)
        assert words.decode(expected) == enc.decode(expected)
    assert words("a").input_ids[0] == enc.eot_token == words.eos_token_id == words.pad_token_id
    written = words(tokenizer.EOT, add_special_tokens=False).input_ids
    assert written == enc.encode_ordinary(tokenizer.EOT)


def test_tokenizer_that_cuts_differently_is_refused(transformers, checkpoint):
    """(?:a|b){1,2}+ is possessive in one library, in the other a repetition."""
    fields = fmem.load(checkpoint)[1]["tokenizer"]
    fields = {**fields, "pat_str": r"(?:\p{L}){1,2}+|" + fields["pat_str"]}
    with pytest.raises(ValueError, match="cannot be exported"):
        hf.fast_tokenizer(tokenizer.load_tokenizer(fields))


def test_what_cannot_be_exported_gets_a_line(transformers, checkpoint, small, tmp_path):
    recall = {**small, "out": str(tmp_path / "recall"), "max_steps": 1}
    train.train(recall, task=AssociativeRecall)
    attention = {**small, "out": str(tmp_path / "attention"), "max_steps": 1}
    train.train(attention, Attention)
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:999])
    cases = [
        (checkpoint, tmp_path, "exists already"),
        (tmp_path / "cut.pt", tmp_path / "a", "cannot be read as a checkpoint"),
        (tmp_path / "none.pt", tmp_path / "a", "does not exist"),
        (tmp_path / "recall/best.pt", tmp_path / "a", "not trained on text"),
        (tmp_path / "attention/best.pt", tmp_path / "a", "transformers has its own"),
    ]
    for path, out, message in cases:
        with pytest.raises(SystemExit, match=rf"lab\.hf: error: .*{message}") as error:
            hf.main([str(path), "--out", str(out)])
        assert error.value.code.isprintable()
    assert not (tmp_path / "a").exists()


def test_wheel_is_the_model(tmp_path):
    """Built and unpacked, `import fmem` in an empty folder gives the model, and its kernel."""
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    built = next(wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path)))
    zipfile.ZipFile(built).extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    code = (
        "import sys, torch; torch.cuda.is_available = lambda: len(sys.argv) > 1; import fmem; "
        "model = fmem.FMem(fmem.FMemConfig(n_layer=1, d_model=16, n_rows=4, k_rows=2)); "
        "print(model(torch.zeros(1, 5, dtype=torch.long))[0].shape[-1], fmem.__file__, fmem.kernel)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    pretended = [["a GPU"]] if importlib.util.find_spec("triton") else []
    for arguments in [[], *pretended]:
        words = [sys.executable, "-c", code, *arguments]
        folder = tmp_path / "empty"
        ran = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.startswith(f"1025 {tmp_path / 'site' / 'fmem' / '__init__.py'} ")
        assert ("fmem.kernel" in ran.stdout) == bool(arguments)
