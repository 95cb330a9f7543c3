"""What a run trains on, behind one interface: text from a prepared folder, or a recall task.

A task has vocab_size, tokenizer (its fields, or None), corpus, about (one line), bits_per_nat (0 if it has none) and batches
(batches(step, part) -> int64 [windows, context + 1]); targets(windows) is what must be predicted; validate and finish.
"""
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import recall
from data.messages import printable
from data.prepare import prepare
from data.token_files import DEFAULT, load
from data.tokenizer import load_tokenizer, token_strings
from training.batches import Batches, Streams


def task_of(s, processes):
    """The task of settings s. Raises ValueError or OSError where its data cannot be used."""
    return RecallTask(s) if s.data in recall.TASKS else Text(s, processes)


class Text:
    """The next token of a text. The default corpus is prepared by the first process where it is missing."""

    def __init__(self, s, processes):
        if processes.first and Path(s.data) == DEFAULT and not (DEFAULT / "meta.json").is_file():
            prepare()
        processes.wait()
        tokens, self.val, self.tokenizer, meta = load(s.data)
        if len(self.val) < 2:
            raise ValueError(f"the validation split of {s.data} has only {len(self.val)} token")
        self.enc, self.processes, self.context = load_tokenizer(self.tokenizer), processes, s.context
        self.sizes = np.array([len(piece) for piece in token_strings(self.enc)])
        self.vocab_size, self.corpus = self.enc.n_vocab, meta["corpus"]
        self.about = f"{self.corpus}: {meta['train']['bytes']:,} bytes, {len(tokens):,} tokens to train on"
        self.bits_per_nat = meta["train"]["tokens"] / meta["train"]["bytes"] / math.log(2)
        self.batches = (Streams if s.carry_state else Batches)(tokens, s.context, s.batch_size, s.seed)

    def targets(self, windows):
        return windows[:, 1:]

    def validate(self, model, device, amp, limit, batch):
        """-> the loss, words about it, columns of the log. limit: only the first so many tokens; None: all."""
        p = self.processes
        loss, bpb = evaluate(model, self.val, self.context, self.sizes, device, amp, limit, batch, p.rank, p.world)
        count = min(limit or len(self.val), len(self.val) - 1)
        words = f"validation {loss:.4f} nats per token, {bpb:.4f} bits per byte ({count:,} tokens)"
        return loss, words, {"val_bpb": bpb, "val_tokens": count}

    def finish(self, model, device, n, best):
        """Print n tokens of text by the model, if it is given. Returns what to do next with the checkpoint best (or out/best.pt).
        """
        if model is not None:
            model.eval()
            prompt, pieces = torch.tensor([[self.enc.eot_token]], device=device), token_strings(self.enc)
            made = model.generate(prompt, n, 0.8, top_p=0.95, generator=torch.Generator(device).manual_seed(0))
            text = b"".join(pieces[token.item()] for token in made).decode("utf-8", "replace")
            print("sample    " + printable(text).replace("\n", "\n          "), flush=True)
        return f"python sample.py{f' --checkpoint {best}' if best else ''} writes more"


class RecallTask:
    """The tasks of data/recall.py."""
    tokenizer, bits_per_nat = None, 0.0

    def __init__(self, s):
        self.vocab_size, self.corpus, self.about = recall.VOCAB, s.data, f"{s.data}, generated for every step"
        self.batches = recall.Recall(s.data, s.context, s.batch_size, s.seed)
        self.targets = self.batches.targets

    def validate(self, model, device, amp, limit, batch):
        loss, right = self.batches.evaluate(model, device, amp, batch=batch)     # all of it in every process: it is little
        return loss, f"{loss:.4f} nats per answer, {right:.2%} right", {"val_accuracy": right}

    def finish(self, model, device, n, best):
        return f"python -m experiments.evaluate {best or 'out/best.pt'} --recall says more"


@torch.no_grad()
def evaluate(model, tokens, context, sizes, device, amp, limit=None, batch=8, rank=0, world=1):
    """Mean loss over consecutive windows of `context` tokens, each from an empty memory.

    Returns nats per token and bits per byte of text. limit: only the first so many tokens. sizes: bytes of each token.
    """
    model.eval()
    tokens = tokens[:limit + 1] if limit else tokens
    starts = list(range(0, len(tokens) - 1, context))
    groups = [starts[i:i + batch] for i in range(0, len(starts), batch)]
    if len(groups[-1]) > 1:                                         # the last window may be shorter: by itself
        groups[-1:] = [groups[-1][:-1], groups[-1][-1:]]
    total = torch.zeros(3, dtype=torch.float64)                     # nats, tokens, bytes
    mine = [(group, 1.0) for group in groups[rank::world]]
    if len(mine) * world < len(groups):                             # a split model needs all its processes every time
        mine.append((groups[-1], 0.0))
    for group, counts in mine:
        windows = np.stack([tokens[a:a + context + 1] for a in group]).astype(np.int64)
        inputs = torch.from_numpy(windows[:, :-1]).to(device)
        with amp():
            logits, _ = model(inputs)
        targets = torch.from_numpy(windows[:, 1:])
        nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten().to(device), reduction="sum")
        total += counts * torch.tensor([nats.item(), targets.numel(), sizes[targets.numpy()].sum()], dtype=torch.float64)
    if world > 1:
        total = total.to(device if device.type == "cuda" else "cpu")
        torch.distributed.all_reduce(total)
    nats, count, size = total.tolist()
    model.train()
    return nats / count, nats / math.log(2) / max(size, 1)
