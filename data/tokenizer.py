"""Text to tokens and back: a byte-level byte-pair encoding, trained here or one of tiktoken's, as a tiktoken.Encoding."""
import base64
import hashlib
import heapq
import itertools
import json
from collections import Counter, defaultdict

import numpy as np
import regex
import tiktoken

from data.messages import DataError, one_line

EOT = "<|endoftext|>"

# GPT-2's way to cut text into words before the merges: contractions, letters, digits, signs, spaces.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


MOST_WORDS = 2**19  # different words that the tokenizer's trainer keeps count of; each takes up to a kilobyte


def train_bpe(documents, vocab_size, pattern=GPT2_PATTERN):
    """Byte-level byte-pair encoding: ranks {bytes: rank} of at most `vocab_size` tokens, the 256 single bytes first.

    Again and again the most frequent pair of neighbouring tokens becomes a token (ties: the smaller pair of byte
    strings). Exact, below MOST_WORDS, and deterministic; a pair's count is kept up to date only in the words that hold it.
    """
    words, least = Counter(), 1
    for text in documents:
        words.update(regex.findall(pattern, text))
        while len(words) > MOST_WORDS:                  # bounds memory: the rarest are dropped
            words, least = Counter({word: n for word, n in words.items() if n > least}), least + 1
    freq = list(words.values())
    split = [[bytes([b]) for b in word.encode("utf-8", "replace")] for word in words]   # each word as its tokens so far
    ranks = {bytes([b]): b for b in range(256)}
    count, where = Counter(), defaultdict(set)          # pair -> occurrences, pair -> words that hold it
    for i, tokens in enumerate(split):
        for pair in itertools.pairwise(tokens):
            count[pair] += freq[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < vocab_size:
        n, pair = heapq.heappop(heap)
        if n == 0 or -n != count[pair]:                 # out of date: the true count was pushed when it changed
            continue
        merged = pair[0] + pair[1]
        ranks.setdefault(merged, len(ranks))            # two pairs can spell the same bytes: one token
        changed = set()
        for i in where.pop(pair):
            old, new, j = split[i], [], 0
            while j < len(old):
                hit = j + 1 < len(old) and (old[j], old[j + 1]) == pair
                new.append(merged if hit else old[j])
                j += 2 if hit else 1
            for before in itertools.pairwise(old):
                count[before] -= freq[i]
                changed.add(before)
            for after in itertools.pairwise(new):
                count[after] += freq[i]
                where[after].add(i)
                changed.add(after)
            split[i] = new
        for p in changed:
            heapq.heappush(heap, (-count[p], p))
    return ranks


def dump_tokenizer(enc):
    """tiktoken.Encoding -> {"name", "pat_str", "special_tokens", "ranks"}, plain values that JSON and torch.save keep.

    "ranks" is the text of a .tiktoken file.
    """
    ranks = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in enc._mergeable_ranks.items())
    return {"name": enc.name, "pat_str": enc._pat_str, "special_tokens": dict(enc._special_tokens), "ranks": ranks}


PROBE = "It's a\r\n\ttext, it'll   do:  12345 \x00\x1b ünï 東京 🙂 e\u0301 \U0010ffff" + "a" * 100 + " " * 100 + "x!" * 50 + "  "


def load_tokenizer(fields):
    """The tiktoken.Encoding of what `dump_tokenizer` returned. Raises DataError on anything else."""
    try:
        lines = (line.split() for line in fields["ranks"].splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        numbers, special = set(ranks.values()), set(fields["special_tokens"].values())     # o200k_harmony names one twice
        if len(numbers) < len(ranks) or numbers & special or not all(0 <= n < 2**24 for n in numbers | special):
            raise ValueError("two tokens have one number, or a number is out of range")
        if not all(bytes([b]) in ranks for b in range(256)) or EOT not in fields["special_tokens"]:
            raise ValueError(f"a single byte or {EOT} has no token")
        words = [m[0] for m in regex.finditer(fields["pat_str"], PROBE, timeout=1)]    # a bad one hangs tiktoken, or panics
        if "".join(words) != PROBE or "" in words:
            raise ValueError("its pattern does not cut every text into words")
        return tiktoken.Encoding(fields["name"], pat_str=fields["pat_str"], mergeable_ranks=ranks,
                                 special_tokens=fields["special_tokens"])
    except Exception as e:                              # tiktoken raises whatever its Rust part raises
        raise DataError(f"the tokenizer is damaged ({type(e).__name__}: {one_line(e)}); prepare the data again") from None


def tokenizer_hash(fields):
    """sha256 (32 bytes) of everything that decides how text becomes tokens."""
    decides = [fields["pat_str"], fields["special_tokens"], fields["ranks"]]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).digest()


PIECE = 2**18       # characters tokenized at once: a million of whitespace in a row overflow the stack of tiktoken's regex


def cut(blocks):
    """The text that `blocks` (strings) make together, in pieces of at most PIECE characters, none empty.

    A cut falls between a letter and a space, where a word ends for every tokenizer, so that the tokens are those of the
    whole; only in half a piece without such a place it falls anywhere.
    """
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > PIECE:
            end = at = start + PIECE
            while (at := rest.rfind(" ", start + PIECE // 2, at)) > 0 and not rest[at - 1].isalpha():
                pass
            at = at if at > 0 else end
            yield rest[start:at]
            start = at
        rest = rest[start:]
    if rest:
        yield rest


def encode(enc, text):
    """The tokens of any text, of any length, as uint32. What is no character (half a surrogate pair) becomes U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    try:
        return np.concatenate([np.empty(0, np.uint32), *(enc.encode_to_numpy(p, disallowed_special=()) for p in cut([text]))])
    except BaseException as e:                          # a panic of tiktoken's Rust part is no Exception
        if isinstance(e, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise DataError(f"the tokenizer {enc.name} fails on this text ({type(e).__name__}); its pattern may be damaged") from None


def token_strings(enc):
    """The text, in bytes, of each token number below enc.n_vocab: none for special tokens and unused numbers."""
    strings = [b""] * enc.n_vocab
    for token, rank in enc._mergeable_ranks.items():
        strings[rank] = token
    return strings


def make_tokenizer(name, texts, vocab_size):
    if name != "bpe":
        try:
            return tiktoken.get_encoding(name)
        except Exception as e:                          # unknown name, no network, damaged cache: tiktoken raises all sorts
            raise DataError(f"--tokenizer {name}: tiktoken cannot load it ({type(e).__name__}: {one_line(e)[:200]}); "
                            f"--tokenizer bpe needs no download") from None
    ranks = train_bpe(texts, vocab_size)
    return tiktoken.Encoding(f"bpe{len(ranks)}", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})
