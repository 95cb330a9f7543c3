"""Text from a trained model, as it is generated.

    python sample.py --prompt "ROMEO:"
    python sample.py --interactive             continues each line you type; the state carries over
    python sample.py --save_state play.state   and --load_state play.state goes on from there

All it needs is the checkpoint, which holds the tokenizer too. A token costs the same however long
the text before it, and what the model remembers of a text, its state, has a fixed size.
"""

import argparse
import codecs
import contextlib
import io
import os
import signal
import sys
import zipfile
from pathlib import Path

import torch

import fmem
from data.tokenizer import encode, load_tokenizer, one_line, printable, token_bytes

STATE_FORMAT = "fmem text state 3"


class Text:
    """What it takes to continue a text."""

    def __init__(self, token, generator):
        self.state = None  # the model's state, in which it has not read the last tokens yet:
        self.unread = [token]
        self.generator = generator
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds half a character


def continue_texts(model, enc, texts, prompt, max_new_tokens, keep, **choice):
    """Continue texts that are the same so far with the prompt, then each by itself, side by side.

    Yields what is new in each text, a list of strings: first the prompt, then for each token the
    characters that it completes. A text ends at EOT. keep: a single text will be continued later,
    even if this generator is closed early; half a character at its end waits for the rest.
    choice: temperature, top_k and top_p of `fmem.sample`.
    """
    first = texts[0]
    first.unread += encode(enc, prompt).tolist()
    yield [text.decoder.decode(prompt.encode()) for text in texts]
    tokens = torch.tensor([first.unread] * len(texts), device=model.embed.weight.device)
    choice["generator"] = [text.generator for text in texts]
    bytes_of = token_bytes(enc)
    ended = [False] * len(texts)
    state = None
    generated = model.generate(tokens, max_new_tokens, first.state, **choice)
    for new, state in generated:  # noqa: B007 (used after the loop)
        first.unread.append(new[0].item())
        strings = [""] * len(texts)
        for i, token in enumerate(new.tolist()):
            if not ended[i]:
                ended[i] = token == enc.eot_token
                strings[i] = texts[i].decoder.decode(bytes_of[token], final=ended[i])
        yield strings
        if all(ended):
            break
    if state is not None:
        first.state = state
        del first.unread[:-1]
    if not keep:
        yield [text.decoder.decode(b"", final=True) for text in texts]


def show(string):
    """Print at once. On a terminal, what would steer it is replaced; a file or pipe gets it all."""
    print(printable(string) if sys.stdout.isatty() else string, end="", flush=True)


def show_all(pieces, interrupts=()):
    """Show the texts of `continue_texts`: the first as it comes, then the others."""
    others = []
    for first, *rest in pieces:
        show(first)
        others.append(rest)
        if interrupts:
            break
    for strings in zip(*others, strict=True):
        show("\n" + "-" * 20 + "\n" + "".join(strings))
    show("\n")


@contextlib.contextmanager
def interrupts_noted():
    """A list that gets each Ctrl-C, so that no token is lost in the middle of a step."""
    interrupts = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def converse(model, enc, text, line, max_new_tokens, **choice):
    """Continue the text from `line`, unless it is empty, and from each line that is read."""
    bytes_of = token_bytes(enc)
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")
    while True:
        try:
            line = line or input("> " * sys.stdin.isatty())
            last = text.unread[-1]
            inside_line = last != enc.eot_token and bytes_of[last][-1:] != b"\n"
            if line:  # an empty one lets the text run on
                line = "\n" * inside_line + line + "\n"
            pieces = continue_texts(model, enc, [text], line, max_new_tokens, True, **choice)
            line = ""
            with contextlib.closing(pieces), interrupts_noted() as interrupts:
                next(pieces)  # the line is on the screen already
                show_all(pieces, interrupts)
        except EOFError:
            return
        except KeyboardInterrupt:  # at the prompt
            show("\n")


def read_prompt(prompt):
    """The prompt of the command line as text. Raises ValueError, OSError."""
    if prompt == "-":
        raw = sys.stdin.buffer.read()
    elif prompt.startswith("FILE:"):
        raw = Path(prompt[5:]).read_bytes()
    else:
        raw = prompt.encode("utf-8", "surrogateescape")  # what was not UTF-8 arrives as surrogates
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("the prompt is UTF-16; save it as UTF-8")
    return raw.decode("utf-8-sig", "replace")


def save_text(path, model, text):
    """Write what it takes to continue the text: the whole file, or nothing. Raises OSError."""
    saved = {
        "format": STATE_FORMAT,
        "model": model.embed.weight[0].cpu(),  # differs between any two models
        "unread": text.unread,
        "state": text.state,
        "half_character": list(text.decoder.getstate()[0]),
        "generator": text.generator.get_state(),
    }
    buffer = io.BytesIO()  # torch.save to a full disk would not say that it is full
    torch.save(saved, buffer)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(buffer.getbuffer())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_saved(path, device="cpu"):
    """The dict that `save_text` wrote. Raises ValueError, one line, for any other file."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not compare checksums
            if file.testzip() is not None:
                raise ValueError("it is damaged: a checksum differs")
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved["format"] != STATE_FORMAT:
            raise ValueError("--save_state of this version did not write it")
    except Exception as error:  # a damaged file can make a reader raise anything
        raise ValueError(f"{path} is not a saved state: {one_line(error)}") from None
    return saved


def load_text(path, model, text, new_seed):
    """Make `text` the saved one; with a new seed, its generator stays as it is. ValueError."""
    saved = read_saved(path, model.embed.weight.device)
    if not torch.equal(saved["model"], model.embed.weight[0]):
        raise ValueError(f"{path} belongs to another model")
    if not new_seed:
        text.generator.set_state(saved["generator"].cpu())
    text.unread = saved["unread"]
    text.state = saved["state"]
    text.decoder.setstate((bytes(saved["half_character"]), 0))


def parse(argv):
    parser = argparse.ArgumentParser(description="Text from a trained model.", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, printable(f"sample.py: error: {message}") + "\n")
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="default: out/best.pt, else out/last.pt")
    add("--prompt", default="", help="text to continue, FILE:path, or - for standard input")
    add("--interactive", action="store_true", help="continue lines; Ctrl-C ends one, Ctrl-D all")
    add("--num_samples", type=int, default=1, help="texts from the prompt (default: 1)")
    add("--max_new_tokens", type=int, default=300, help="at most, in each text (default: 300)")
    add("--temperature", type=float, default=0.8, help="0: the most likely token (default: 0.8)")
    add("--top_k", type=int, help="choose among the k most likely tokens (default: all)")
    add("--top_p", type=float, default=0.95, help="nucleus of probability p (default: 0.95)")
    add("--seed", type=int, help="of the first text; +1 for each further one (default: 1337)")
    add("--save_state", metavar="FILE", type=Path, help="write the state, to continue from later")
    add("--load_state", metavar="FILE", type=Path, help="resume from FILE, then read the prompt")
    add("--compile", action="store_true", help="torch.compile: faster after a wait")
    add("--device", default="auto", help="cpu, cuda, ... (default: auto, a GPU if there is one)")
    add("--threads", type=int, default=1, help="more help only large models (default: 1)")
    args = parser.parse_args(argv)
    if args.num_samples < 1 or args.max_new_tokens < 0:
        parser.error("--num_samples must be at least 1, --max_new_tokens at least 0")
    if args.num_samples > 1 and (args.interactive or args.save_state or args.load_state):
        parser.error("--num_samples excludes --interactive, --save_state and --load_state")
    return args


@torch.no_grad()
def run(args):
    torch.set_flush_denormal(True)  # before the first threads: denormal decays are slow on a CPU
    gpu_or_cpu = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(gpu_or_cpu if args.device == "auto" else args.device)
    torch.set_num_threads(args.threads)
    if args.save_state:
        args.save_state.parent.mkdir(parents=True, exist_ok=True)
        if args.save_state.exists():
            read_saved(args.save_state)  # raises for any other file: it is not replaced
    prompt = read_prompt(args.prompt)
    best = Path("out/best.pt")
    path = args.checkpoint or (best if best.exists() else best.with_name("last.pt"))
    model, checkpoint = fmem.load(path, device)
    if checkpoint.get("tokenizer") is None:
        raise ValueError(f"{path} was trained on {checkpoint.get('corpus')}, which is not text")
    enc = load_tokenizer(checkpoint["tokenizer"])
    about = f"{path}: step {checkpoint.get('step')}, {checkpoint.get('corpus')}; on {device}"
    print(printable(about), file=sys.stderr)
    if args.compile:
        model.compile()

    texts = []
    for i in range(args.num_samples):
        seed = i + (1337 if args.seed is None else args.seed)
        texts.append(Text(enc.eot_token, torch.Generator(device).manual_seed(seed)))
    if args.load_state:
        load_text(args.load_state, model, texts[0], new_seed=args.seed is not None)
    choice = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    keep = args.save_state is not None
    if args.interactive:
        converse(model, enc, texts[0], prompt, args.max_new_tokens, **choice)
    else:
        show_all(continue_texts(model, enc, texts, prompt, args.max_new_tokens, keep, **choice))
    if keep:
        save_text(args.save_state, model, texts[0])


def main(argv=None):
    args = parse(argv)
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit("\nsample.py: stopped; no state was written")
    except BrokenPipeError:  # `head` has read enough; without this Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, RuntimeError, MemoryError, AssertionError) as error:
        # PyTorch asserts that it was built for the device.
        sys.exit(f"sample.py: error: {one_line(error)}")


if __name__ == "__main__":
    main()
