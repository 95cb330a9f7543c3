"""Recall tasks, generated window by window: `python -m lab.train --data mqar`, or passkey.

    mqar      k1 v1 k2 v2 ... kn vn ? k7 v7 k2 v2 k7 v7 ...    multi-query associative recall
              (Zoology, arXiv 2312.04927): n keys with random values, then queries. Any key can be
              queried at any time, so earlier answers do not narrow down the next one.
    passkey   noise ... ! d1 d2 d3 d4 noise ... ? d1 d2 d3 d4    four digits to remember

Only the answers after the "?" count, since nothing else is predictable.
"""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F

KEYS = 64  # tokens 0 ... 63: the keys, or the noise
VALUES = 64  # tokens 64 ... 127: the values; the first ten are the digits
DIGITS = 10
PASSKEY_LENGTH = 4
QUERY = 128  # "?"
MARKER = 129  # "!"
VOCAB_SIZE = 130

MIN_PAIRS = 4
VALIDATION_WINDOWS = 256
TOKENS_AT_ONCE = 2048  # per call of the model in `score`


@torch.no_grad()
def score(model, inputs, targets, device, autocast=contextlib.nullcontext):
    """Nats of each target, float64 [count, length], and whether it is the top prediction, bool.

    inputs, targets [count, length]. Each sequence starts from an empty state. A target of -100 does
    not count: it has 0 nats, and is not right. A long sequence is split into pieces, between which
    the state is carried, and needs no more memory than a short one.
    """
    count, length = targets.shape
    batch = max(TOKENS_AT_ONCE // length, 1)
    piece = TOKENS_AT_ONCE // batch
    nats = torch.zeros(count, length, dtype=torch.float64)
    right = torch.zeros(count, length, dtype=torch.bool)
    for first in range(0, count, batch):
        state = None
        for start in range(0, length, piece):
            part = slice(first, first + batch), slice(start, start + piece)
            wanted = targets[part].to(device)
            with autocast():
                logits, state = model(inputs[part].to(device), state)
            logits = logits.float()
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            nats[part] = loss.view_as(wanted).double().cpu()
            right[part] = (logits.argmax(-1) == wanted).cpu()
    return nats, right


class Recall:
    """A task for train.train, with the interface of train.Corpus."""

    tokenizer = None
    vocab_size = VOCAB_SIZE
    columns = ("val_accuracy",)

    def __init__(self, settings):
        """Raises ValueError for a context that is too short."""
        if settings.context < self.min_context:
            raise ValueError(f"--context must be at least {self.min_context} for {self.corpus}")
        self.length = settings.context + 1
        self.seed = settings.seed
        self.about = f"{self.corpus}, generated window by window"

    def windows(self, first, count, hard=None, held_out=False):
        """Windows first, first + 1, ... Each depends only on the seed and its number.

        Returns int64 [count, context + 1]. hard: their difficulty, the last argument of `generate`.
        held_out: windows that are never trained on, the same for every seed.
        """
        windows = []
        for number in range(first, first + count):
            seed = [0, number, 1] if held_out else [self.seed, number, 0]
            windows.append(self.generate(np.random.default_rng(seed), self.length, hard))
        return torch.from_numpy(np.stack(windows).astype(np.int64))

    def targets(self, windows):
        """The targets, int64 [count, context]: the answers, and -100 elsewhere."""
        after_question = (windows == QUERY).cumsum(1)[:, :-1] > 0
        tokens = windows[:, 1:]
        is_value = (tokens >= KEYS) & (tokens < KEYS + VALUES)
        return tokens.masked_fill(~(after_question & is_value), -100)

    def validate(self, model, limit, count, processes, autocast):
        """Nats per answer on the same held-out windows each time, a message, and log columns."""
        n = VALIDATION_WINDOWS
        if limit:
            n = min(n, max(limit // (self.length - 1), 1))
        total = np.zeros(3)
        for start in range(0, n, count * processes.world):  # the processes take turns
            first = start + count * processes.rank
            windows = self.windows(first, count, held_out=True)
            targets = self.targets(windows)
            targets[max(n - first, 0) :] = -100  # padding in the last turn does not count
            nats, right = score(model, windows[:, :-1], targets, processes.device, autocast)
            total += nats.sum().item(), right.sum().item(), (targets >= 0).sum().item()
        nats, right, number = processes.sum(*total)
        words = f"{nats / number:.4f} nats per answer, {right / number:.2%} right"
        return nats / number, words, {"val_accuracy": right / number}


class AssociativeRecall(Recall):
    corpus = "mqar"
    min_context = 4 * MIN_PAIRS

    @staticmethod
    def generate(rng, length, pairs=None):
        """A window of `length` tokens. pairs: their number; None: 4, 8, ..., equally often."""
        if pairs is None:
            doublings = int(np.log2(min((length - 1) // 4, KEYS) / MIN_PAIRS))
            pairs = MIN_PAIRS * 2 ** rng.integers(doublings + 1)
        keys = rng.permutation(KEYS)[:pairs]
        values = KEYS + rng.integers(VALUES, size=pairs)
        table = np.stack([keys, values], 1)
        queried = rng.integers(pairs, size=length // 2)
        return np.concatenate([table.ravel(), [QUERY], table[queried].ravel()])[:length]


class Passkey(Recall):
    corpus = "passkey"
    min_context = 2 * PASSKEY_LENGTH + 1

    @staticmethod
    def generate(rng, length, distance=None):
        """A window of `length` tokens. distance: noise tokens between the passkey and the "?"."""
        max_distance = length - 2 * PASSKEY_LENGTH - 2
        if distance is None:
            distance = rng.integers(max_distance + 1)
        digits = KEYS + rng.integers(DIGITS, size=PASSKEY_LENGTH)
        noise = rng.integers(KEYS, size=max_distance)
        before = noise[distance:]
        between = noise[:distance]
        return np.concatenate([before, [MARKER], digits, between, [QUERY], digits])


TASKS = {task.corpus: task for task in (AssociativeRecall, Passkey)}
