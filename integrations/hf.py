"""Export a checkpoint for transformers: python -m integrations.hf out/best.pt --out DIR

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("DIR", trust_remote_code=True)
    tokens = model.generate(**tokenizer("ROMEO:", return_tensors="pt"), max_new_tokens=100, do_sample=True)

Writes config.json, model.safetensors, the code of the model (the files of this repository, with their imports made relative),
tokenizer.json and its settings, and SHA256SUMS of all, which `--check DIR` and sha256sum compare. Needs safetensors and
tokenizers, which transformers brings. Any text becomes the same tokens as here; its beginning is marked with <|endoftext|>, as in
training.
"""
import argparse
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import torch

from data.messages import DataError, one_line
from data.token_files import file_hash
from data.tokenizer import EOT, encode
from training.checkpoint import load_checkpoint, model_from, tokenizer_of

SUMS = "SHA256SUMS"
ROOT = Path(__file__).resolve().parent.parent
CODE = {"modeling_fmem.py": "integrations/modeling_fmem.py", "fmem.py": "fmem.py",
        **{f"{name}.py": f"variants/{name}.py" for name in ("build", "ablations", "attention", "extended", "mamba2")}}


def flat(source):
    """A file's code with imports of the others from the same folder."""
    return re.sub(r"^from (?:variants\.)?(fmem|build|ablations|attention|extended|mamba2) import", r"from .\1 import", source,
                  flags=re.MULTILINE)


# ----------------------------------------------------------------------------------------------------------- tokenizer

def printable_bytes():
    """The character that stands for each byte in a tokenizer.json: itself where it can be seen, else one from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in seen]
    return {**{b: chr(b) for b in seen}, **{b: chr(256 + i) for i, b in enumerate(hidden)}}


def fast_tokenizer(enc):
    """tiktoken.Encoding -> tokenizers.Tokenizer with the same tokens. Raises DataError where some text gets others.

    tiktoken joins the two neighbours whose whole has the lowest rank, a tokenizer.json the pair that stands first in a list: of
    every token all pairs that make it, in the order of the tokens. A word that is a token is taken whole in both.
    """
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    except ImportError:
        raise DataError("exporting needs the package tokenizers; pip install transformers") from None
    shown, ranks, merges = printable_bytes(), enc._mergeable_ranks, []
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    words = {token: "".join(shown[b] for b in token) for token in ranks}
    made = Tokenizer(models.BPE({words[token]: rank for token, rank in ranks.items()}, [(words[a], words[b]) for a, b in merges],
                                ignore_merges=True))
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in enc._special_tokens])
    # In this library's kind of regular expressions {1,3}+ is not possessive but a repetition of {1,3}.
    pattern = re.sub(r"(\\p\{\w+\}|\[[^]]*\])(\{\d+,\d+\})\+", r"(?>\1\2)", enc._pat_str)
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single=f"{EOT} $A", pair=f"{EOT} $A {EOT} $B",
                                                        special_tokens=[(EOT, enc.eot_token)])
    for text in probes(2000):
        if made.encode(text, add_special_tokens=False).ids != encode(enc, text).tolist():
            raise DataError(f"the tokenizer {enc.name} cannot be exported: as a tokenizer.json it cuts {text[:40]!r} differently")
    return made


def probes(n, seed=0):
    """Texts of every script and of few letters, in which a tokenizer that differs somewhere is likely to show it."""
    g = random.Random(seed)
    scripts = [(0x20, 0x7f), (0xa0, 0x250), (0x370, 0x600), (0x900, 0xe00), (0x1e00, 0x2100), (0x3040, 0x3100), (0x4e00, 0x9fff),
               (0xac00, 0xd7a4), (0x1f300, 0x1f700), (0, 0xd800), (0xe000, 0x110000)]
    few = ["ab", "aaa b", "e \n", "\r\n\t a'", "1 2a", "'s t", "  \u00a0\u3000.", EOT]
    for _ in range(n):
        if g.random() < 0.4:
            letters = g.choice(few)
            yield "".join(g.choice(letters) for _ in range(g.randrange(80)))
        else:
            low, high = g.choice(scripts)
            letters = (chr(g.randrange(low, high)) if g.random() < 0.7 else g.choice(" \n\t  1.'")
                       for _ in range(g.randrange(60)))
            yield "".join(letters)


# ---------------------------------------------------------------------------------------------------------------- export

def export(checkpoint, out):
    """Write the folder `out` for a checkpoint (training.checkpoint.load_checkpoint). Raises ValueError, OSError."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise DataError("exporting needs the package safetensors; pip install transformers") from None
    enc = tokenizer_of(checkpoint)
    model, tokenizer = model_from(checkpoint, "cpu", scan="auto"), fast_tokenizer(enc)
    weights = {f"model.{name}": weight.contiguous() for name, weight in model.state_dict().items()}
    if model.config.tie_embeddings:
        del weights["model.head.weight"]
    fields = {name: getattr(model.config, name) for name in type(model.config).__dataclass_fields__}
    end = enc.eot_token
    config = {"architectures": ["FMemForCausalLM"], "model_type": "fmem", "model": fields, "dtype": "float32",
              "auto_map": {"AutoConfig": "modeling_fmem.FMemHFConfig", "AutoModelForCausalLM": "modeling_fmem.FMemForCausalLM"},
              "bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "use_cache": True}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT, "eos_token": EOT, "pad_token": EOT,
                "split_special_tokens": True,    # a text that says <|endoftext|> says only that
                "clean_up_tokenization_spaces": False, "padding_side": "left",
                "model_input_names": ["input_ids", "attention_mask"], "model_max_length": 10**9}
    work = out.parent / f".{out.name}.part"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        save_file(weights, work / "model.safetensors", metadata={"format": "pt"})
        for name, path in CODE.items():
            (work / name).write_text(flat((ROOT / path).read_text(encoding="utf-8")), encoding="utf-8")
        for name, content in (("config", config), ("tokenizer_config", settings),
                              ("generation_config", {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end})):
            (work / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(str(work / "tokenizer.json"))
        shutil.copy(ROOT / "LICENSE", work)
        (work / "model.safetensors").chmod(0o644)
        sums = "".join(f"{file_hash(file)}  {file.name}\n" for file in sorted(work.iterdir()))
        (work / SUMS).write_text(sums, encoding="utf-8")
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check(folder):
    """Raises DataError if a file of an exported folder is not as it was written."""
    try:
        sums = dict(reversed(line.split("  ", 1)) for line in (folder / SUMS).read_text(encoding="utf-8").splitlines())
        if not {*CODE, "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= sums.keys():
            raise ValueError("files are missing")
        wrong = [name for name, sha in sums.items() if "/" in name or file_hash(folder / name) != sha]
    except (OSError, ValueError) as e:
        raise DataError(f"{folder} is not an exported folder: {one_line(e)}; export the checkpoint again") from None
    if wrong:
        raise DataError(f"{folder} is damaged: {', '.join(wrong)} is not as it was written; export the checkpoint again")


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m integrations.hf", description="Export a checkpoint for transformers.",
                                allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"integrations.hf: error: {one_line(message)}; --help lists the options\n")
    p.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, nargs="?")
    p.add_argument("--out", metavar="DIR", type=Path, help="folder to write, which must not exist")
    p.add_argument("--check", metavar="DIR", type=Path, help="only compare an exported folder with its checksums")
    a = p.parse_args(argv)
    try:
        if a.check:
            check(a.check)
            print(f"{a.check} is whole")
            return
        if not a.checkpoint or not a.out:
            p.error("it takes a CHECKPOINT and --out DIR")
        if a.out.exists():
            raise DataError(f"{a.out} exists already; --out DIR writes elsewhere")
        torch.set_flush_denormal(True)
        export(load_checkpoint(a.checkpoint), a.out)
    except (ValueError, OSError, RuntimeError) as e:
        sys.exit(f"integrations.hf: error: {one_line(e)}")
    print(f"{a.out} is ready: AutoModelForCausalLM.from_pretrained({str(a.out)!r}, trust_remote_code=True)")


if __name__ == "__main__":
    main()
