"""What a trained model can do: python -m experiments.evaluate CHECKPOINT [--loss] [--long N] [--recall] [--routing]

    --loss      loss on the validation text, in windows of the training length, by position in the window
    --long N    the same text in windows from 32 tokens to N times the training length: does a longer past help, or hurt?
    --recall    text: how much better a passage is predicted the second time; recall tasks: share of right answers
    --routing   the memory alone: which rows are used, how sharply, by which tokens, and how long they keep what they hold

Prints tables, and writes them with --json and --figure. The same checkpoint and options always give the same numbers on the
same machine. Needs the checkpoint and, except for tasks, the prepared data it was trained on.
"""
import argparse
import contextlib
import itertools
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import token_files
from data.messages import one_line
from data.recall import LENGTH, STRING, TASKS, Recall
from data.tokenizer import token_strings
from fmem import FactorizationMemory
from training.checkpoint import load_checkpoint, model_from, tokenizer_of
from training.device import pick_device
from training.tasks import evaluate

# ------------------------------------------------------------------------------------------------------- loss, and long


@torch.no_grad()
def token_losses(model, tokens, length, device, at_once=8192):
    """Nats of each token but the first, the text cut into windows of `length`, each from an empty state: float64 [n].

    tokens: int64 [n + 1], n a multiple of length. at_once: how many go through the model together.
    """
    inputs, targets = tokens[:-1].view(-1, length), tokens[1:].view(-1, length)
    batch = max(at_once // length, 1)
    # what has a state of fixed size goes through long windows piece by piece; attention sees them whole, which is faster
    piece = length if model.config.mixer == "attention" else max(at_once // batch, 1)
    losses = []
    for some, wanted in zip(inputs.split(batch), targets.split(batch), strict=True):
        state, parts = None, []
        for x, y in zip(some.split(piece, 1), wanted.split(piece, 1), strict=True):
            logits, state = model(x.to(device), state)
            parts.append(F.cross_entropy(logits.float().flatten(0, 1), y.to(device).flatten(), reduction="none").view_as(y))
        losses.append(torch.cat(parts, 1).cpu().double())
    return torch.cat(losses).flatten()


def validation(checkpoint, text):
    """-> tokens held out of training, bytes of each token of the vocabulary, tokenizer. text: (prepared folder, None for that of
    the training; "val" or "test"), None for its val. Raises ValueError if the data has another tokenizer."""
    enc, (folder, split) = tokenizer_of(checkpoint), text or (None, "val")
    _, tokens, fields, _ = token_files.load(folder or checkpoint["settings"]["data"], held_out=split)
    if fields != checkpoint["tokenizer"]:
        raise ValueError("--data was prepared with another tokenizer than the checkpoint's")
    return tokens, np.array([len(piece) for piece in token_strings(enc)]), enc


def measure_loss(model, checkpoint, text, device):
    tokens, sizes, _ = validation(checkpoint, text)
    context = checkpoint["settings"]["context"]
    n = (len(tokens) - 1) // max(context, 1) * context
    if n <= 0:
        raise ValueError(f"the validation text has {len(tokens)} tokens, fewer than the {context} of the training context")
    nats, bits = evaluate(model, tokens, context, sizes, device, contextlib.nullcontext)
    model.eval()
    whole = torch.from_numpy(tokens[:n + 1].astype(np.int64))
    by_position = token_losses(model, whole, context, device).view(-1, context).mean(0)
    edges = [0] + [2**i for i in range(3, 40) if 2**i < context] + [context]
    rows = [{"from": a + 1, "to": b, "nats": by_position[a:b].mean().item()} for a, b in itertools.pairwise(edges)]
    print(f"{nats:.4f} nats per token, {bits:.4f} bits per byte, {len(tokens) - 1:,} tokens in windows of {context}")
    table(["tokens of the window", "nats per token"], [[f"{r['from']}-{r['to']}", f"{r['nats']:.3f}"] for r in rows])
    return {"nats": nats, "bits_per_byte": bits, "tokens": len(tokens) - 1, "context": context, "by_position": rows}


def measure_long(model, checkpoint, text, device, times, n_tokens):
    """The same text, cut into windows of 32, 64, ... times * context tokens.

    mean[L]: mean loss of all tokens, so that of the windows' first L tokens. position[L]: the loss at positions L/2 to L.
    Different positions are different tokens, some easier than others; so what is measured is how much the loss on the
    *same* tokens changes with that past, against windows of the training length, and this difference is added to the loss
    there. stderr is that of the difference, over blocks of one training window.
    """
    tokens, _, _ = validation(checkpoint, text)
    context = checkpoint["settings"]["context"]
    longest = times * context
    n = min(n_tokens, len(tokens) - 1) // longest * longest
    if n == 0:
        raise ValueError(f"the validation text has {len(tokens):,} tokens; --long must be at most "
                         f"{min(n_tokens, len(tokens) - 1) // context} for windows of {context}")
    whole = torch.from_numpy(tokens[:n + 1].astype(np.int64))
    lengths = sorted({context, longest} | {2**i for i in range(5, 60) if 2**i < longest and longest % 2**i == 0})
    at, rows = torch.arange(n), []
    reference = token_losses(model, whole, context, device)
    late = at % context >= context // 2
    base = reference[late].mean()
    for length in lengths:
        losses = reference if length == context else token_losses(model, whole, length, device)
        both = late & (at % length >= length // 2)
        difference = torch.where(both, losses - reference, 0.0)
        blocks, weight = difference.view(-1, context).sum(1), both.view(-1, context).sum(1)
        blocks = blocks[weight > 0] / weight[weight > 0]
        rows.append({"length": length, "mean": losses.mean().item(), "position": (base + blocks.mean()).item(),
                     "stderr": (blocks.std() / len(blocks) ** 0.5).item() if len(blocks) > 1 else None})
    table(["window", "mean so far", "at its second half", "+-", "against training length"],
          [[f"{r['length']:,}", f"{r['mean']:.3f}", f"{r['position']:.3f}", "" if r["stderr"] is None else f"{r['stderr']:.3f}",
            f"{r['position'] / base.item() - 1:+.2%}"] for r in rows])
    return {"context": context, "tokens": n, "base": base.item(), "rows": rows}


def draw_long(result, plt):
    figure, axes = plt.subplots(figsize=(6, 4))
    for key, label in (("mean", "mean loss so far"), ("position", "loss at that position")):
        axes.plot([r["length"] for r in result["rows"]], [r[key] for r in result["rows"]], "o-", label=label)
    axes.axvline(result["context"], color="grey", linewidth=1, linestyle=":")
    axes.set(xscale="log", xlabel="tokens", ylabel="nats per token")
    axes.legend()
    return figure


# --------------------------------------------------------------------------------------------------------------- recall

@torch.no_grad()
def measure_recall(model, checkpoint, text, device):
    if checkpoint["corpus"] in TASKS and checkpoint["tokenizer"] is None:
        return measure_task(model, checkpoint, device)
    tokens, _, _ = validation(checkpoint, text)
    passage, n, rng, rows = 64, 32, np.random.default_rng(0), []
    if len(tokens) < 2 * passage + n:
        raise ValueError(f"the validation text has {len(tokens)} tokens, too few to repeat passages of {passage}")
    starts = rng.integers(len(tokens) - passage, size=n)
    for distance in (0, 64, 256, 1024, 4096):
        if distance + passage > len(tokens):
            break
        between = rng.integers(len(tokens) - distance, size=n)
        texts = np.stack([np.concatenate([tokens[a:a + passage], tokens[b:b + distance], tokens[a:a + passage]])
                          for a, b in zip(starts, between, strict=True)]).astype(np.int64)
        texts = torch.from_numpy(texts)
        losses = []
        for text in texts.split(8):
            logits, _ = model(text[:, :-1].to(device))
            losses.append(F.cross_entropy(logits.float().transpose(1, 2), text[:, 1:].to(device), reduction="none").cpu())
        losses = torch.cat(losses).double()
        first, second = losses[:, :passage - 1], losses[:, -(passage - 1):]     # the first token of a copy is a surprise
        rows.append({"distance": distance, "first": first.mean().item(), "second": second.mean().item(),
                     "stderr": ((second - first).mean(1).std() / n**0.5).item()})
    table(["tokens between", "first time", "second time", "gain", "+-"],
          [[f"{r['distance']:,}", f"{r['first']:.3f}", f"{r['second']:.3f}", f"{r['first'] - r['second']:.3f}",
            f"{r['stderr']:.3f}"] for r in rows])
    return {"task": "text", "passage": passage, "windows": n, "rows": rows}


# what makes each task hard
HARD = {"mqar": "pairs", "mqar-any": "pairs", "passkey": "distance", "copy": "length", "repeat": "strings"}


def measure_task(model, checkpoint, device):
    """Share of right answers against what makes the task hard; a passkey and values to copy up to 128 and 16 training lengths."""
    task, context, rows = checkpoint["corpus"], checkpoint["settings"]["context"], []
    if HARD[task] == "pairs":
        cases = [(context, 4 * 2**i) for i in range(30) if 4 * 2**i <= min(context // 4, 128)]
    elif task == "passkey":
        cases = [(length, length - 2 * LENGTH - 1) for length in (context // 4, context, 4 * context, 16 * context, 128 * context)
                 if length >= 2 * LENGTH + 2]
    elif task == "copy":
        cases = [(length, STRING) for length in (context, 4 * context, 16 * context)]
    else:
        cases = [(context, strings) for strings in (1, 2, 4, 7) if 2 * STRING * strings <= context]
    for length, hard in cases:
        windows = max(min(256, 2**18 // length), 8)
        nats, right = Recall(task, length).evaluate(model, device, contextlib.nullcontext, windows, hard)
        rows.append({HARD[task]: length if task == "copy" else hard, "windows": windows, "nats": nats, "right": right})
    table([{"distance": "tokens between"}.get(HARD[task], HARD[task]), "nats per answer", "right"],
          [[f"{r[HARD[task]]:,}", f"{r['nats']:.3f}", f"{r['right']:.1%}"] for r in rows])
    return {"task": task, "state_bytes": state_bytes(model, context), "rows": rows}


@torch.no_grad()
def state_bytes(model, length):
    """The size of the model's state after a text of that many tokens, in bytes."""
    _, state = model(torch.zeros(1, length, dtype=torch.long, device=model.embed.weight.device))
    kept = [part for layer in state for part in (layer if isinstance(layer, tuple) else (layer,))]
    return sum(part.numel() * part.element_size() for part in kept if torch.is_tensor(part))


def draw_recall(result, plt):
    figure, axes = plt.subplots(figsize=(6, 4))
    key = HARD.get(result["task"], "distance")
    if result["task"] == "text":
        for column in ("first", "second"):
            axes.plot([r[key] + 1 for r in result["rows"]], [r[column] for r in result["rows"]], "o-", label=f"{column} time")
        axes.set(xscale="log", xlabel="tokens between, + 1", ylabel="nats per token")
        axes.legend()
    else:
        axes.plot([r[key] for r in result["rows"]], [r["right"] for r in result["rows"]], "o-")
        axes.set(xscale="log", xlabel=key, ylabel="share of right answers", ylim=(0, 1.02))
    return figure


# -------------------------------------------------------------------------------------------------------------- routing

@torch.no_grad()
def record_routing(model, tokens, context, device):
    """-> per layer: softmax [n, m] of eq. 4, alpha [n, m] of the write after the top k, eta [n], mu [n]; with a shared row, which
    is none of the m, its two rates [n, 2], else [n, 0]."""
    memories = [block.memory for block in model.blocks]
    if not all(isinstance(memory, FactorizationMemory) for memory in memories):
        raise ValueError(f"--routing is about the memory; this model has {model.config.mixer}")
    seen = [[] for _ in memories]

    def watch(memory, kept):
        route = memory.route                            # the method of the class

        def watching(x, *before):
            theta, phi, rows = route(x, *before)
            soft = torch.softmax(memory.W_alpha(x).double() / memory.config.tau, -1)
            eta, mu = (rate(x).double().sigmoid()[..., 0] for rate in (memory.w_eta, memory.w_mu))
            m = soft.shape[-1]
            alpha, shared = theta[..., :m].double() / eta[..., None], torch.cat([theta[..., m:], phi[..., m:]], -1).double()
            if rows is not None:
                alpha = torch.zeros_like(soft).scatter(-1, rows, alpha)
            kept.append([v.flatten(0, 1).cpu() for v in (soft, alpha, eta, mu, shared)])
            return theta, phi, rows

        memory.route = watching

    for memory, kept in zip(memories, seen, strict=True):
        watch(memory, kept)
    try:
        for windows in tokens.view(-1, context).split(8):
            model(windows.to(device))
    finally:
        for memory in memories:
            del memory.route                            # the class's own shows again
    return [[torch.cat(parts) for parts in zip(*kept, strict=True)] for kept in seen]


def entropy(p):
    return -torch.special.xlogy(p, p).sum(-1)


def describe(soft, alpha, eta, mu, shared, tokens, context, words):
    """What --routing reports of one layer. tokens [n]: the texts the layer read."""
    n, m = alpha.shape
    use, top = alpha.mean(0), alpha.argmax(-1)
    share = torch.bincount(top, minlength=m).double() / n
    inside = torch.arange(1, n) % context != 0          # both tokens of the pair in the same window
    # does the token alone tell the row? learnt on the first half of the text, asked on the second
    half = n // 2
    votes = torch.zeros(int(tokens.max()) + 1, m)
    votes.index_put_((tokens[:half], top[:half]), torch.ones(half), accumulate=True)
    told = (votes.argmax(-1)[tokens[half:]] == top[half:]).double().mean().item()
    common = (top[half:] == votes.sum(0).argmax()).double().mean().item()
    # a row keeps prod (1 - theta) of what it holds: half of it after ln 2 / mean(-ln (1 - theta)) tokens
    theta = (alpha * eta[:, None]).clamp(max=1 - 1e-9)
    half_life = math.log(2) / (-torch.log1p(-theta)).mean(0).clamp(min=1e-12)
    quantiles = torch.quantile(half_life, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)).tolist()
    counts = torch.bincount(tokens, minlength=votes.shape[0]).double()
    sums = torch.zeros(votes.shape[0], m, dtype=torch.float64).index_add_(0, tokens, alpha)
    lift = torch.where(counts[:, None] >= 20, sums / counts[:, None].clamp(min=1) / use.clamp(min=1e-12), 0.0)
    most = lift.topk(min(6, len(lift)), 0).indices.T.tolist()
    collected = [[words[i] for i in most[row] if lift[i, row] > 1] for row in range(m)]
    return {"entropy": entropy(soft).mean().item(), "rows_per_token": entropy(alpha).exp().mean().item(),
            "rows_used": entropy(use).exp().item(), "dead": (use < 0.1 / m).double().mean().item(),
            "moves": (top[1:] != top[:-1])[inside].double().mean().item(), "moves_if_random": 1 - share.square().sum().item(),
            "told_by_token": told, "told_by_most_common": common,
            "eta": [eta.mean().item(), eta.std().item()], "mu": [mu.mean().item(), mu.std().item()],
            "half_life": quantiles, "use": use.tolist(), "collected": collected,
            **({"shared_row": shared_row(*shared.unbind(1))} if shared.numel() else {})}


def shared_row(eta, mu):
    """The same of the row that every token writes and reads."""
    half_life = math.log(2) / (-torch.log1p(-eta.clamp(max=1 - 1e-9))).mean().clamp(min=1e-12)
    return {"eta": [eta.mean().item(), eta.std().item()], "mu": [mu.mean().item(), mu.std().item()],
            "half_life": half_life.item()}


def measure_routing(model, checkpoint, text, device, n_tokens):
    tokens, _, enc = validation(checkpoint, text)
    context = checkpoint["settings"]["context"]
    n = min(n_tokens, len(tokens)) // context * context
    if n == 0:
        raise ValueError(f"the validation text has {len(tokens)} tokens, fewer than the {context} of the training context")
    tokens = torch.from_numpy(tokens[:n].astype(np.int64))
    words = [piece.decode("utf-8", "replace") for piece in token_strings(enc)]
    words[enc.eot_token] = "<|endoftext|>"
    seen = record_routing(model, tokens, context, device)
    layers = [describe(*layer, tokens, context, words) for layer in seen]
    if getattr(model.config, "shift", False):           # the part of the token before in the routing of a write
        for s, block in zip(layers, model.blocks, strict=True):
            s["lambda"] = torch.sigmoid(block.memory.shift).item()
    m = seen[0][0].shape[1]                             # rows that tokens are routed to
    table(["layer", "entropy", f"rows per token (of {m})", "rows used", "dead", "top row moves", "if random", "told by token",
           "by most common", "eta", "mu", "half-life: min, median, max"],
          [[i, f"{s['entropy']:.2f}", f"{s['rows_per_token']:.1f}", f"{s['rows_used']:.1f}", f"{s['dead']:.0%}",
            f"{s['moves']:.0%}",
            f"{s['moves_if_random']:.0%}", f"{s['told_by_token']:.0%}", f"{s['told_by_most_common']:.0%}",
            f"{s['eta'][0]:.2f}", f"{s['mu'][0]:.2f}", "{:.0f}, {:.0f}, {:.0f}".format(*s["half_life"][::2])]
           for i, s in enumerate(layers)])
    for i, s in enumerate(layers):
        if "shared_row" in s:
            print(f"layer {i}, the shared row: eta {s['shared_row']['eta'][0]:.2f}, mu {s['shared_row']['mu'][0]:.2f}, "
                  f"half-life {s['shared_row']['half_life']:.1f}")
        if "lambda" in s:
            print(f"layer {i}, the shift: lambda {s['lambda']:.2f}")
    for i, s in enumerate(layers):
        print(f"\nlayer {i}, the tokens that each row takes most often beyond its average:")
        for row, collected in enumerate(s["collected"]):
            print(f"  {row:4d} {s['use'][row]:6.1%}  " + " ".join(map(repr, collected)))
    start = min(40, max(context - 48, 0))               # a stretch of the first window for the heat map
    stretch = slice(start, min(start + 48, context))
    sentence = {"tokens": [words[t] for t in tokens[stretch].tolist()],
                "alpha": [[[round(v, 3) for v in row] for row in layer[1][stretch].tolist()] for layer in seen]}
    return {"step": checkpoint["step"], "tokens": n, "n_rows": m, "k_rows": model.config.k_rows, "layers": layers,
            "sentence": sentence}


def draw_routing(result, plt):
    words, alphas = result["sentence"]["tokens"], result["sentence"]["alpha"]
    figure, axes = plt.subplots(len(alphas), 1, figsize=(11, 1.9 * len(alphas)), sharex=True, squeeze=False)
    for i, (ax, alpha) in enumerate(zip(axes[:, 0], alphas, strict=True)):
        ax.imshow(np.array(alpha).T, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        ax.set(ylabel=f"layer {i}\nrow")
    words = [w.replace("\n", "\\n").replace("$", r"\$") for w in words]
    axes[-1, 0].set_xticks(range(len(words)), words, rotation=90, fontsize=8)
    return figure


# ----------------------------------------------------------------------------------------------------- the command line

def table(head, rows):
    rows = [list(map(str, row)) for row in [head, *rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def save_figure(path, result):
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--figure needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    draw = {"long": draw_long, "recall": draw_recall, "routing": draw_routing}
    for name, drawn in result.items():
        if name in draw:
            figure = draw[name](drawn, plt)
            figure.savefig(path if len(result) == 1 else path.with_stem(f"{path.stem}-{name}"), dpi=110, bbox_inches="tight")
            plt.close(figure)


def main(argv=None):
    p = argparse.ArgumentParser(description="Measure a trained model.", allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"evaluate: error: {one_line(message)}; --help lists the options\n")
    p.add_argument("checkpoint", metavar="CHECKPOINT")
    p.add_argument("--loss", action="store_true", help="loss on the validation text (default, if nothing else is asked)")
    p.add_argument("--long", type=int, metavar="N", help="loss up to N times the training length")
    p.add_argument("--recall", action="store_true", help="what the model can find again")
    p.add_argument("--routing", action="store_true", help="what the rows of the memory do")
    p.add_argument("--tokens", type=int, default=131072, help="validation tokens for --long and --routing (default: 131072)")
    p.add_argument("--data", metavar="DIR", help="prepared folder (default: that of the training)")
    p.add_argument("--split", default="val", choices=["val", "test"], help="of that folder: val, or test if it has one")
    p.add_argument("--json", metavar="FILE", type=Path, help="write the results")
    p.add_argument("--figure", metavar="FILE", type=Path, help="draw --long, --recall and --routing (.png)")
    p.add_argument("--device", default="auto", help="cuda, mps, cpu, or auto (default: auto)")
    a = p.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        torch.set_flush_denormal(True)
        if a.long is not None and a.long < 1:
            raise ValueError(f"--long must be at least 1, not {a.long}")
        if a.tokens < 1:
            raise ValueError(f"--tokens must be at least 1, not {a.tokens}")
        device, text = pick_device(a.device)[0], (a.data, a.split)
        checkpoint = load_checkpoint(Path(a.checkpoint), device)
        model, result = model_from(checkpoint, device, scan="auto"), {}
        if a.loss or not (a.long or a.recall or a.routing):
            result["loss"] = measure_loss(model, checkpoint, text, device)
        if a.long:
            result["long"] = measure_long(model, checkpoint, text, device, a.long, a.tokens)
        if a.recall:
            result["recall"] = measure_recall(model, checkpoint, text, device)
        if a.routing:
            result["routing"] = measure_routing(model, checkpoint, text, device, a.tokens)
        if a.json:
            token_files.write_json(a.json, result)
        if a.figure:
            save_figure(a.figure, result)
    except BrokenPipeError:                             # the reader has enough of it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, RuntimeError) as e:    # RuntimeError: too little memory
        sys.exit(f"evaluate: error: {one_line(e)}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
