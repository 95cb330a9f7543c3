"""Evaluate a trained model: python -m lab.evaluate CHECKPOINT --long --recall --routing

    --long     the loss in windows of up to --times times the training length, with the state
               carried along: does a longer context help or hurt?
    --recall   for models of the recall tasks: the accuracy by number of pairs, or by distance of
               the passkey, up to --times times the training length
    --routing  how many rows of the memory are used, and how long they keep their contents

Prints a line of JSON per result. All but --recall need the data that the model was trained on.
"""

import argparse
import json
import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import fmem
from data import prepare
from lab.tasks import KEYS, MIN_PAIRS, PASSKEY_LENGTH, TASKS, score
from train import one_line_errors, pick_device


def text_losses(model, tokens, length, device):
    """Losses in windows of `length`: tokens [n + 1] -> nats of all but the first, float64 [n]."""
    n = len(tokens) - 1
    padded = F.pad(tokens, (0, -n % length), value=-100)  # padding in the last window is ignored
    inputs = padded[:-1].clamp_min(0).view(-1, length)
    targets = padded[1:].view(-1, length)
    nats, _ = score(model, inputs, targets, device)
    return nats.flatten()[:n]


def loss_beyond(model, tokens, context, times, device):
    """The loss in windows of 1, 2, 4, ... `times` times the training length.

    mean is the loss of all tokens. at_end is the loss in the second half of the windows. Different
    positions hold different tokens, some of them easier. So at_end is the loss in the second half
    of windows of the training length, plus the change of the loss of the *same* tokens between
    the two lengths. Raises ValueError for a text that is too short.
    """
    lengths = [context * 2**i for i in range(int(math.log2(times)) + 1)]
    n = (len(tokens) - 1) // lengths[-1] * lengths[-1]
    if n == 0:
        limit = (len(tokens) - 1) // context
        raise ValueError(f"the text has {len(tokens):,} tokens; --times must be at most {limit}")
    tokens = tokens[: n + 1]
    position = torch.arange(n)
    late = position % context >= context // 2
    reference = text_losses(model, tokens, context, device)
    for length in lengths:
        losses = text_losses(model, tokens, length, device)
        at_end = late & (position % length >= length // 2)
        change = (losses - reference)[at_end].mean()
        yield {
            "result": "long",
            "length": length,
            "mean": losses.mean().item(),
            "at_end": (reference[late].mean() + change).item(),
            "tokens": n,
        }


def right_answers(model, task, count, hard, device):
    """The accuracy on `count` held-out windows. hard: their difficulty."""
    windows = task.windows(0, count, hard, held_out=True)
    targets = task.targets(windows)
    nats, right = score(model, windows[:, :-1], targets, device)
    answers = targets >= 0
    return {
        "right": right[answers].double().mean().item(),
        "nats": nats[answers].mean().item(),
        "answers": int(answers.sum()),
    }


def recall_by_pairs(model, context, device, count=256):
    """Associative recall with 4, 8, 16, ... pairs, up to the most that fit the training length."""
    task = TASKS["mqar"](SimpleNamespace(context=context, seed=0))
    pairs = MIN_PAIRS
    while pairs <= min(context // 4, KEYS):
        answers = right_answers(model, task, count, pairs, device)
        yield {"result": "recall", "pairs": pairs, **answers}
        pairs = 2 * pairs


def recall_by_distance(model, context, times, device):
    """The passkey at the start of windows from 1/4 to `times` times the training length."""
    length = context // 4
    while length <= context * times:
        distance = length - 2 * PASSKEY_LENGTH - 1  # the most that fits in a window
        if distance >= 0:
            task = TASKS["passkey"](SimpleNamespace(context=length, seed=0))
            count = max(min(256, 2**18 // length), 8)
            answers = right_answers(model, task, count, distance, device)
            yield {"result": "passkey", "length": length, "distance": distance, **answers}
        length = 4 * length


def describe_rows(theta):
    """Statistics of a layer's rows; theta [n, m] of n tokens, for the routed rows only."""
    theta = theta.double()
    alpha = theta / theta.sum(-1, keepdim=True)  # the affinities of a token add up to 1

    def effective_number(p):
        return torch.special.entr(p).sum(-1).exp().mean().item()

    # A row keeps the share prod (1 - theta). Its half-life is the number of tokens until it is 1/2.
    lost = -torch.log1p(-theta.clamp(max=1 - 1e-9)).mean(0)
    half_life = math.log(2) / lost.clamp_min(1e-12)
    quarters = torch.linspace(0, 1, 5, dtype=torch.float64)
    return {
        "rows": theta.shape[-1],
        "rows_per_token": effective_number(alpha),  # after the top k
        "rows_used": effective_number(alpha.mean(0)),  # by all tokens
        "half_life": torch.quantile(half_life, quarters).tolist(),  # minimum, quartiles, maximum
    }


@torch.no_grad()
def routing(model, tokens, context, device):
    """Statistics of each layer's routed rows for tokens [n], in windows of the training length.

    Raises ValueError for a model without rows, or a text shorter than a window.
    """
    if not all(hasattr(block.memory, "scan_inputs") for block in model.blocks):
        raise ValueError(f"--routing needs memory rows; {model.layer_name} has none")
    windows = tokens[: len(tokens) // context * context].view(-1, context)
    if len(windows) == 0:
        raise ValueError(f"the text has {len(tokens)} tokens, fewer than the context of {context}")
    weights = {block.memory: [] for block in model.blocks}

    def note(memory, arguments):
        theta, _, _ = memory.scan_inputs(*arguments)
        weights[memory].append(theta.flatten(0, 1).cpu())

    hooks = [block.memory.register_forward_pre_hook(note) for block in model.blocks]
    for part in windows.split(8):
        model.hidden(part.to(device))
    for hook in hooks:
        hook.remove()
    for i, (memory, parts) in enumerate(weights.items()):
        n_routed = memory.W_alpha.out_features  # all rows but a shared one
        theta = torch.cat(parts)[:, :n_routed]  # [n, n_routed]
        yield {"result": "routing", "layer": i, **describe_rows(theta)}


def evaluate(model, saved, args, device):
    """Yield the results that the options select."""
    context = saved["settings"]["context"]
    is_text = saved["tokenizer"] is not None
    if args.recall and is_text:
        raise ValueError(f"--recall is for models of {' and '.join(TASKS)}, not of text")
    if not is_text and (args.long or args.routing):
        raise ValueError(f"a model of {saved['corpus']} was not trained on text; use --recall")
    if args.recall and saved["corpus"] == "mqar":
        yield from recall_by_pairs(model, context, device)
    elif args.recall:
        yield from recall_by_distance(model, context, args.times, device)
    if is_text:
        _, tokens, fields, _ = prepare.load(args.data or saved["settings"]["data"])
        if fields != saved["tokenizer"]:
            raise ValueError("--data was prepared with another tokenizer than the checkpoint's")
        tokens = torch.from_numpy(tokens[: args.tokens + 1].astype(np.int64))
    if args.long:
        yield from loss_beyond(model, tokens, context, args.times, device)
    if args.routing:
        yield from routing(model, tokens, context, device)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="lab.evaluate", description="Measure a trained model.")
    parser.add_argument("checkpoint", help="a file that train.py or lab.train saved")
    parser.add_argument("--long", action="store_true", help="loss beyond the training length")
    parser.add_argument("--recall", action="store_true", help="accuracy on a recall task")
    parser.add_argument("--routing", action="store_true", help="how the memory rows are used")
    parser.add_argument("--times", type=int, default=128, help="longest, in training lengths [128]")
    parser.add_argument("--tokens", type=int, default=2**17, help="for --long, --routing [131072]")
    parser.add_argument("--data", help="prepared folder [as in training]")
    parser.add_argument("--device", default="auto", help="cuda, cpu, ..., or auto [auto]")
    args = parser.parse_args(argv)
    if not (args.long or args.recall or args.routing):
        parser.error("nothing to measure; give --long, --recall or --routing")
    if min(args.times, args.tokens) < 1:
        parser.error("--times and --tokens must be at least 1")
    torch.set_flush_denormal(True)  # sharp routing makes denormal decays, which are slow on a CPU
    with one_line_errors("lab.evaluate"):
        device, _ = pick_device(args.device)
        model, saved = fmem.load(args.checkpoint, device)
        for result in evaluate(model, saved, args, device):
            six_digits = {"parse_float": lambda number: float(f"{float(number):.6g}")}
            print(json.dumps(json.loads(json.dumps(result), **six_digits)), flush=True)


if __name__ == "__main__":
    main()
