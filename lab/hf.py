"""Export a checkpoint for transformers: python -m lab.hf out/best.pt --out exported

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("exported", trust_remote_code=True)
    tokens = model.generate(**tokenizer("ROMEO:", return_tensors="pt"), max_new_tokens=100)

The folder holds config.json, model.safetensors, the code of the model (files of this repository),
tokenizer.json, and SHA256SUMS for `sha256sum --check`. A text becomes the same tokens as here; its
beginning is marked with <|endoftext|>, as in training. It is for the paper's layer and for
ExtendedMemory: transformers has its own attention and Mamba-2. Tested with its versions 5.23.0 and
5.24.0.
"""

import argparse
import hashlib
import json
import random
import re
import sys
import tempfile
from pathlib import Path

import fmem
from data.tokenizer import EOT, encode, load_tokenizer, one_line, printable

ROOT = Path(__file__).resolve().parent.parent
CODE = ("lab/modeling_fmem.py", "lab/layers.py", "fmem.py", "kernel.py", "LICENSE")
LAYERS = ("FactorizationMemory", "ExtendedMemory")


def fast_tokenizer(enc):
    """tiktoken.Encoding -> tokenizers.Tokenizer. Raises ValueError if a text gets other tokens."""
    from tokenizers import processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    # In this library's regular expressions {1,3}+ is no possessive, but a repetition of {1,3}.
    pattern = re.sub(r"(\\p\{\w+\}|\[[^]]*\])(\{\d+,\d+\})\+", r"(?>\1\2)", enc._pat_str)
    special = sorted(enc._special_tokens, key=enc._special_tokens.get)
    converter = TikTokenConverter(enc._mergeable_ranks, pattern, extra_special_tokens=special)
    converter.load_tiktoken_bpe = dict  # they are loaded already
    tokenizer = converter.converted()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOT} $A", special_tokens=[(EOT, enc.eot_token)]
    )
    for name in special:
        if tokenizer.token_to_id(name) != enc._special_tokens[name]:
            raise ValueError(
                f"the tokenizer {enc.name} cannot be exported: {name} has a new number"
            )
    for text in probes(2000):
        if tokenizer.encode(text, add_special_tokens=False).ids != encode(enc, text).tolist():
            raise ValueError(f"the tokenizer {enc.name} cannot be exported: {text[:40]!r} differs")
    return tokenizer


def probes(count, seed=0):
    """Texts of every script, and of few letters, in which tokenizers that differ show it."""
    letters = ("ab", "aaa b", "e \n", "\r\n\t a'", "1 2a", "'s t", "  \u00a0\u3000.", "<|end>")
    starts = (0x20, 0x20, 0x20, 0xA0, 0x370, 0x900, 0x1E00, 0x3040, 0x4E00, 0xAC00, 0x1F300)
    draw = random.Random(seed)
    for _ in range(count):
        some = draw.choice(letters)
        if draw.random() < 0.6:
            start = draw.choice(starts)
            some = [chr(draw.randrange(start, start + 95)) for _ in range(20)] + [*" \n1.'"]
        yield "".join(draw.choice(some) for _ in range(draw.randrange(80)))


def export(checkpoint, out):
    """Write the folder `out` for the checkpoint file. Raises ValueError or OSError, one line."""
    try:
        from safetensors.torch import save_file
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise ValueError(f"exporting needs pip install transformers safetensors: {error}") from None
    if out.exists():
        raise ValueError(f"{out} exists already; --out FOLDER writes elsewhere")
    model, saved = fmem.load(checkpoint)
    if model.layer_name not in LAYERS:
        raise ValueError(f"{model.layer_name} cannot be exported; transformers has its own")
    if saved["tokenizer"] is None:
        raise ValueError(f"{checkpoint} was not trained on text, but on {saved['corpus']}")
    enc = load_tokenizer(saved["tokenizer"])
    # A text that says <|endoftext|> says only that; what is padded is padded on the left.
    special = {"split_special_tokens": True, "padding_side": "left"}
    special |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), EOT)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast_tokenizer(enc), **special)
    config = {"architectures": ["FMemForCausalLM"], "model_type": "fmem", "dtype": "float32"}
    config["auto_map"] = {
        "AutoConfig": "modeling_fmem.FMemHFConfig",
        "AutoModelForCausalLM": "modeling_fmem.FMemForCausalLM",
    }
    config |= {"model": saved["config"], "layer": model.layer_name}
    config["layer_arguments"] = model.layer_arguments
    config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), enc.eot_token)
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    if model.config.tie_embeddings:
        del weights["model.head.weight"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as unfinished:
        work = Path(unfinished) / "exported"  # the folder appears when it is whole
        work.mkdir()
        for name in CODE:
            text = (ROOT / name).read_text(encoding="utf-8")
            text = text.replace("\nfrom fmem import ", "\nfrom .fmem import ")
            (work / Path(name).name).write_text(text, encoding="utf-8")
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(work)
        save_file(weights, work / "model.safetensors", metadata={"format": "pt"})
        (work / "model.safetensors").chmod(0o644)
        sums = []
        for path in sorted(work.iterdir()):
            sums.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
        (work / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
        work.rename(out)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m lab.hf", description="Export for transformers."
    )
    parser.add_argument("checkpoint", type=Path, help="a file that train.py saved")
    parser.add_argument("--out", type=Path, required=True, help="folder, which must not exist yet")
    args = parser.parse_args(argv)
    try:
        export(args.checkpoint, args.out)
    except (ValueError, OSError, UnicodeError) as error:
        sys.exit(f"lab.hf: error: {one_line(error)}")
    print(printable(f"{args.out} is ready for AutoModelForCausalLM.from_pretrained"))


if __name__ == "__main__":
    main()
