"""See what a trained model's memory does with a text.

    python look.py                                      # a passage of the validation text
    python look.py --prompt "ROMEO:" --generate 60      # your text, and the model's continuation
    python look.py --prompt FILE:book.txt --tokens 200  # its last 200 tokens, after the others

Writes one self-contained HTML file, which needs no network. For each token and layer it shows which
earlier tokens are read, with their exact weights, which rows are written, and the contents of each
row. It also shows the predictions for the next token.

All of this is exact, since the recurrence (eq. 10 of fmem.py) is linear. After token t each row is
a weighted mean of the inputs so far and of its value before the text. The weights add up to 1.

    h_t[i] = F_t[i] h_0[i] + sum_{s<=t} E_t[s, i] xbar_s
    E_t[s, i] = theta_s[i] prod_{s<u<=t} (1 - theta_u[i])
    F_t[i] = prod_{u<=t} (1 - theta_u[i])

So the read (eq. 11) is linear in them too. A is the attention map of a recurrent model:

    y_t = sum_{s<=t} A[t, s] xbar_s + sum_i q_t[i] F_t[i] h_0[i]
    A[t, s] = sum_i q_t[i] E_t[s, i]
    q_t[i] = phi_t[i] / rms(h_t[i])
"""

import argparse
import base64
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fmem
from data import tokenizer

TEMPLATE = Path(__file__).resolve().with_name("look.html")
MARK = "<!-- a page of fmem's look.py -->"  # in the second line of every page
MAX_TOKENS = 1024  # per page; the attention map has that many rows and columns
PASSAGE = 160  # tokens of the validation text to show if no prompt is given
TOP_PREDICTIONS = 8  # predicted tokens to show


# What the layers do.


@dataclass
class Record:
    """What a layer did with T tokens, in float64. It has m rows of width d.

    The read, before W_o and a gate, is y = A @ xbar + rest.
    """

    xbar: Tensor  # [T, d] the written vectors
    A: Tensor  # [T, T] weight of token s (column) in the read of token t (row); 0 for s > t
    start: Tensor  # [T] weight of the memory before the text, in each read
    rest: Tensor  # [T, d] contribution of that memory to each read
    theta: Tensor  # [T, m] write weights, zero outside the top k
    phi: Tensor  # [T, m] read weights
    rms: Tensor  # [T + 1, m] of each row, before the text and after each token; without epsilon
    eta: Tensor  # [T] update rate
    mu: Tensor  # [T] merge rate
    entropy: Tensor  # [T] of the affinity before the top k, in nats
    n_routed: int  # rows that the affinity selects from: m, or m - 1 with a shared row

    def shares(self):
        """A [T, T] and start [T], normalised so that the shares of each read add up to 1."""
        total = (self.A.sum(1) + self.start).clamp_min(1e-30)
        return self.A / total[:, None], self.start / total


@torch.no_grad()
def record(model, tokens, state=None):
    """Run tokens [T] from `state`. Returns a Record per layer, and the logits [T, vocab_size].

    Raises ValueError for a model whose layers are not Factorization Memory.
    """
    if not all(hasattr(block.memory, "scan_inputs") for block in model.blocks):
        raise ValueError(f"{model.layer_name} has no memory rows to look at")
    seen = []

    def see(layer, inputs):
        seen.append((layer, *inputs))

    hooks = [block.memory.register_forward_pre_hook(see) for block in model.blocks]
    try:
        logits, _ = model(tokens[None], state)
    finally:
        for hook in hooks:
            hook.remove()
    return [record_layer(*call) for call in seen], logits[0]


def record_layer(layer, x, state=None):
    """The Record of a layer for the input x [1, T, d_model], from `state`."""
    inputs = []  # of the projections: x, or x after a short convolution
    hook = layer.W_i.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        theta, phi, xbar = (v[0].double() for v in layer.scan_inputs(x, state))
    finally:
        hook.remove()
    u = inputs[0]
    log_alpha = torch.log_softmax(layer.W_alpha(u)[0].double() / layer.config.tau, -1)

    T, m = theta.shape
    h0 = state if state is None or isinstance(state, Tensor) else state[0]
    h0 = xbar.new_zeros(m, xbar.shape[1]) if h0 is None else h0[0].double()
    h = h0
    E = theta.new_zeros(T, m)
    kept = theta.new_ones(m)  # F
    A = theta.new_zeros(T, T)
    start = theta.new_zeros(T)
    rest = torch.zeros_like(xbar)
    mean_square = theta.new_zeros(T + 1, m)
    mean_square[0] = h.square().mean(-1)
    for t in range(T):
        keep = 1 - theta[t]
        h = keep[:, None] * h + theta[t, :, None] * xbar[t]  # eq. 10
        E *= keep
        E[t] = theta[t]
        kept = kept * keep
        mean_square[t + 1] = h.square().mean(-1)
        q = phi[t] * torch.rsqrt(mean_square[t + 1] + layer.config.norm_eps)  # eq. 11
        A[t] = E @ q
        start[t] = q @ kept
        rest[t] = (q * kept) @ h0
    return Record(
        xbar=xbar,
        A=A,
        start=start,
        rest=rest,
        theta=theta,
        phi=phi,
        rms=mean_square.sqrt(),
        eta=torch.sigmoid(layer.w_eta(u)[0, :, 0].double()),
        mu=torch.sigmoid(layer.w_mu(u)[0, :, 0].double()),
        entropy=-(log_alpha.exp() * log_alpha).sum(-1),
        n_routed=log_alpha.shape[-1],
    )


# The page.


def escape_unprintable(piece):
    """A token's bytes as text; incomplete and unprintable characters become escapes."""
    text = piece.decode("utf-8", "backslashreplace")
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def to_base64(values, dtype=torch.float32):
    """An array as base64 of little-endian numbers."""
    array = values.to(dtype).contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def rounded(values):
    return [float(f"{value:.5g}") for value in values.tolist()]


def layer_data(layer):
    """A Record's data for the page: of theta, phi and rms only the k rows that a token uses."""
    touched = (layer.theta > 0) | (layer.phi > 0)
    k = max(int(touched.sum(1).max()), 1)
    rows = touched.int().topk(k, -1).indices  # filled up with unused rows if a token uses fewer
    return {
        "m": layer.theta.shape[1],
        "k": k,
        "n_routed": layer.n_routed,
        "rows": to_base64(rows, torch.int32),  # [T, k], as the next three
        "theta": to_base64(layer.theta.gather(1, rows)),
        "phi": to_base64(layer.phi.gather(1, rows)),
        "rms": to_base64(layer.rms[1:].gather(1, rows)),
        "rms_before": to_base64(layer.rms[0]),  # [m]
        "eta": rounded(layer.eta),
        "mu": rounded(layer.mu),
        "entropy": rounded(layer.entropy),
    }


def page_data(layers, logits, tokens, words, **more):
    """The data of the page, ready for JSON.

    layers, logits: from `record`, for tokens [T]. words: the text of each token of the vocabulary.
    more: eps (of the row norm), about (a line about the model), given (how many of these tokens are
    not generated), before (how many tokens precede them), conv (width of the convolution, or 0).
    """
    log_p = torch.log_softmax(logits.double(), -1)
    loss = -log_p[:-1].gather(1, tokens[1:, None])[:, 0]
    p, ids = log_p.exp().topk(min(TOP_PREDICTIONS, log_p.shape[1]), -1)
    shown = {*tokens.tolist(), *ids.flatten().tolist()}
    return {
        "words": {token: words[token] for token in sorted(shown)},
        "tokens": tokens.tolist(),
        "show": longest_range_token(layers[0]),  # selected at the start
        "loss": [None, *rounded(loss)],
        "top": [
            list(zip(i, rounded(v), strict=True)) for i, v in zip(ids.tolist(), p, strict=True)
        ],
        "layers": [layer_data(layer) for layer in layers],
        **more,
    }


def longest_range_token(layer):
    """The token in the second half of the text that reads from furthest back, on average."""
    share, _ = layer.shares()
    position = torch.arange(len(share))
    distance = (position[:, None] - position) * share
    half = len(share) // 2
    return half + int(distance.sum(1)[half:].argmax())


def page(data):
    """The page as HTML. Its data has "<", ">" and "&" escaped, so that no word can end it."""
    template = TEMPLATE.read_text(encoding="utf-8")
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return template.replace("\n", f"\n{MARK}\n", 1).replace("{{data}}", text, 1)


def write(path, text):
    """Write a page. It overwrites a page, but no other file (ValueError). Raises OSError."""
    if path.exists():
        with open(path, "rb") as file:
            if MARK.encode() not in file.read(200):
                raise ValueError(f"{path} was not written by look.py; choose another --out")
    path.write_text(text, encoding="utf-8", newline="\n")


# The command.


def passage(fields, folder, n):
    """n tokens from the middle of a prepared folder's validation text.

    They start after an empty line, if one is near. fields: the tokenizer that the folder must use.
    Raises ValueError, OSError.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        tokens = np.memmap(folder / "val.bin", dtype=meta["dtype"], mode="r")
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"{folder} is not a prepared folder; give a --prompt instead") from None
    if meta["tokenizer"] != fields:
        raise ValueError(f"{folder} was prepared with another tokenizer; give a --prompt instead")
    pieces = tokenizer.token_bytes(tokenizer.load_tokenizer(fields))
    middle = max(min(len(tokens) // 2, len(tokens) - n), 0)
    text = tokens[middle : middle + 2 * n + 200].tolist()
    for i in range(2, len(text) - n):
        if pieces[text[i - 2]].endswith(b"\n") and pieces[text[i - 1]] == b"\n":
            return text[i : i + n]
    return text[:n]


def read_prompt(prompt):
    """The prompt's text: itself, or the content of FILE:path. Raises ValueError, OSError."""
    if prompt.startswith("FILE:"):
        return Path(prompt.removeprefix("FILE:")).read_text(encoding="utf-8-sig", errors="replace")
    return prompt


def text_and_words(saved, args):
    """The token ids to show, and the text of each token of the vocabulary.

    saved: the checkpoint. A model of a recall task has no tokenizer; its prompt lists token ids.
    Raises ValueError, OSError.
    """
    vocab_size = saved["config"]["vocab_size"]
    if saved["tokenizer"] is None:
        words = [f" {number}" for number in range(vocab_size)]
        numbers = read_prompt(args.prompt or "").split()
        if not numbers or not all(n.isdecimal() and int(n) < vocab_size for n in numbers):
            numbers = f"token ids below {vocab_size}, separated by spaces"
            raise ValueError(f"for a model of {saved['corpus']}, --prompt must be {numbers}")
        return [int(n) for n in numbers], words
    encoding = tokenizer.load_tokenizer(saved["tokenizer"])
    words = [escape_unprintable(piece) for piece in tokenizer.token_bytes(encoding)]
    words[encoding.eot_token] = tokenizer.EOT
    if args.prompt is None:
        folder = Path(args.data or saved["settings"]["data"])
        return passage(saved["tokenizer"], folder, args.tokens or PASSAGE), words
    text = tokenizer.encode(encoding, read_prompt(args.prompt))
    return [encoding.eot_token, *text.tolist()], words


def look(args):
    """Write the page for these options. Returns its path and data.

    Raises ValueError, OSError, and torch's RuntimeError.
    """
    best = Path("out/best.pt")
    path = args.checkpoint or (best if best.exists() else best.with_name("last.pt"))
    model, saved = fmem.load(path)
    tokens, words = text_and_words(saved, args)

    # If the text is longer than a page, show its end, from the state after the rest.
    count = min(args.tokens or MAX_TOKENS, MAX_TOKENS - args.generate)
    tokens = torch.tensor(tokens)
    before, shown = tokens[:-count], tokens[-count:]
    state = None
    if len(before):
        with torch.no_grad():
            for piece in before[None].split(fmem.PREFILL, 1):
                _, state = model.hidden(piece, state)
    generator = torch.Generator().manual_seed(args.seed)
    choice = dict(temperature=0.8, top_p=0.95, generator=generator)
    generated = model.generate(shown[None], args.generate, state, **choice)
    written = [token.item() for token, _ in generated]
    given = len(shown)
    shown = torch.cat([shown, torch.tensor(written, dtype=torch.long)])
    if len(shown) < 2:
        raise ValueError("one token is not enough; give a longer --prompt, or use --generate")

    layers, logits = record(model, shown, state)
    config = model.config
    extensions = ", ".join(name for name, value in model.layer_arguments.items() if value)
    about = (
        f"Factorization Memory{' with ' if extensions else ''}{extensions}: {config.n_layer} "
        f"layers, {config.n_rows} rows, {config.k_rows} per token. {path}, step "
        f"{saved['step']:,}, trained on {saved['corpus']}."
    )
    data = page_data(
        layers,
        logits,
        shown,
        words,
        eps=config.norm_eps,
        about=tokenizer.printable(about),
        given=given,
        before=len(before),
        conv=model.layer_arguments.get("conv", 0),
    )
    out = args.out or path.with_name("look.html")
    write(out, page(data))
    return out, data


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="See what a trained model's memory does with a text.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="default: out/best.pt, else out/last.pt")
    add("--prompt", help="text to show, or FILE:path (default: a passage of validation text)")
    add("--generate", type=int, default=0, metavar="N", help="number of tokens to generate")
    add("--tokens", type=int, metavar="N", help="show N tokens of the passage or prompt")
    add("--data", metavar="DIR", help="prepared folder of the passage (default: as in training)")
    add("--seed", type=int, default=1337, help="seed of --generate (default: 1337)")
    add("--out", type=Path, metavar="FILE", help="default: look.html beside the checkpoint")
    parser.error = lambda text: parser.exit(2, f"look.py: error: {tokenizer.one_line(text)}\n")
    args = parser.parse_args(argv)
    if args.tokens is not None and not 2 <= args.tokens <= MAX_TOKENS:
        parser.error(f"--tokens must be from 2 to {MAX_TOKENS}, not {args.tokens}")
    if not 0 <= args.generate <= MAX_TOKENS - 2:
        parser.error(f"--generate must be from 0 to {MAX_TOKENS - 2}, not {args.generate}")
    try:
        out, data = look(args)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"look.py: error: {tokenizer.one_line(error)}")
    size = f"{len(data['tokens'])} tokens, {len(data['layers'])} layers"
    print(tokenizer.printable(f"{out}: {size}; open it in a browser"))


if __name__ == "__main__":
    main()
