"""lab/hf.py: an exported model is the same in transformers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

import fmem
import train
from data import tokenizer
from lab import hf
from lab.layers import ExtendedMemory

EXTENDED = (ExtendedMemory, {"conv": 3, "gate": True, "shared_row": True, "shift": True})


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """The package, offline, with its copies of our code in a temporary folder."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module", params=[(), EXTENDED], ids=["paper", "extended"])
def exported(request, transformers, small, tmp_path_factory):
    """The checkpoint of a short run, and its model and tokenizer in transformers."""
    folder = tmp_path_factory.mktemp("run")
    train.train({**small, "out": str(folder / "out"), "lr": 2e-2}, *request.param)
    hf.main([str(folder / "out/best.pt"), "--out", str(folder / "model")])
    kind = transformers.AutoModelForCausalLM
    theirs = kind.from_pretrained(folder / "model", trust_remote_code=True).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=True)
    return folder / "out/best.pt", theirs, words


@torch.no_grad()
def test_logits_and_states_match_ours(exported):
    """For the whole sequence, and split and stepped with the state under either name."""
    checkpoint, theirs, _ = exported
    tokens = torch.randint(300, (3, 50))
    expected, _ = fmem.load(checkpoint)[0](tokens)
    torch.testing.assert_close(theirs(tokens).logits, expected)
    for name in ("cache", "past_key_values"):
        state = None
        logits = []
        for piece in tokens.split([20, 20, *[1] * 10], 1):
            output = theirs(piece, **{name: state})
            logits.append(output.logits)
            state = output.to_tuple()[-1]
        logits = torch.cat(logits, 1)
        # The chunks of a split sequence begin elsewhere, so float32 rounds differently.
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_generate_matches_ours(exported, monkeypatch):
    """The same tokens. After the prompt, every call reads one token from the previous state."""
    checkpoint, theirs, words = exported
    prompt = words("the river of", return_tensors="pt")
    ours = fmem.load(checkpoint)[0].generate(prompt.input_ids, 40, temperature=0)
    embed = Mock(side_effect=theirs.model.embed_tokens.forward)
    monkeypatch.setattr(theirs.model.embed_tokens, "forward", embed)
    tokens = theirs.generate(**prompt, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert tokens[0, prompt.input_ids.shape[1] :].tolist() == [token.item() for token, _ in ours]
    shapes = [call.args[0].shape for call in embed.call_args_list]
    assert shapes == [prompt.input_ids.shape] + [(1, 1)] * 39


@torch.no_grad()
def test_unsupported_arguments_are_refused(exported, transformers):
    """What would lose the state is refused in one line. A given state is not changed."""
    _, theirs, _ = exported
    tokens = torch.randint(300, (2, 9))
    state = theirs(tokens).to_tuple()[-1]
    again = theirs(tokens[:, :1], cache=state).logits
    for arguments, message in (
        ({"memory": state}, "does not accept memory"),
        ({"cache": transformers.DynamicCache()}, "one that this model"),
        ({"input_ids": tokens[:1], "cache": state}, "state of 2, input of 1"),
        ({"inputs_embeds": torch.zeros(2, 1, 16)}, "either input_ids or inputs_embeds"),
        ({"input_ids": tokens[0]}, r"must be \[B, T\]"),
        ({"attention_mask": torch.ones(2, 1)}, "attention_mask must be"),
    ):
        with pytest.raises(ValueError, match=message):
            theirs(**{"input_ids": tokens, **arguments})
    assert torch.equal(theirs(tokens[:, :1], cache=state).logits, again)


@torch.no_grad()
def test_left_padding_is_ignored(exported):
    """A batch of sequences of several lengths gives the same as each alone: in one call, in pieces
    shorter than the padding, and in generation. Also beams, with and without the state."""
    _, theirs, words = exported
    texts = ["the", "über naïve 東京 and the river", "a king"]
    batch = words(texts, return_tensors="pt", padding=True)
    together = theirs(**batch).logits
    first = theirs(batch.input_ids[:, :3], attention_mask=batch.attention_mask[:, :3])
    rest = theirs(batch.input_ids[:, 3:], batch.attention_mask, cache=first.to_tuple()[-1])
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    generated = theirs.generate(**batch, **greedy)
    for i, text in enumerate(texts):
        alone = words(text, return_tensors="pt")
        want = theirs(**alone).logits[0]
        torch.testing.assert_close(together[i, -len(want) :], want, atol=1e-5, rtol=0)
        torch.testing.assert_close(rest.logits[i, -1], want[-1], atol=1e-5, rtol=0)
        assert generated[i, -12:].tolist() == theirs.generate(**alone, **greedy)[0, -12:].tolist()
    beams = [theirs.generate(**batch, **greedy, num_beams=3, use_cache=c) for c in (True, False)]
    assert torch.equal(*beams)


@torch.no_grad()
def test_padding_after_text_is_ignored(exported):
    """In the middle and at the end: the outputs and the last state. A convolution would see it."""
    _, theirs, _ = exported
    if theirs.config.layer_arguments:
        pytest.skip("the layer has a convolution")
    tokens = torch.randint(300, (2, 30))
    mask = torch.ones_like(tokens)
    mask[0, 10:17] = mask[0, -3:] = 0
    padded = theirs(tokens, attention_mask=mask)
    real = theirs(tokens[:1, mask[0] == 1])
    torch.testing.assert_close(padded.logits[:1, mask[0] == 1], real.logits, atol=1e-5, rtol=0)
    states = [[h[:1] for h, _ in output.to_tuple()[-1].layers] for output in (padded, real)]
    torch.testing.assert_close(*states, atol=1e-5, rtol=0)


def test_loss_gradient_and_saving(exported, transformers, tmp_path):
    """The loss of the labels that count, a gradient for each weight, saving and loading."""
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
    load = transformers.AutoModelForCausalLM.from_pretrained
    assert torch.equal(load(tmp_path, trust_remote_code=True)(tokens).logits, output.logits)
    half = load(tmp_path, trust_remote_code=True, dtype="bfloat16")(tokens).logits.float()
    assert (half - output.logits).norm() < 0.05 * output.logits.norm()


@torch.no_grad()
def test_library_features(exported, transformers, tmp_path):
    """Embeddings as input, hidden states, logits_to_keep, overrides, continuations of a state."""
    _, theirs, _ = exported
    tokens = torch.randint(300, (2, 9))
    output = theirs(tokens, output_hidden_states=True)
    embedded = theirs(inputs_embeds=theirs.get_input_embeddings()(tokens), logits_to_keep=2)
    assert torch.equal(embedded.logits, output.logits[:, -2:])
    assert len(output.hidden_states) == theirs.config.num_hidden_layers + 1
    assert torch.equal(theirs.lm_head(output.hidden_states[-1]), output.logits)
    state = theirs(tokens[:1, :5]).to_tuple()[-1]
    both = theirs(tokens[:1, 5:].expand(2, -1), cache=state.batch_repeat_interleave(2)).logits
    torch.testing.assert_close(both, output.logits[:1, 5:].expand(2, -1, -1), atol=1e-5, rtol=0)

    name = "cache" if "cache" in output else "past_key_values"
    with pytest.raises(ValueError, match="all tokens so far"):
        theirs.generate(tokens[:1, :5], max_new_tokens=2, **{name: state})

    theirs.resize_token_embeddings(310)
    theirs.save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    again = load(tmp_path, trust_remote_code=True, use_cache=False, dropout=0.25)
    assert again(tokens).logits.shape == (2, 9, 310)
    assert again(tokens).to_tuple()[1:] == () and again.model.dropout.p == 0.25
    theirs.resize_token_embeddings(301)


def test_missing_weights_are_initialised(exported, transformers, tmp_path):
    """Only these, and as in a new model; the output layer too, if it is not tied."""
    _, theirs, _ = exported
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    safetensors = pytest.importorskip("safetensors.torch")
    weights = safetensors.load_file(file)
    lost = [name for name in weights if name.startswith("model.blocks.0.memory.")]
    for name in lost:
        del weights[name]
    safetensors.save_file(weights, file, metadata={"format": "pt"})
    load = transformers.AutoModelForCausalLM.from_pretrained
    again = load(tmp_path, trust_remote_code=True, tie_word_embeddings=False)
    new = fmem.FMem(
        again.config.fmem_config(), type(again.model.blocks[0].memory), again.config.layer_arguments
    )
    for name, weight in again.named_parameters():
        if name in weights:
            assert torch.equal(weight, theirs.get_parameter(name))
        elif name in lost:
            want = new.get_parameter(name.removeprefix("model."))
            assert weight.isfinite().all()
            assert weight.std().item() == pytest.approx(want.std().item(), rel=0.5, nan_ok=True)
    assert again.lm_head.weight.std().item() == pytest.approx(fmem.EMBED_STD, rel=0.05)


def test_hooks_and_replaced_modules_run_at_every_token(exported):
    """Also a quantised layer, whose weight has no floating-point type."""
    checkpoint, _, _ = exported
    model, _ = fmem.load(checkpoint)

    class Quantised(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.scale = linear.weight.abs().max() / 127
            self.weight = torch.nn.Parameter((linear.weight / self.scale).round().char(), False)
            self.calls = []

        def forward(self, x):
            self.calls.append(x.dtype)
            return x @ (self.weight.float() * self.scale).T

    tokens = torch.randint(300, (1, 20))
    with torch.no_grad():
        want, _ = model(tokens)
        memory = model.blocks[0].memory
        memory.W_alpha = Quantised(memory.W_alpha)
        assert (model(tokens)[0] - want).norm() < 0.02 * want.norm()
    assert len(list(model.generate(tokens, 40))) == 40
    assert memory.W_alpha.calls == [torch.float32] * 41


def test_any_text_gives_the_same_tokens(exported):
    """Except special tokens, which are recognised, as everywhere in the library."""
    checkpoint, _, words = exported
    enc = tokenizer.load_tokenizer(fmem.load(checkpoint)[1]["tokenizer"])
    for text in hf.random_texts(1000, seed=1):
        tokens = tokenizer.encode(enc, text).tolist()
        assert words(text, add_special_tokens=False).input_ids == tokens, repr(text)
        assert words.decode(tokens) == enc.decode(tokens)
    end = enc.eot_token
    assert words(f"a{tokenizer.EOT}b").input_ids == [end, *enc.encode("a"), end, *enc.encode("b")]
    words.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    assert len(words("<|user|>", add_special_tokens=False).input_ids) == 1
    assert end == words.eos_token_id == words.pad_token_id


LIBRARY_TEST = """
import unittest

import torch
from torch.utils import _pytree as pytree
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from ...generation.test_utils import GenerationTesterMixin
from ...test_modeling_common import ModelTesterMixin, ids_tensor
from ...test_training_mixin import TrainingTesterMixin
from .modeling_fmem import *

modeling_auto.MODEL_MAPPING_NAMES["fmem"] = "FMemModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["fmem"] = "FMemForCausalLM"
AutoConfig.register("fmem", FMemHFConfig)


class FMemTester:
    causal_lm_class = FMemForCausalLM
    batch_size, seq_length, hidden_size, num_hidden_layers = 3, 7, 32, 2
    is_training = True
    layer = {}

    def get_config(self):
        sizes = dict(vocab_size=99, d_model=32, n_layer=2, n_rows=8, k_rows=3, pad_token_id=0)
        return FMemHFConfig(**sizes, bos_token_id=1, eos_token_id=2, **self.layer)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"input_ids": ids_tensor([3, 7], 99)}


class PaperTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (FMemModel, FMemForCausalLM)
    has_attentions = False
    test_can_init_all_missing_weights_before_2023 = True  # the year stands in their licence only
    model_tester = FMemTester()

    # The suite has these two overridden for caches that are not the library's own.
    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        assert past_key_values.get_seq_length() == seq_length
        assert {len(part) for part in pytree.tree_leaves(past_key_values.layers)} == {batch_size}

    def _check_caches_are_equal(self, one, other):
        torch.testing.assert_close(pytree.tree_leaves(one), pytree.tree_leaves(other))


class ExtendedTest(PaperTest):
    model_tester = FMemTester()
    model_tester.layer = dict(layer_arguments=EXTENSIONS)
"""


@pytest.mark.slow
def test_library_suite(transformers, tmp_path):
    """Its tests of a model, of training and of generate, which no source distribution has."""
    unpacked = os.environ.get("TRANSFORMERS_TESTS")
    if not unpacked:
        pytest.skip("set TRANSFORMERS_TESTS to a checkout of transformers")
    shutil.copytree(Path(unpacked, "tests"), tmp_path / "tests")
    folder = tmp_path / "tests/models/fmem"
    folder.mkdir(parents=True)
    for name in ("lab/modeling_fmem.py", "lab/layers.py", "fmem.py", "kernel.py"):
        text = (hf.ROOT / name).read_text().replace("\nfrom fmem import", "\nfrom .fmem import")
        (folder / Path(name).name).write_text(text)
    test = LIBRARY_TEST.replace("EXTENSIONS", str(EXTENDED[1]))
    (folder / "test_modeling_fmem.py").write_text(test)
    for package in (tmp_path / "tests").rglob("*.py"):
        (package.parent / "__init__.py").touch()
    (folder.parent / "__init__.py").touch()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    print(done.stdout[-5000:])
    assert done.returncode == 0
