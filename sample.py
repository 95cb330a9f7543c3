"""Write text with a trained model: python sample.py --prompt "ROMEO:"

Needs the checkpoint alone (the tokenizer is in it), and takes out/best.pt of the default run if none is named. The
text appears as it is made; the cost of a token does not grow with the text before it.
"""
import argparse
import codecs
import sys
import time
from pathlib import Path

import torch

from data.prepare import load_tokenizer, token_strings
from train import load_checkpoint, model_from, pick_device


def read_prompt(prompt):
    """The prompt as text: itself, FILE:path, or - for standard input. Raises ValueError, OSError."""
    if prompt == "-":
        raw = sys.stdin.buffer.read()
    elif prompt.startswith("FILE:"):
        raw = Path(prompt[5:]).read_bytes()
    else:
        return prompt.encode("utf-8", "replace").decode("utf-8")    # bytes that were not UTF-8 reach us as surrogates
    return raw.decode("utf-8", "replace")


def printable(text):
    """Control characters replaced, so that no text can steer the terminal it is printed on."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def stream(model, enc, prompt, device, seed, **choice):
    """Print the prompt and what follows, whole characters at a time. Returns (tokens made, seconds for them)."""
    tokens = [enc.eot_token] + enc.encode_ordinary(prompt)          # a text begins where the one before it ended
    pieces = token_strings(enc)
    generator = torch.Generator(device).manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")    # holds back a character until it is complete
    print(printable(prompt), end="", flush=True)
    made, start = 0, None
    for token in model.generate(torch.tensor([tokens], device=device), generator=generator, **choice):
        start = start or time.perf_counter()                        # the first token is the prompt's work
        made += 1
        if token.item() == enc.eot_token:
            break
        print(printable(decoder.decode(pieces[token.item()])), end="", flush=True)
    print(printable(decoder.decode(b"", final=True)))
    return max(made - 1, 0), time.perf_counter() - start if start else 0.0


def main(argv=None):
    p = argparse.ArgumentParser(description="Write text with a trained model.", allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"sample.py: error: {message}; --help lists the options\n")
    p.add_argument("--checkpoint", metavar="FILE", help="default: out/best.pt, else out/last.pt")
    p.add_argument("--prompt", default="", help="text to continue, FILE:path, or - for standard input (default: none)")
    p.add_argument("--num_samples", type=int, default=1, help="texts to write (default: 1)")
    p.add_argument("--max_new_tokens", type=int, default=300, help="tokens per text, fewer if it ends itself (default: 300)")
    p.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token (default: 0.8)")
    p.add_argument("--top_k", type=int, help="choose among the k likeliest tokens only")
    p.add_argument("--top_p", type=float, default=0.95, help="choose among the likeliest tokens of this total probability "
                   "(default: 0.95)")
    p.add_argument("--seed", type=int, default=1337, help="of the first text; the next has the next (default: 1337)")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu, or auto (default: auto)")
    a = p.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        torch.set_flush_denormal(True)
        if a.num_samples < 1:
            raise ValueError(f"--num_samples must be at least 1, not {a.num_samples}")
        if not 0 <= a.seed < 2**63:
            raise ValueError(f"--seed must be from 0 to 2**63 - 1, not {a.seed}")
        best = Path("out/best.pt")
        path = Path(a.checkpoint) if a.checkpoint else best if best.exists() else best.with_name("last.pt")
        device, why = pick_device(a.device)
        checkpoint = load_checkpoint(path, device)
        if checkpoint["tokenizer"] is None:
            raise ValueError(f"{path} was trained on {checkpoint['corpus']}, not on text; "
                             f"python eval.py {path} --recall tests it")
        model, enc = model_from(checkpoint, device, scan="auto"), load_tokenizer(checkpoint["tokenizer"])
        print(f"{path}: step {checkpoint['step']}, trained on {checkpoint['corpus']}; device {device} ({why})\n", file=sys.stderr)
        prompt = read_prompt(a.prompt)
        made = seconds = 0
        for i in range(a.num_samples):
            n, t = stream(model, enc, prompt, device, a.seed + i, max_new_tokens=a.max_new_tokens,
                          temperature=a.temperature, top_k=a.top_k, top_p=a.top_p)
            made, seconds = made + n, seconds + t
            print("-" * 20 if i + 1 < a.num_samples else "", flush=True)
        if made > 0:
            print(f"{made / seconds:.0f} tokens/s, the prompt not counted", file=sys.stderr)
    except (ValueError, OSError) as e:
        sys.exit(f"sample.py: error: {e}")
    except KeyboardInterrupt:
        print()
        sys.exit(130)


if __name__ == "__main__":
    main()
