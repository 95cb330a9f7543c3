"""Write text with a trained model: python sample.py --prompt "ROMEO:"

Needs the checkpoint alone (the tokenizer is in it), and takes out/best.pt of the default run if none is named. The text
appears as it is generated; the cost of a token does not grow with the text before it. --save-state keeps the model's state
at the end of a text, a file whose size does not grow either, and --load-state continues from there as if it had never stopped.
--interactive reads lines and continues them, each with the memory of all before.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import torch

from data.messages import one_line, printable
from sampling.interactive import Conversation
from sampling.text_state import load_state, read_prompt, save_state
from sampling.texts import Writing
from training.checkpoint import load_checkpoint, model_from, tokenizer_of
from training.device import pick_device

AT_ONCE = 32        # texts that are written side by side


def write(a, model, enc, device, prompt, before, choice):
    """Write and print the texts that the options `a` ask for. Returns the last Writing, and tokens and seconds of all."""
    made, seconds, left = 0, 0.0, a.num_samples
    for first in range(0, a.num_samples, AT_ONCE):
        seeds = range(a.seed + first, a.seed + min(first + AT_ONCE, a.num_samples))
        writing = Writing(model, enc, prompt, device, seeds, before, a.stop, **choice)
        begun = False
        for _, piece in writing.in_order():
            if a.json:
                continue
            if not begun:
                print(printable(prompt), end="", flush=True)
            begun = piece is not None
            left -= piece is None
            print(printable(piece) if begun else "\n" + "-" * 20 * (left > 0), end="" if begun else "\n", flush=True)
        for text in writing.texts if a.json else ():
            print(json.dumps({"seed": text.seed, "prompt": prompt, "text": text.shown, "tokens": text.tokens,
                              "logprobs": [round(p, 5) for p in writing.log_probs(text)], "end": text.end}), flush=True)
        made, seconds = made + max(writing.count - len(writing.texts), 0), seconds + writing.seconds
    return writing, made, seconds


def main(argv=None):
    p = argparse.ArgumentParser(description="Write text with a trained model.", allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"sample.py: error: {one_line(message)}; --help lists the options\n")
    p.add_argument("--checkpoint", metavar="FILE", help="default: out/best.pt, else out/last.pt")
    p.add_argument("--prompt", default="", help="text to continue, FILE:path, or - for standard input (default: none)")
    p.add_argument("--interactive", action="store_true", help="read lines and continue them; /help lists the commands")
    p.add_argument("--num_samples", type=int, default=1, help="texts to write, side by side (default: 1)")
    p.add_argument("--max_new_tokens", type=int, default=300, help="tokens per text, fewer if it ends itself (default: 300)")
    p.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token (default: 0.8)")
    p.add_argument("--top_k", type=int, help="choose among the k likeliest tokens only")
    p.add_argument("--top_p", type=float, default=0.95, help="choose among the likeliest tokens of this total probability "
                   "(default: 0.95)")
    p.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end a text before this; may be given again")
    p.add_argument("--json", action="store_true", help="a line per text: text, tokens, log probabilities, why it ended")
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
        if not 0 <= a.seed <= 2**63 - a.num_samples:
            raise ValueError(f"--seed must be from 0 to 2**63 - 1, not {a.seed}")
        if "" in a.stop:
            raise ValueError("--stop needs some text")
        if a.interactive and (a.num_samples > 1 or a.json or a.save_state):
            raise ValueError("--interactive is one text, without --num_samples, --json and --save-state; /save keeps its memory")
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
        choice = dict(max_new_tokens=a.max_new_tokens, temperature=a.temperature, top_k=a.top_k, top_p=a.top_p)
        if a.interactive:
            Conversation(model, enc, device, a.seed, before, a.stop, **choice).run(prompt)
            return
        writing, made, seconds = write(a, model, enc, device, prompt, before, choice)
        if a.save_state:
            save_state(writing.after(), a.save_state, model)
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
