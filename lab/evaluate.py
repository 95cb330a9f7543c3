"""What a trained model can do: python -m lab.evaluate CHECKPOINT --loss --long --recall --routing

    --loss     the validation text in windows of the training length: the loss, and the loss by
               position in the window
    --long     the same text in windows of up to --times times the training length, with the state
               carried: does a longer past help, or hurt?
    --recall   for models of the recall tasks: the share of right answers, by number of pairs and
               by distance, that of a passkey up to --times times the training length
    --routing  what the rows of the memory do: how many are used, how sharply, how long they hold

Prints a line of JSON per result; the same checkpoint and options always give the same numbers on
the same machine. All but --recall need the prepared data that the model was trained on.
"""

import argparse
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import torch

import fmem
from data import prepare
from data.tokenizer import load_tokenizer, printable, token_bytes
from lab.tasks import KEYS, PASSKEY_LENGTH, TASKS, score
from train import one_line_errors, pick_device


def text_losses(model, tokens, length, device):
    """Nats of each token but the first, in windows of `length`: float64 [n] for tokens [n + 1].

    The last window may be shorter.
    """
    n = len(tokens) - 1
    whole = n // length * length
    losses = []
    for start, stop, size in ((0, whole, length), (whole, n, n - whole)):
        if stop > start:
            inputs = tokens[start:stop].view(-1, size)
            targets = tokens[start + 1 : stop + 1].view(-1, size)
            nats, _ = score(model, inputs, targets, device)
            losses.append(nats.flatten())
    return torch.cat(losses)


def doubling_edges(last, first=8):
    """0, 8, 16, 32, ... last: where the intervals end by which a loss is averaged."""
    edges = [0]
    while first < last:
        edges.append(first)
        first = 2 * first
    return [*edges, last]


def loss_by_position(model, tokens, context, n_bytes, device):
    """The loss of the whole text, then that of intervals of positions in the window."""
    losses = text_losses(model, tokens, context, device)
    yield {
        "result": "loss",
        "nats": losses.mean().item(),
        "bits_per_byte": losses.sum().item() / math.log(2) / n_bytes,
        "tokens": len(losses),
        "context": context,
    }
    whole = len(losses) // context * context
    by_position = losses[:whole].view(-1, context).mean(0)
    for start, stop in itertools.pairwise(doubling_edges(context)):
        nats = by_position[start:stop].mean().item()
        yield {"result": "position", "from": start + 1, "to": stop, "nats": nats}


def loss_beyond(model, tokens, context, times, device):
    """The loss in windows of 1, 2, 4, ... `times` times the training length.

    mean is that of all tokens: what a text of this length has. at_end is the loss in the second
    half of the windows. Other positions are other tokens, some of them easier; so what is measured
    is how much the loss of the *same* tokens changes against windows of the training length, and
    that is added to the loss there. stderr is that of the change, over stretches of a training
    window. Raises ValueError for a text that is too short.
    """
    lengths = [context * 2**i for i in range(int(math.log2(times)) + 1)]
    n = (len(tokens) - 1) // lengths[-1] * lengths[-1]
    if n == 0:
        most = (len(tokens) - 1) // context
        raise ValueError(f"the text has {len(tokens):,} tokens; --times must be at most {most}")
    tokens = tokens[: n + 1]
    at = torch.arange(n)
    late = at % context >= context // 2
    reference = text_losses(model, tokens, context, device)
    for length in lengths:
        losses = text_losses(model, tokens, length, device)
        counts = late & (at % length >= length // 2)
        change = torch.where(counts, losses - reference, 0.0).view(-1, context).sum(1)
        weight = counts.view(-1, context).sum(1)
        change = change[weight > 0] / weight[weight > 0]
        stderr = (change.std() / len(change) ** 0.5).item() if len(change) > 1 else None
        yield {
            "result": "long",
            "length": length,
            "mean": losses.mean().item(),
            "at_end": (reference[late].mean() + change.mean()).item(),
            "stderr": stderr,
            "tokens": n,
        }


def of_answers(nats, right, counts):
    """What is reported of the answers at which counts is true."""
    return {
        "right": right[counts].double().mean().item(),
        "nats": nats[counts].mean().item(),
        "answers": int(counts.sum()),
    }


def recall_by_pairs(model, context, device, count=256):
    """Associative recall: right answers by number of pairs, and by tokens since the key was seen.

    A key that is asked for again was seen with its value then, so its distance counts from there.
    """
    task = TASKS["mqar"](SimpleNamespace(context=context, seed=0))
    pairs = 4
    while pairs <= min(context // 4, KEYS):
        windows = task.windows(0, count, pairs, held_out=True)
        targets = task.targets(windows)
        nats, right = score(model, windows, targets, device)
        distance = torch.zeros_like(targets)
        for b, window in enumerate(windows.tolist()):
            seen = {}
            for t, token in enumerate(window[:-1]):
                if targets[b, t] >= 0:
                    distance[b, t] = t - seen[token]
                seen[token] = t
        yield {"result": "recall", "pairs": pairs, **of_answers(nats, right, targets >= 0)}
        for start, stop in itertools.pairwise(doubling_edges(int(distance.max()))):
            counts = (distance > start) & (distance <= stop)
            if counts.any():
                where = {"pairs": pairs, "from": start + 1, "to": stop}
                yield {"result": "distance", **where, **of_answers(nats, right, counts)}
        pairs = 2 * pairs


def recall_by_distance(model, context, times, device):
    """The passkey at the start of windows from a quarter of the training length to times it."""
    lengths = [context // 4]
    while lengths[-1] * 4 <= context * times:
        lengths.append(lengths[-1] * 4)
    for length in lengths:
        distance = length - 2 * PASSKEY_LENGTH - 1
        if distance < 0:
            continue
        task = TASKS["passkey"](SimpleNamespace(context=length, seed=0))
        count = max(min(256, 2**18 // length), 8)
        windows = task.windows(0, count, distance, held_out=True)
        targets = task.targets(windows)
        nats, right = score(model, windows, targets, device)
        where = {"length": length, "distance": distance}
        yield {"result": "passkey", **where, **of_answers(nats, right, targets >= 0)}


def entropy(p):
    return -torch.special.xlogy(p, p).sum(-1)


def half_life(theta):
    """Tokens until a row has lost half of what it held, theta [n, ...] -> [...].

    It keeps a share of prod (1 - theta).
    """
    lost = -torch.log1p(-theta.clamp(max=1 - 1e-9)).mean(0)
    return math.log(2) / lost.clamp_min(1e-12)


def describe_rows(theta, phi):
    """What the rows of a layer do; theta, phi [n, m] of n tokens, the routed rows alone."""
    theta = theta.double()
    eta = theta.sum(-1)  # the affinities of a token add up to 1
    alpha = theta / eta[:, None]
    use = alpha.mean(0)
    lives = half_life(theta)
    largest = use.argmax()
    quarters = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
    return {
        "rows": len(use),
        "entropy": entropy(alpha).mean().item(),  # of a token's affinity, after the top k
        "rows_per_token": entropy(alpha).exp().mean().item(),
        "rows_used": entropy(use).exp().item(),  # effective number, by all tokens together
        "largest_share": use[largest].item(),  # of the row that takes most: of the collapsed row
        "largest_half_life": lives[largest].item(),
        "half_life": torch.quantile(lives, quarters).tolist(),  # least, quartiles, most
        "eta": eta.mean().item(),
        "mu": phi.double().sum(-1).mean().item(),
    }


@torch.no_grad()
def routing(model, tokens, context, device):
    """What the rows of each layer do with a text [n], in windows of the training length.

    Raises ValueError for a model without rows, or a text shorter than a window.
    """
    if not all(hasattr(block.memory, "scan_inputs") for block in model.blocks):
        raise ValueError(f"--routing is about the rows of the memory; {model.layer_name} has none")
    windows = tokens[: len(tokens) // context * context].view(-1, context)
    if len(windows) == 0:
        raise ValueError(f"the text has {len(tokens)} tokens, fewer than the context, {context}")
    seen = [[] for _ in model.blocks]
    for part in windows.split(8):
        x = model.embed(part.to(device))
        for block, weights in zip(model.blocks, seen, strict=True):
            theta, phi, _ = block.memory.scan_inputs(block.memory_norm(x))
            weights.append(torch.stack([theta, phi]).flatten(1, 2).cpu())
            x, _ = block(x, None)
    for i, (block, weights) in enumerate(zip(model.blocks, seen, strict=True)):
        layer = block.memory
        theta, phi = torch.cat(weights, 1)  # [n, m]
        n_routed = layer.W_alpha.out_features
        result = {"result": "routing", "layer": i}
        result |= describe_rows(theta[:, :n_routed], phi[:, :n_routed])
        if theta.shape[1] > n_routed:  # a row that every token writes and reads
            shared = theta[:, -1].double()
            result["shared_eta"] = shared.mean().item()
            result["shared_mu"] = phi[:, -1].double().mean().item()
            result["shared_half_life"] = half_life(shared).item()
        if getattr(layer, "shift", None) is not None:
            result["lambda"] = torch.sigmoid(layer.shift).item()
        yield result


def held_out_text(saved, folder=None):
    """The validation tokens of a checkpoint's data, int64, and their number of bytes but the first.

    Raises ValueError if the folder was prepared with another tokenizer.
    """
    _, tokens, fields, _ = prepare.load(folder or saved["settings"]["data"])
    if fields != saved["tokenizer"]:
        raise ValueError("--data was prepared with another tokenizer than the checkpoint's")
    if len(tokens) < 2:
        raise ValueError("the validation text has no token to predict")
    tokens = torch.from_numpy(np.asarray(tokens).astype(np.int64))
    sizes = torch.tensor([len(piece) for piece in token_bytes(load_tokenizer(fields))])
    return tokens, int(sizes[tokens[1:]].sum())


def evaluate(model, saved, args, device):
    """The results that the options ask for, one after the other."""
    context = saved["settings"]["context"]
    is_text = saved["tokenizer"] is not None
    if args.recall and is_text:
        raise ValueError(
            f"--recall is for models of {' and '.join(TASKS)}, not of {saved['corpus']}"
        )
    if not is_text and (args.loss or args.long or args.routing):
        raise ValueError(f"a model of {saved['corpus']} reads no text: it can have --recall alone")
    if args.recall and saved["corpus"] == "mqar":
        yield from recall_by_pairs(model, context, device)
    elif args.recall:
        yield from recall_by_distance(model, context, args.times, device)
    if is_text:
        tokens, n_bytes = held_out_text(saved, args.data)
        first = tokens[: args.tokens + 1]
    if args.loss:
        yield from loss_by_position(model, tokens, context, n_bytes, device)
    if args.long:
        yield from loss_beyond(model, first, context, args.times, device)
    if args.routing:
        yield from routing(model, first, context, device)


def rounded(value):
    """Floats to six digits, also in a list."""
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"lab.evaluate: error: {printable(message)}\n")


def main(argv=None):
    parser = Parser(prog="lab.evaluate", description="Measure a trained model.")
    parser.add_argument("checkpoint", help="a file that train.py or lab.train saved")
    parser.add_argument("--loss", action="store_true", help="loss, and loss by position")
    parser.add_argument("--long", action="store_true", help="loss beyond the training length")
    parser.add_argument("--recall", action="store_true", help="right answers of a recall task")
    parser.add_argument("--routing", action="store_true", help="what the rows of the memory do")
    parser.add_argument("--times", type=int, default=128, help="training lengths, at most [128]")
    parser.add_argument(
        "--tokens", type=int, default=2**17, help="of the text [131072]; not --loss"
    )
    parser.add_argument("--data", help="prepared folder [that of the training]")
    parser.add_argument("--device", default="auto", help="cuda, cpu, ..., or auto [auto]")
    args = parser.parse_args(argv)
    if not (args.loss or args.long or args.recall or args.routing):
        parser.error("nothing to measure; give --loss, --long, --recall or --routing")
    if min(args.times, args.tokens) < 1:
        parser.error("--times and --tokens must be at least 1")
    torch.set_flush_denormal(True)  # sharp routing makes denormal decays, which are slow on a CPU
    with one_line_errors("lab.evaluate"):
        device, _ = pick_device(args.device)
        model, saved = fmem.load(args.checkpoint, device)
        for result in evaluate(model, saved, args, device):
            print(json.dumps({name: rounded(value) for name, value in result.items()}), flush=True)


if __name__ == "__main__":
    main()
