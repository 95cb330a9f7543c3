"""Two tasks that test recall alone, generated for every batch: `python train.py --data mqar` or `--data passkey`.

    mqar     k1 v1 k2 v2 ... kn vn ? k7 v7 k2 v2 ...      multi-query associative recall (Zoology, arXiv 2312.04927): each key
                                                          has a random value, and every key is asked for: in
                                                          training over and over, to the window's end; in a test once
    passkey  noise ... ! d1 d2 d3 d4 noise ... ? d1 d2 d3 d4      four random digits to be kept while noise goes by

Only the answers, which follow "?", count in the loss and in the accuracy; the rest cannot be predicted.
"""
import numpy as np
import torch
import torch.nn.functional as F

TASKS = "mqar", "passkey"
KEYS = VALUES = NOISE = 64              # tokens 0 ... 63: keys, or noise; from 64 on: values, of which ten are the digits
DIGITS, LENGTH = 10, 4
ASK, HERE, FILL = 128, 129, 130         # "?", "!", and what fills a window up
VOCAB = 131


def word(token):
    """A token as it is shown: k7 a key, or noise; v7 a value, or digit; what asks, announces and fills as it is."""
    return f"k{token}" if token < KEYS else f"v{token - KEYS}" if token < KEYS + VALUES else {ASK: "?", HERE: "!"}.get(token, ".")


class Recall:
    """Windows of context + 1 tokens of one of the TASKS; like training/batches.py's a function of (seed, step) alone."""

    def __init__(self, task, context, batch_size=1, seed=0):
        shortest = {"mqar": 17, "passkey": 2 * LENGTH + 2}[task]
        if context < shortest:
            raise ValueError(f"--data {task} needs a --context of at least {shortest}, not {context}")
        self.task, self.context, self.batch_size, self.seed = task, context, batch_size, seed
        self.per_epoch = 10**9          # never the same again

    def __call__(self, step, part=slice(None)):
        """Windows `part` of the step's batch: int64 [windows, context + 1]."""
        return self.make(np.random.default_rng([self.seed, step]), self.batch_size)[part]

    def make(self, rng, n, hard=None):
        """n windows. hard: the number of pairs, or the tokens from the passkey to the question; None: at random."""
        windows = [(mqar if self.task == "mqar" else passkey)(rng, self.context + 1, hard) for _ in range(n)]
        return torch.from_numpy(np.stack(windows).astype(np.int64))

    @staticmethod
    def targets(windows):
        """What the model must predict: the answers, int64 [windows, context]; elsewhere -100, which cross_entropy leaves out."""
        asked = (windows == ASK).cumsum(1)[:, 1:] > 0
        answer = asked & (windows[:, 1:] >= KEYS) & (windows[:, 1:] < KEYS + VALUES)
        return windows[:, 1:].masked_fill(~answer, -100)

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


def mqar(rng, length, pairs=None):
    most = min((length - 1) // 4, KEYS)
    training = pairs is None
    if training:                        # 4, 8, 16, ... pairs: each as often as the others
        pairs = 4 * 2 ** rng.integers(int(np.log2(most / 4)) + 1)
    if not 1 <= pairs <= most:
        raise ValueError(f"{length - 1} tokens have room for 1 to {most} pairs, not {pairs}")
    keys = rng.permutation(KEYS)[:pairs]
    both = np.stack([keys, KEYS + rng.integers(VALUES, size=pairs)], 1)
    times = -(-length // (2 * pairs)) if training else 1
    asked = [both[rng.permutation(pairs)].ravel() for _ in range(times)]
    return np.concatenate([both.ravel(), [ASK], *asked, np.full(length, FILL)])[:length]


def passkey(rng, length, distance=None):
    key = KEYS + rng.integers(DIGITS, size=LENGTH)
    most = length - 2 * LENGTH - 2      # noise between passkey and question, if the passkey comes first
    if distance is None:
        distance = rng.integers(most + 1)
    if not 0 <= distance <= most:
        raise ValueError(f"{length - 1} tokens have room for a distance of 0 to {most}, not {distance}")
    noise = rng.integers(NOISE, size=most)
    return np.concatenate([noise[distance:], [HERE], key, noise[:distance], [ASK], key])
