"""See what a trained model's memory does with a text: python look.py --prompt "ROMEO:" --generate 60

Writes one HTML file that needs nothing else, no network either: for every token and layer, which earlier tokens it reads from,
with which exact weight; which rows it writes; what each row then holds; what the model expects next. Without arguments it
shows a passage of the validation text to the checkpoint of the default run. inside/record.py has the formulas.
"""
import argparse
import os
import sys
from pathlib import Path

import torch

from data import recall, token_files
from data.messages import one_line, printable
from data.tokenizer import encode
from inside.page import MARK, page, page_data, words_of
from inside.record import record
from sampling.text_state import load_state, read_prompt
from training.checkpoint import load_checkpoint, model_from, tokenizer_of

MOST = 1024         # tokens that a page shows: the map of who reads whom has that many rows and columns


def passage(checkpoint, folder, n):
    """n tokens from the middle of the validation text, from the start of a paragraph if there is one there. Raises ValueError."""
    _, tokens, fields, _ = token_files.load(folder or checkpoint["settings"]["data"])
    if fields != checkpoint["tokenizer"]:
        raise ValueError("--data was prepared with another tokenizer than the checkpoint's; --prompt shows a text of yours")
    enc, start = tokenizer_of(checkpoint), max(min(len(tokens) // 2, len(tokens) - n), 0)
    some = tokens[start:start + 2 * n + 200].tolist()
    pieces = [enc.decode_single_token_bytes(token) for token in some]
    at = next((i for i, piece in enumerate(pieces, 1) if piece.endswith(b"\n") and pieces[i - 2:i - 1] == [b"\n"]), 0)
    return torch.tensor((some[at:] if len(some) - at >= n else some)[:n])


def text_of(checkpoint, model, a):
    """-> tokens [T], how many of them were given, the words of the vocabulary, what came before. Raises ValueError, OSError."""
    if checkpoint["tokenizer"] is None:                 # a recall task: its tokens are numbers
        if a.prompt is not None or a.generate or a.load_state:
            raise ValueError(f"the checkpoint was trained on {checkpoint['corpus']}, not on text: leave --prompt, --generate and "
                             "--load-state out")
        window = recall.Recall(checkpoint["corpus"], checkpoint["settings"]["context"], seed=a.seed)(0)[0, :a.tokens]
        words = [f" {recall.word(token)}" for token in range(model.config.vocab_size)]
        return window, len(window), words, None
    enc = tokenizer_of(checkpoint)
    before = a.load_state and load_state(a.load_state, model, torch.device("cpu"))
    if a.prompt is None and not before:
        tokens = passage(checkpoint, a.data, a.tokens)
    else:
        first = before["token"] if before else enc.eot_token
        tokens = torch.tensor([first, *encode(enc, read_prompt(a.prompt or "")).tolist()])
    given = len(tokens)
    if given + a.generate > MOST:
        raise ValueError(f"a page shows up to {MOST:,} tokens, not {given + a.generate:,}; shorten the text or --generate")
    made = model.generate(tokens[None], a.generate, 0.8, top_p=0.95, generator=torch.Generator().manual_seed(a.seed),
                          state=before and before["state"])
    return torch.cat([tokens, *made]), given, words_of(enc), before


def write(path, text):
    """Write a page whole, or not at all; a file that is no page of ours is left alone. Raises ValueError, OSError."""
    if path.exists():
        with open(path, "rb") as f:
            if MARK.encode() not in f.read(200):
                raise ValueError(f"--out {path} exists and is not a page of look.py; name another file")
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        tmp.write_text(text, encoding="utf-8", newline="\n")
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def look(a):
    """Write the page that the options ask for, and return its data. Raises ValueError, OSError."""
    for name, least, most in (("tokens", 2, MOST), ("generate", 0, MOST), ("seed", 0, 2**63 - 1)):
        if not least <= getattr(a, name) <= most:
            raise ValueError(f"--{name} must be from {least} to {most}, not {getattr(a, name)}")
    best = Path("out/best.pt")
    path = Path(a.checkpoint) if a.checkpoint else best if best.exists() else best.with_name("last.pt")
    checkpoint = load_checkpoint(path)
    model = model_from(checkpoint, "cpu", scan="auto")
    tokens, given, words, before = text_of(checkpoint, model, a)
    if len(tokens) < 2:
        raise ValueError("a text of one token shows nothing; give a longer --prompt, or --generate some tokens")
    layers, logits = record(model, tokens, before["state"] if before else None)
    if not logits.isfinite().all():
        raise ValueError(f"{path}: its weights lead to numbers that are not finite")
    kind = {"memory": "Factorization Memory", "attention": "a Transformer", "mamba2": "Mamba-2"}[model.config.mixer]
    rows = f", {model.config.n_rows} rows, {model.config.k_rows or model.config.n_rows} per token" * (layers[0].kind == "memory")
    shares, half = layers[0].shares()[0].abs(), len(tokens) // 2
    away = (torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))) * shares        # how far back a token reads
    show = half + away.sum(1)[half:].argmax().item()
    about = f"{kind}: {len(layers)} layers{rows}. {path}, step {checkpoint['step']:,}, trained on {checkpoint['corpus']}."
    data = page_data(layers, logits, tokens, words, model.config.norm_eps, made=given, state=bool(before), conv=model.config.conv,
                     show=show, about=printable(about, ""))
    write(a.out, page(data))
    return data


def main(argv=None):
    p = argparse.ArgumentParser(description="See what a trained model's memory does with a text.", allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"look.py: error: {one_line(message)}; --help lists the options\n")
    p.add_argument("--checkpoint", metavar="FILE", help="default: out/best.pt, else out/last.pt")
    p.add_argument("--prompt", help="text to show, FILE:path, or - for standard input (default: some validation text)")
    p.add_argument("--generate", type=int, default=0, metavar="N", help="tokens that the model adds to it (default: 0)")
    p.add_argument("--out", type=Path, default=Path("look.html"), metavar="FILE", help="the page (default: look.html)")
    p.add_argument("--tokens", type=int, default=120, help="length of the passage, if no prompt is given (default: 120)")
    p.add_argument("--data", metavar="DIR", help="prepared folder with the validation text (default: that of the training)")
    p.add_argument("--load-state", metavar="FILE", type=Path, help="continue the text of sample.py --save-state")
    p.add_argument("--seed", type=int, default=1337, help="of the tokens that are generated (default: 1337)")
    a = p.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        torch.set_flush_denormal(True)
        data = look(a)
        size = f"{len(data['tokens'])} tokens, {len(data['layers'])} layers, {a.out.stat().st_size / 1e6:.1f} MB"
        print(printable(f"{a.out}: {size}; open it in a browser"))
    except (ValueError, OSError, RuntimeError) as e:    # RuntimeError: weights that lead to infinity, too little memory
        sys.exit(f"look.py: error: {one_line(e)}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
