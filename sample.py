"""Text from a trained model, as it is generated.

    python sample.py --prompt "ROMEO:"
    python sample.py --interactive             lines are continued, with the memory of all before
    python sample.py --save_state play.state   --load_state play.state then goes on where it stopped

The checkpoint alone is needed: the tokenizer is in it. A token costs the same after any number of
others, and what the model remembers of a text, its state, has a fixed size as well.
"""

import argparse
import codecs
import contextlib
import hashlib
import io
import os
import sys
import tempfile
import time
import zipfile
from operator import attrgetter
from pathlib import Path

import torch

import fmem
from data.tokenizer import encode, load_tokenizer, one_line, printable, token_bytes

STATE_FORMAT = "fmem text state 2"


class Text:
    """A text so far, as far as it takes to continue it."""

    def __init__(self, token, generator):
        self.token = token  # the last one, which the model has not read yet
        self.state = None  # the model's, before that token
        self.generator = generator
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps half a character


def each(state, change):
    """A state with change(tensor) in place of each tensor."""
    if isinstance(state, (list, tuple)):
        return type(state)(each(part, change) for part in state)
    return change(state) if isinstance(state, torch.Tensor) else state


def finish(generator):
    """What a Python generator returns, where it has nothing more to yield."""
    try:
        next(generator)
    except StopIteration as end:
        return end.value


def write(model, enc, texts, prompt, max_new_tokens, keep, **choice):
    """Continue texts that are alike so far, with the prompt and then each by itself, side by side.

    Yields what is new of each text, a list of strings: first the prompt, then for each token the
    characters that it completes. A text ends at EOT. keep: there is one text, which can be
    continued afterwards, even if this generator is closed early; half a character at its end waits
    for the rest. choice: temperature, top_k and top_p of `fmem.sample`.
    """
    device = model.embed.weight.device
    first = texts[0]
    yield [text.decoder.decode(prompt.encode()) for text in texts]

    def read(tokens):
        return finish(model.generate(torch.tensor([tokens], device=device), 0, first.state))

    tokens = [first.token, *encode(enc, prompt).tolist()]
    if len(tokens) > 1:
        first.state = read(tokens[:-1])  # once for all texts
        first.token = tokens[-1]

    def repeat(part):  # the batch is the first axis of size 1, in attention after keys and values
        return part.repeat_interleave(len(texts), part.shape.index(1))

    new_tokens = model.generate(
        torch.full((len(texts), 1), first.token, device=device),
        max_new_tokens,
        each(first.state, repeat),
        generator=[text.generator for text in texts],
        **choice,
    )
    bytes_of = token_bytes(enc)
    ended = [False] * len(texts)
    written = []  # tokens of the first text
    try:
        while len(written) < max_new_tokens and not all(ended):
            new = next(new_tokens).tolist()
            written.append(new[0])
            last = len(written) == max_new_tokens and not keep
            strings = [""] * len(texts)
            for i, text in enumerate(texts):
                if not ended[i]:
                    ended[i] = new[i] == enc.eot_token
                    strings[i] = text.decoder.decode(bytes_of[new[i]], final=ended[i] or last)
            yield strings
    finally:
        if keep and written:
            if len(written) == max_new_tokens:
                first.state = finish(new_tokens)
            else:
                first.state = read([first.token, *written[:-1]])
            first.token = written[-1]


def show(string):
    """Print at once. On a terminal, what would steer it is replaced; a file or pipe gets all."""
    print(printable(string) if sys.stdout.isatty() else string, end="", flush=True)


def show_all(pieces, n_texts):
    """Show the texts of `write`: the first as it comes, then the others.

    Returns new tokens per second of each text, None for fewer than two; the prompt is not counted.
    """
    others = [[] for _ in range(n_texts - 1)]
    for n_tokens, strings in enumerate(pieces):
        show(strings[0])
        for parts, string in zip(others, strings[1:], strict=True):
            parts.append(string)
        if n_tokens <= 1:
            start = time.perf_counter()  # the first token has waited until the prompt was read
    seconds = time.perf_counter() - start
    for parts in others:
        show("\n" + "-" * 20 + "\n" + "".join(parts))
    show("\n")
    return (n_tokens - 1) / seconds if n_tokens > 1 else None


def converse(model, enc, text, line, max_new_tokens, **choice):
    """Continue the text from `line`, unless it is empty, and from each line that is read."""
    bytes_of = token_bytes(enc)
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 (with it, input() edits lines and remembers them)
    encoding = sys.stdin.encoding if terminal else "utf-8-sig"
    sys.stdin.reconfigure(encoding=encoding, errors="replace")
    while True:
        try:
            line = line or input("> " if terminal else "")
            inside_line = text.token != enc.eot_token and bytes_of[text.token][-1:] != b"\n"
            if line:  # an empty one lets the text run on
                line = "\n" * inside_line + line + "\n"
            pieces = write(model, enc, [text], line, max_new_tokens, True, **choice)
            line = ""
            with contextlib.closing(pieces):
                next(pieces)  # the line is on the screen already
                show_all(pieces, 1)
        except EOFError:
            return
        except KeyboardInterrupt:
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


def fingerprint(model):
    """sha256 of the weights."""
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_text(path, model, text):
    """Write what it takes to continue the text, whole or not at all. Raises OSError."""
    saved = {
        "format": STATE_FORMAT,
        "model": fingerprint(model),
        "token": text.token,
        "state": text.state,
        "half_character": list(text.decoder.getstate()[0]),
        "generator": text.generator.get_state(),
    }
    buffer = io.BytesIO()  # torch.save to a full disk would not say that it is full
    torch.save(saved, buffer)
    path = path.resolve()
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        with open(Path(folder, path.name), "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)


def read_saved(path, device="cpu"):
    """The dict of `save_text`. Raises ValueError, one line, for any other file."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not compare checksums
            if file.testzip() is not None:
                raise ValueError("it is damaged, a checksum differs")
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved.get("format") != STATE_FORMAT:
            raise ValueError("it was not written by --save_state")
        return saved
    except Exception as error:  # a damaged file can make a reader raise anything
        raise ValueError(f"{path} cannot be read as a saved state: {one_line(error)}") from None


def load_text(path, model, texts, new_seed):
    """Put the text of a file of `save_text` into each of `texts`. Raises ValueError, one line.

    The first text's generator goes on as it was when saved, unless there is a new seed.
    """
    device = model.embed.weight.device
    saved = read_saved(path, device)
    if saved.get("model") != fingerprint(model):
        raise ValueError(f"{path} belongs to another model")
    if not new_seed:
        try:
            texts[0].generator.set_state(saved["generator"].cpu())
        except Exception:  # those of a GPU, say, on a CPU
            raise ValueError(f"{path} has no random numbers for {device}; give a --seed") from None
    try:
        if saved["token"] not in range(model.config.vocab_size):
            raise ValueError("its token is not in the vocabulary")
        token = torch.tensor([saved["token"]], device=device)
        _, fresh = model.hidden(token)
        _, after = model.hidden(token, fmem.copy_state(saved["state"]))
        shapes = each(after, attrgetter("shape"))
        if shapes != each(fresh, attrgetter("shape")) and model.layer_name != "Attention":
            raise ValueError("its state has other shapes")  # but attention's, which grow
        for text in texts:
            text.token = saved["token"]
            text.state = saved["state"]
            text.decoder.setstate((bytes(saved["half_character"]), 0))
    except Exception as error:  # the fields can be anything
        raise ValueError(f"{path} does not fit the model: {one_line(error)}") from None


def pick_device(name):
    """The device of --device. Raises ValueError where it cannot be used."""
    if name == "auto":
        gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return gpu if gpu and fmem.has_float64(gpu) else torch.device("cpu")
    try:
        return torch.zeros(1, device=name).device
    except Exception as error:  # each kind of device has its own
        raise ValueError(f"--device {name} cannot be used here: {one_line(error)}") from None


def compile_step(model, n_texts):
    """torch.compile for the step of `generate`. Where it fails, one line says so."""
    model.compile()
    tokens = torch.zeros((n_texts, 1), dtype=torch.long, device=model.embed.weight.device)
    try:
        for _ in model.generate(tokens, 3, temperature=0):
            pass
    except Exception as error:  # a compiler can raise anything
        torch.compiler.set_stance("force_eager")
        print(f"sample.py: not compiled, --compile failed: {one_line(error)}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"sample.py: error: {printable(message)}; --help lists the options\n")


def parse(argv):
    parser = Parser(description="Text from a trained model.", allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="default: out/best.pt, else out/last.pt")
    add("--prompt", default="", help="text to continue, FILE:path, or - for standard input")
    add("--interactive", action="store_true", help="continue lines; Ctrl-C ends an answer")
    add("--num_samples", type=int, default=1, help="texts, side by side (default: 1)")
    add("--max_new_tokens", type=int, default=300, help="length of a text at most (default: 300)")
    add("--temperature", type=float, default=0.8, help="0: the likeliest token (default: 0.8)")
    add("--top_k", type=int, help="choose among the k likeliest tokens (default: all)")
    add("--top_p", type=float, default=0.95, help="the likeliest that sum to p (default: 0.95)")
    add("--seed", type=int, help="of the first text, the next has the next (default: 1337)")
    add("--save_state", metavar="FILE", type=Path, help="keep what it takes to continue the text")
    add("--load_state", metavar="FILE", type=Path, help="continue that text; a prompt comes next")
    add("--compile", action="store_true", help="torch.compile: faster after a wait")
    add("--device", default="auto", help="auto: a GPU that has float64, else cpu (default: auto)")
    add("--threads", type=int, help="default: 1 on a CPU, which is as fast as 2")
    add("--debug", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)
    if args.num_samples < 1 or args.max_new_tokens < 0:
        parser.error("--num_samples must be at least 1, --max_new_tokens at least 0")
    if args.threads is not None and args.threads < 1:
        parser.error("--threads must be at least 1")
    if args.seed is not None and not 0 <= args.seed <= 2**63 - args.num_samples:
        parser.error(f"--seed must be from 0 to 2**63 - 1, not {args.seed}")
    if args.interactive and (args.num_samples > 1 or args.save_state or args.prompt == "-"):
        parser.error("--interactive goes without --num_samples, --save_state and --prompt -")
    if args.save_state and args.num_samples > 1:
        parser.error("--save_state keeps one text, so it goes without --num_samples")
    try:
        fmem.sample(torch.zeros(1, 2), args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        parser.error(f"--{error}")
    return args


def run(args):
    torch.set_flush_denormal(True)
    device = pick_device(args.device)
    if args.threads or device.type == "cpu":
        torch.set_num_threads(args.threads or 1)
    if args.save_state and args.save_state.exists():
        read_saved(args.save_state)  # raises for any other file, which is not replaced
    elif args.save_state:
        args.save_state.resolve().parent.mkdir(parents=True, exist_ok=True)
    prompt = read_prompt(args.prompt)
    best = Path("out/best.pt")
    path = args.checkpoint or (best if best.exists() else best.with_name("last.pt"))
    model, checkpoint = fmem.load(path, device)
    if checkpoint.get("tokenizer") is None:
        raise ValueError(f"{path} was trained on {checkpoint.get('corpus')}, which is not text")
    enc = load_tokenizer(checkpoint["tokenizer"])
    if enc.n_vocab != model.config.vocab_size:
        raise ValueError(f"{path} has a tokenizer that is not its model's")
    about = f"{path}: step {checkpoint.get('step')}, {checkpoint.get('corpus')}; on {device}"
    print(printable(about), file=sys.stderr)

    texts = []
    for i in range(args.num_samples):
        seed = i + (1337 if args.seed is None else args.seed)
        texts.append(Text(enc.eot_token, torch.Generator(device).manual_seed(seed)))
    if args.load_state:
        load_text(args.load_state, model, texts, new_seed=args.seed is not None)
    if args.compile:
        compile_step(model, len(texts))
    choice = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    if args.interactive:
        converse(model, enc, texts[0], prompt, args.max_new_tokens, **choice)
        return
    keep = args.save_state is not None
    pieces = write(model, enc, texts, prompt, args.max_new_tokens, keep, **choice)
    speed = show_all(pieces, len(texts))
    if keep:
        save_text(args.save_state, model, texts[0])
    if speed:
        print(f"{speed:.0f} tokens/s" + " in each" * (len(texts) > 1), file=sys.stderr)


def main(argv=None):
    args = parse(argv)
    encoding = sys.stdout.encoding if sys.stdout.isatty() else "utf-8"
    sys.stdout.reconfigure(encoding=encoding, errors="replace", newline="\n")
    try:
        run(args)
    except KeyboardInterrupt:
        not_saved = f"; {args.save_state} is not written" if args.save_state else ""
        print(f"\nsample.py: stopped{not_saved}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if args.debug:
            raise
        if not isinstance(error, BrokenPipeError):  # `head` has seen enough
            print(f"sample.py: error: {one_line(error)}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # what could not be written is not tried again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
