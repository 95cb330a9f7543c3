"""Export a checkpoint for transformers: python -m lab.hf out/best.pt --out exported

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("exported", trust_remote_code=True)
    tokens = model.generate(**tokenizer("ROMEO:", return_tensors="pt"), max_new_tokens=100)

The folder holds weights, tokenizer, the model's code, and SHA256SUMS for `sha256sum --check`. Text
becomes the same tokens as here, after an initial <|endoftext|>, as in training. But "<|endoftext|>"
in a text becomes that token, as in the library. Only the memory, extended or not, can be exported.
"""

import argparse
import hashlib
import json
import random
import re
import shutil
from pathlib import Path

import fmem
from data.tokenizer import EOT, encode, load_tokenizer, printable
from train import one_line_errors

TESTED = ["5.20.0", "5.23.0", "5.24.0"]  # versions of transformers
ROOT = Path(__file__).resolve().parent.parent
CODE = ("lab/modeling_fmem.py", "lab/layers.py", "fmem.py", "kernel.py", "LICENSE")


def random_texts(count, seed=0):
    """Random texts, of few letters and of many scripts, that show how a tokenizer splits."""
    draw = random.Random(seed)
    alphabets = ["ab", "\r\n\t a'", "1 2a", "'s t", "  \u00a0\u3000.", "<|end>", "etaoinsh"]
    for start in (0x20, 0xA0, 0x370, 0x900, 0x1E00, 0x3040, 0x4E00, 0xAC00, 0x1F300):
        alphabets.append("".join(map(chr, range(start, start + 95))))
    for _ in range(count):
        letters = draw.choices(draw.choice(alphabets), k=20) + [*" \n1.'"]
        yield "".join(draw.choices(letters, k=draw.randrange(80)))


def fast_tokenizer(enc):
    """tiktoken.Encoding -> tokenizers.Tokenizer. Raises ValueError if their tokens differ."""
    from tokenizers import processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    # tokenizers takes {1,3}+ for a repetition of {1,3}, not for possessive, so use (?>...).
    pattern = re.sub(r"(\\p\{\w+\}|\[[^]]*\])(\{\d+,\d+\})\+", r"(?>\1\2)", enc._pat_str)
    special = sorted(enc._special_tokens, key=enc._special_tokens.get)
    converter = TikTokenConverter(enc._mergeable_ranks, pattern, extra_special_tokens=special)
    converter.load_tiktoken_bpe = dict  # it would read a file, but the ranks are given
    tokenizer = converter.converted()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOT} $A", special_tokens=[(EOT, enc.eot_token)]
    )
    if tokenizer.token_to_id(EOT) != enc.eot_token:  # its ids have gaps
        raise ValueError(f"the tokenizer {enc.name} cannot be exported: {EOT} has a new id")
    for text in random_texts(2000):
        if tokenizer.encode(text, add_special_tokens=False).ids != encode(enc, text).tolist():
            raise ValueError(f"the tokenizer {enc.name} cannot be exported: {text[:40]!r} differs")
    return tokenizer


def export(checkpoint, out):
    """Export a checkpoint file to the empty folder `out`. Raises one-line ValueError, OSError."""
    try:
        from safetensors.torch import save
        from transformers import PreTrainedTokenizerFast
        from transformers.utils.versions import require_version

        require_version(f"transformers>={TESTED[0]}")  # before, its converter wants a file
    except ImportError as error:
        raise ValueError(f"run pip install -U transformers safetensors: {error}") from None
    model, saved = fmem.load(checkpoint)
    if model.layer_name not in ("FactorizationMemory", "ExtendedMemory"):
        raise ValueError(f"{model.layer_name} cannot be exported; transformers has its own")
    if saved["tokenizer"] is None:
        raise ValueError(f"{checkpoint} was not trained on text, but on {saved['corpus']}")
    enc = load_tokenizer(saved["tokenizer"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(enc),
        padding_side="left",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), EOT),
    )
    classes = {
        "AutoConfig": "FMemHFConfig",
        "AutoModel": "FMemModel",
        "AutoModelForCausalLM": "FMemForCausalLM",
    }
    sizes = dict(saved["config"])
    config = {
        "model_type": "fmem",
        "architectures": ["FMemForCausalLM"],
        "auto_map": {auto: f"modeling_fmem.{name}" for auto, name in classes.items()},
        "tie_word_embeddings": sizes.pop("tie_embeddings"),
        **sizes,
        "tested_with": TESTED,
        "layer_arguments": model.layer_arguments,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), enc.eot_token),
    }
    weights = {}
    for name, weight in model.named_parameters():
        name = f"model.{name}".replace("model.embed.", "model.embed_tokens.")
        weights[name.replace("model.head.", "lm_head.")] = weight
    for name in CODE:
        text = (ROOT / name).read_text(encoding="utf-8")
        text = text.replace("\nfrom fmem import ", "\nfrom .fmem import ")
        (out / Path(name).name).write_text(text, encoding="utf-8")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    files = sorted(out.iterdir())
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (out / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="lab.hf", description="Export for transformers.")
    parser.add_argument("checkpoint", type=Path, help="a file that train.py saved")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    args = parser.parse_args(argv)
    with one_line_errors("lab.hf"):
        args.out.mkdir(parents=True)  # fails if it exists
        try:
            export(args.checkpoint, args.out)
        except BaseException:
            shutil.rmtree(args.out)  # so that the command can be repeated
            raise
    print(printable(f"{args.out} is ready for AutoModelForCausalLM.from_pretrained"))


if __name__ == "__main__":
    main()
