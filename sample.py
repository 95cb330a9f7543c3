"""Generate text with a trained model, and print it token by token.

    python sample.py --prompt "ROMEO:"
    python sample.py --interactive             continues each line you type; the state carries over
    python sample.py --save_state play.state   then --load_state play.state continues from there

It needs only the checkpoint, which also contains the tokenizer. The model's state has a fixed size,
so the cost per token does not depend on the length of the text before it.
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


class Continuation:
    """Everything needed to continue a text."""

    def __init__(self, token, generator):
        self.state = None  # the model's state before the tokens in unread
        self.unread = [token]
        self.generator = generator
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps partial characters


def continue_texts(model, enc, texts, prompt, max_new_tokens, keep, **sampling):
    """Append the prompt to identical texts, then sample a separate continuation of each.

    Yields a list with the new characters of each text: first the prompt, then for each token the
    characters that it completes. A text ends at EOT. keep: the text (only one) will be continued
    later, even if this generator is closed early, so an incomplete character stays in the buffer.
    sampling: temperature, top_k and top_p of `fmem.sample`.
    """
    first = texts[0]
    first.unread += encode(enc, prompt).tolist()
    yield [text.decoder.decode(prompt.encode()) for text in texts]
    tokens = torch.tensor([first.unread] * len(texts), device=model.embed.weight.device)
    sampling["generator"] = [text.generator for text in texts]
    bytes_of = token_bytes(enc)
    ended = [False] * len(texts)
    state = None
    generated = model.generate(tokens, max_new_tokens, first.state, **sampling)
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
    """Print and flush. Control characters are replaced on a terminal, but not in a file or pipe."""
    print(printable(string) if sys.stdout.isatty() else string, end="", flush=True)


def show_all(pieces, interrupts=()):
    """Print the texts of `continue_texts`: the first as it is generated, then the others."""
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
def collect_interrupts():
    """Collect each Ctrl-C in a list, so that no token is lost in the middle of a step."""
    interrupts = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def run_interactive(model, enc, text, line, max_new_tokens, **sampling):
    """Append `line`, unless empty, then each line of the input, and continue the text each time."""
    bytes_of = token_bytes(enc)
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")
    while True:
        try:
            line = line or input("> " * sys.stdin.isatty())
            last = text.unread[-1]
            inside_line = last != enc.eot_token and bytes_of[last][-1:] != b"\n"
            if line:  # an empty line just continues the text
                line = "\n" * inside_line + line + "\n"
            pieces = continue_texts(model, enc, [text], line, max_new_tokens, True, **sampling)
            line = ""
            with contextlib.closing(pieces), collect_interrupts() as interrupts:
                next(pieces)  # the line is already on the screen
                show_all(pieces, interrupts)
        except EOFError:
            return
        except KeyboardInterrupt:  # at the prompt
            show("\n")


def read_prompt(prompt):
    """Read --prompt: a text, FILE:path, or - for standard input. Raises ValueError or OSError."""
    if prompt == "-":
        raw = sys.stdin.buffer.read()
    elif prompt.startswith("FILE:"):
        raw = Path(prompt[5:]).read_bytes()
    else:
        raw = prompt.encode("utf-8", "surrogateescape")  # invalid UTF-8 arrives as surrogates
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("the prompt is UTF-16; save it as UTF-8")
    return raw.decode("utf-8-sig", "replace")


def save_text(path, model, text):
    """Write everything needed to continue the text: a complete file or none. Raises OSError."""
    saved = {
        "format": STATE_FORMAT,
        "model": model.embed.weight[0].cpu(),  # differs from model to model
        "unread": text.unread,
        "state": text.state,
        "half_character": list(text.decoder.getstate()[0]),
        "generator": text.generator.get_state(),
    }
    buffer = io.BytesIO()  # torch.save does not report a full disk clearly
    torch.save(saved, buffer)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(buffer.getbuffer())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_saved(path, device="cpu"):
    """Read the dict that `save_text` wrote. Raises a one-line ValueError for any other file."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not verify checksums
            if file.testzip() is not None:
                raise ValueError("it is damaged: a checksum does not match")
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved["format"] != STATE_FORMAT:
            raise ValueError("it was not written by --save_state of this version")
    except Exception as error:  # a damaged file can raise any exception
        raise ValueError(f"{path} is not a saved state: {one_line(error)}") from None
    return saved


def load_text(path, model, text, new_seed):
    """Restore `text` from a file, without its generator if new_seed. Raises ValueError."""
    saved = read_saved(path, model.embed.weight.device)
    if not torch.equal(saved["model"], model.embed.weight[0]):
        raise ValueError(f"{path} was saved with another model; give its --checkpoint")
    if not new_seed:
        text.generator.set_state(saved["generator"].cpu())
    text.unread = saved["unread"]
    text.state = saved["state"]
    text.decoder.setstate((bytes(saved["half_character"]), 0))


def parse(argv):
    parser = argparse.ArgumentParser(description="Generate text with a model.", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, printable(f"sample.py: error: {message}") + "\n")
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="default: out/best.pt, else out/last.pt")
    add("--prompt", default="", help="text to continue, FILE:path, or - for standard input")
    add("--interactive", action="store_true", help="continue lines; Ctrl-C stops one, Ctrl-D exits")
    add("--num_samples", type=int, default=1, help="texts generated from the prompt (default: 1)")
    add("--max_new_tokens", type=int, default=300, help="maximum for each text (default: 300)")
    add("--temperature", type=float, default=0.8, help="0: most likely token (default: 0.8)")
    add("--top_k", type=int, help="choose among the k most likely tokens (default: all)")
    add("--top_p", type=float, default=0.95, help="nucleus sampling probability (default: 0.95)")
    add("--seed", type=int, help="of the first text; each next one adds 1 (default: 1337)")
    add("--save_state", metavar="FILE", type=Path, help="write the state to FILE, to resume from")
    add("--load_state", metavar="FILE", type=Path, help="resume from FILE, then read the prompt")
    add("--compile", action="store_true", help="use torch.compile: slow start, then faster")
    add("--device", default="auto", help="cpu, cuda, ... (default: auto, a GPU if available)")
    add("--threads", type=int, default=1, help="threads; more help only large models (default: 1)")
    args = parser.parse_args(argv)
    if args.num_samples < 1 or args.max_new_tokens < 0:
        parser.error("--num_samples must be at least 1, --max_new_tokens at least 0")
    if args.num_samples > 1 and (args.interactive or args.save_state or args.load_state):
        parser.error("--num_samples does not work with --interactive, --save_state or --load_state")
    return args


@torch.no_grad()
def run(args):
    torch.set_flush_denormal(True)  # before any threads start; denormal decays are slow on a CPU
    gpu_or_cpu = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(gpu_or_cpu if args.device == "auto" else args.device)
    torch.set_num_threads(args.threads)
    if args.save_state:
        args.save_state.parent.mkdir(parents=True, exist_ok=True)
        if args.save_state.exists():
            read_saved(args.save_state)  # raises for any other file, so that it is not overwritten
        if not os.access(args.save_state.parent, os.W_OK):
            raise ValueError(f"{args.save_state.parent} is not writable; change --save_state")
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
        texts.append(Continuation(enc.eot_token, torch.Generator(device).manual_seed(seed)))
    if args.load_state:
        load_text(args.load_state, model, texts[0], new_seed=args.seed is not None)
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    keep = args.save_state is not None
    if args.interactive:
        run_interactive(model, enc, texts[0], prompt, args.max_new_tokens, **sampling)
    else:
        show_all(continue_texts(model, enc, texts, prompt, args.max_new_tokens, keep, **sampling))
    if keep:
        save_text(args.save_state, model, texts[0])


def main(argv=None):
    args = parse(argv)
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit("\nsample.py: stopped; no state was written")
    except BrokenPipeError:  # e.g. from `head`; without this, Python prints an error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, RuntimeError, MemoryError, AssertionError) as error:
        # PyTorch raises AssertionError if it was not built for the device.
        sys.exit(f"sample.py: error: {one_line(error)}")


if __name__ == "__main__":
    main()
