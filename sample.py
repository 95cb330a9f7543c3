"""Write text with a trained model: python sample.py --prompt "ROMEO:"

Needs the checkpoint alone (the tokenizer is in it), and takes out/best.pt of the default run if none is named. The text
appears as it is generated; the cost of a token does not grow with the text before it. --save-state keeps the model's state
at the end of a text, a file whose size does not grow either, and --load-state continues from there as if it had never stopped.
"""
import argparse
import codecs
import os
import sys
import time
from pathlib import Path

import torch

from data.messages import one_line, printable
from data.tokenizer import encode, token_strings
from training.checkpoint import load_checkpoint, model_from, tokenizer_of
from training.device import pick_device
from training.text_state import load_state, read_prompt, save_state


def stream(model, enc, prompt, device, seed, before=None, **choice):
    """Print the prompt and what follows, whole characters at a time. Returns the number of tokens, the seconds they took, and
    what a later call needs to continue (its argument `before`)."""
    generator = torch.Generator(device).manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")    # holds back a character until it is complete
    token, state = enc.eot_token, None                              # a text begins where the one before it ended
    if before:
        token, state = before["token"], before["state"]
        generator.set_state(before["generator"].cpu())
        if not prompt:
            decoder.setstate((bytes(before["held"]), 0))
    tokens, pieces = torch.tensor([token, *encode(enc, prompt).tolist()]), token_strings(enc)
    print(printable(prompt), end="", flush=True)
    texts = model.generate(tokens[None].to(device), generator=generator, state=state, **choice)
    made, start = 0, None
    while True:
        try:
            token = next(texts).item()
        except StopIteration as end:
            state = end.value                                       # of all tokens but the last
            break
        start = start or time.perf_counter()                        # the first token is the prompt's work
        made += 1
        if token == enc.eot_token:
            state = None                                            # the next text has an empty memory
            break
        print(printable(decoder.decode(pieces[token])), end="", flush=True)
    seconds = time.perf_counter() - start if start else 0.0
    after = {"token": token, "state": state, "generator": generator.get_state(), "held": list(decoder.getstate()[0])}
    print(printable(decoder.decode(b"", final=True)))
    return max(made - 1, 0), seconds, after


def main(argv=None):
    p = argparse.ArgumentParser(description="Write text with a trained model.", allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"sample.py: error: {one_line(message)}; --help lists the options\n")
    p.add_argument("--checkpoint", metavar="FILE", help="default: out/best.pt, else out/last.pt")
    p.add_argument("--prompt", default="", help="text to continue, FILE:path, or - for standard input (default: none)")
    p.add_argument("--num_samples", type=int, default=1, help="texts to write (default: 1)")
    p.add_argument("--max_new_tokens", type=int, default=300, help="tokens per text, fewer if it ends itself (default: 300)")
    p.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token (default: 0.8)")
    p.add_argument("--top_k", type=int, help="choose among the k likeliest tokens only")
    p.add_argument("--top_p", type=float, default=0.95, help="choose among the likeliest tokens of this total probability "
                   "(default: 0.95)")
    p.add_argument("--seed", type=int, default=1337, help="of the first text; the next has the next (default: 1337)")
    p.add_argument("--save-state", metavar="FILE", type=Path, help="keep the model's state at the end of the text")
    p.add_argument("--load-state", metavar="FILE", type=Path, help="continue that text (the prompt, if any, comes next)")
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
        if a.save_state and (a.num_samples > 1 or a.max_new_tokens < 1):
            raise ValueError("--save-state keeps one text, with at least one token written: --num_samples 1, --max_new_tokens 1")
        best = Path("out/best.pt")
        path = Path(a.checkpoint) if a.checkpoint else best if best.exists() else best.with_name("last.pt")
        device, why = pick_device(a.device)
        checkpoint = load_checkpoint(path, device)
        enc, model = tokenizer_of(checkpoint), model_from(checkpoint, device, scan="auto")
        about = f"{path}: step {checkpoint['step']}, trained on {checkpoint['corpus']}; device {device} ({why})"
        print(printable(about) + "\n", file=sys.stderr)
        prompt, before = read_prompt(a.prompt), a.load_state and load_state(a.load_state, model, device)
        made = seconds = 0
        for i in range(a.num_samples):
            n, t, after = stream(model, enc, prompt, device, a.seed + i, before, max_new_tokens=a.max_new_tokens,
                                 temperature=a.temperature, top_k=a.top_k, top_p=a.top_p)
            made, seconds = made + n, seconds + t
            print("-" * 20 if i + 1 < a.num_samples else "", flush=True)
        if a.save_state:
            save_state(after, a.save_state, model)
        if made > 0:
            print(f"{made / seconds:.0f} tokens/s, the prompt not counted", file=sys.stderr)
    except BrokenPipeError:                             # the reader has enough of it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, RuntimeError) as e:    # RuntimeError: weights that lead to infinity, too little memory
        sys.exit(f"sample.py: error: {one_line(e)}")
    except KeyboardInterrupt:
        print()
        sys.exit(130)


if __name__ == "__main__":
    main()
