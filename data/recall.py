"""Tasks that test recall alone, generated for every batch: `python train.py --data mqar`, or another of these.

    mqar     k1 v1 k2 v2 ... kn vn ? k7 v7 k2 v2 ...      multi-query associative recall (Zoology, arXiv 2312.04927): each key
                                                          has a random value, and every key is asked for: in
                                                          training over and over, to the window's end; in a test once
    mqar-any k1 v1 k2 v2 ... kn vn ? k7 v7 k7 v7 ...      the same, but any of the keys is asked for at any time, so that the
                                                          values that have not come yet say nothing about the next
    passkey  noise ... ! d1 d2 d3 d4 noise ... ? d1 d2 d3 d4      four random digits to be kept while noise goes by
    copy     . . v1 . v2 . . . v3 . ... ? v1 v2 v3 ...            selective copying (Mamba, arXiv 2312.00752): 16 values among
                                                          blanks, to be written down in their order
    repeat   a1 ... a16 b1 ... b16 ? b1 ... b16 a1 ... a16        strings of 16 tokens, no token twice, then again in another
                                                          order, in training over and over

Only the answers, which follow "?", count in the loss and in the accuracy; the rest cannot be predicted. Neither can the first
token of a string that is repeated, which therefore does not count.
"""
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

KEYS = VALUES = NOISE = 64              # tokens 0 ... 63: keys, or noise; from 64 on: values, of which ten are the digits
DIGITS, LENGTH = 10, 4
STRING = 16                             # values to be copied, or tokens of a string to be repeated
ASK, HERE, FILL = 128, 129, 130         # "?", "!", and what fills a window up
VOCAB = 131


def word(token):
    """A token as it is shown: k7 a key, or noise; v7 a value, or digit; what asks, announces and fills as it is."""
    return f"k{token}" if token < KEYS else f"v{token - KEYS}" if token < KEYS + VALUES else {ASK: "?", HERE: "!"}.get(token, ".")


class Recall:
    """Windows of context + 1 tokens of one of the TASKS; like training/batches.py's a function of (seed, step) alone."""

    def __init__(self, task, context, batch_size=1, seed=0):
        self.generator, shortest = TASKS[task]
        if context < shortest:
            raise ValueError(f"--data {task} needs a --context of at least {shortest}, not {context}")
        self.task, self.context, self.batch_size, self.seed = task, context, batch_size, seed
        self.per_epoch = 10**9          # never the same again

    def __call__(self, step, part=slice(None)):
        """Windows `part` of the step's batch: int64 [windows, context + 1]."""
        return self.make(np.random.default_rng([self.seed, step]), self.batch_size)[part]

    def make(self, rng, n, hard=None):
        """n windows. hard: what makes the task hard, see the generators below; None: at random, as in training."""
        windows = [self.generator(rng, self.context + 1, hard) for _ in range(n)]
        return torch.from_numpy(np.stack(windows).astype(np.int64))

    def targets(self, windows):
        """What the model must predict: the answers, int64 [windows, context]; elsewhere -100, which cross_entropy leaves out."""
        asked, tokens = (windows == ASK).cumsum(1)[:, :-1], windows[:, 1:]
        if self.task == "repeat":       # the second to last token of each string
            answer = (asked > 0) & ((asked.cumsum(1) - 1) % STRING != 0) & (tokens < FILL)
        else:
            answer = (asked > 0) & (tokens >= KEYS) & (tokens < KEYS + VALUES)
        return tokens.masked_fill(~answer, -100)

    @torch.no_grad()
    def evaluate(self, model, device, amp, windows=256, hard=None, batch=8, seed=2**31, piece=2048):
        """-> mean loss per answer, share of answers that the likeliest token gets right. Always the same windows."""
        rng, training = np.random.default_rng([seed, hard or 0]), model.training
        model.eval()
        nats = right = count = 0
        for _ in range(0, windows, batch):
            made = self.make(rng, min(batch, windows), hard)
            targets, state = self.targets(made).to(device), None
            for some, wanted in zip(made[:, :-1].to(device).split(piece, 1), targets.split(piece, 1), strict=True):
                with amp():             # in pieces, so that a long window needs no more memory than a short one
                    x, state = model.hidden(some, state)
                    at = wanted >= 0
                    logits = model.head(x[at]).float()
                nats += F.cross_entropy(logits, wanted[at], reduction="sum").item()
                right += (logits.argmax(-1) == wanted[at]).sum().item()
                count += at.sum().item()
        model.train(training)
        return nats / count, right / count


def mqar(rng, length, pairs=None, in_turn=True):
    """pairs: how many are to be kept. in_turn: no key is asked for again before all have been."""
    most = min((length - 1) // 4, KEYS)
    training = pairs is None
    if training:                        # 4, 8, 16, ... pairs: each as often as the others
        pairs = 4 * 2 ** rng.integers(int(np.log2(most / 4)) + 1)
    if not 1 <= pairs <= most:
        raise ValueError(f"{length - 1} tokens have room for 1 to {most} pairs, not {pairs}")
    keys = rng.permutation(KEYS)[:pairs]
    both = np.stack([keys, KEYS + rng.integers(VALUES, size=pairs)], 1)
    return asked_for(rng, both, length, training, in_turn)


def asked_for(rng, rows, length, training, in_turn=True):
    """The rows, then as many in another order, or if not in turn any of them: once, or over and over to the end of the window."""
    n, times = len(rows), -(-length // rows.size) if training else 1
    again = [rows[rng.permutation(n) if in_turn else rng.integers(n, size=n)].ravel() for _ in range(times)]
    return np.concatenate([rows.ravel(), [ASK], *again, np.full(length, FILL)])[:length]


def passkey(rng, length, distance=None):
    """distance: tokens between the passkey and the question."""
    key = KEYS + rng.integers(DIGITS, size=LENGTH)
    most = length - 2 * LENGTH - 2      # noise between passkey and question, if the passkey comes first
    if distance is None:
        distance = rng.integers(most + 1)
    if not 0 <= distance <= most:
        raise ValueError(f"{length - 1} tokens have room for a distance of 0 to {most}, not {distance}")
    noise = rng.integers(NOISE, size=most)
    return np.concatenate([noise[distance:], [HERE], key, noise[:distance], [ASK], key])


def copy(rng, length, values=None):
    """values: how many are to be copied, from 4 to STRING at random while training."""
    values = rng.integers(4, STRING + 1) if values is None else values
    blanks = length - STRING - 1
    if not 1 <= values <= STRING:
        raise ValueError(f"1 to {STRING} values can be copied, not {values}")
    before, copied = np.full(blanks, FILL), KEYS + rng.integers(VALUES, size=values)
    before[np.sort(rng.choice(blanks, values, replace=False))] = copied
    return np.concatenate([before, [ASK], copied, np.full(STRING, FILL)])[:length]


def repeat(rng, length, strings=None):
    """strings: how many are to be kept."""
    most, training = min((length - 1) // (2 * STRING), (KEYS + VALUES) // STRING), strings is None
    strings = rng.integers(1, most + 1) if training else strings
    if not 1 <= strings <= most:
        raise ValueError(f"{length - 1} tokens have room for 1 to {most} strings, not {strings}")
    return asked_for(rng, rng.permutation(KEYS + VALUES)[:strings * STRING].reshape(-1, STRING), length, training)


# the generator of each, and its shortest context
TASKS = {"mqar": (mqar, 17), "mqar-any": (partial(mqar, in_turn=False), 17), "passkey": (passkey, 2 * LENGTH + 2),
         "copy": (copy, 2 * STRING), "repeat": (repeat, 2 * STRING)}
