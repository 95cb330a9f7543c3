"""Text to tokens and back: byte-level BPE, as a tiktoken.Encoding. Text that is safe to print."""

import base64
import heapq
import itertools
import re
from collections import Counter, defaultdict

import numpy as np
import regex
import tiktoken

EOT = "<|endoftext|>"  # ends every document
# GPT-2 splits text into words before the merges: contractions, letters, digits, symbols, spaces.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# For training, the same in runs of at most 32: text without spaces would otherwise be one word.
SHORT_WORDS = GPT2_PATTERN.replace("++", "{1,32}+").replace(r"\s+", r"\s{1,32}")
MAX_WORDS = 2**16  # distinct words that the trainer counts, which bounds its time and memory
PIECE = 2**18  # characters encoded at once; a million spaces overflow tiktoken's regex stack
LAST_BORDER = regex.compile(r"(?r)(?<=\p{L}) ")  # the last space after a letter


def train_bpe(texts, vocab_size):
    """Byte-pair encoding: {bytes: rank} of at most vocab_size tokens, the 256 single bytes first.

    Repeatedly merges the most frequent adjacent pair into a token (ties: the smaller pair of byte
    strings). Deterministic. A merge visits only the words that contain the pair.
    """
    counted = Counter()
    for text in texts:
        counted.update(regex.findall(SHORT_WORDS, text))
        if len(counted) > MAX_WORDS:  # drop the rare half
            counted = Counter(dict(counted.most_common(MAX_WORDS // 2)))
    frequency = list(counted.values())
    words = [[bytes([b]) for b in word.encode("utf-8", "replace")] for word in counted]
    ranks = {bytes([b]): b for b in range(256)}
    count = Counter()  # pair -> its occurrences in the text
    holders = defaultdict(set)  # pair -> the numbers of the words that contain it
    for number, tokens in enumerate(words):
        for pair in itertools.pairwise(tokens):
            count[pair] += frequency[number]
            holders[pair].add(number)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < vocab_size:
        negative, best = heapq.heappop(heap)
        if negative == 0 or -negative != count[best]:
            continue  # outdated: the new count was pushed when it changed
        left, right = best
        merged = left + right
        ranks.setdefault(merged, len(ranks))  # two pairs can spell the same bytes
        change = Counter()  # pair -> what the merge adds to its count
        for number in holders.pop(best):
            old = words[number]
            new = []
            i = 0
            while i < len(old):
                if old[i] != left or old[i + 1 : i + 2] != [right]:
                    new.append(old[i])
                    i += 1
                    continue
                if new:
                    change[new[-1], left] -= frequency[number]
                    change[new[-1], merged] += frequency[number]
                    holders[new[-1], merged].add(number)
                new.append(merged)
                i += 2
                if i < len(old):
                    change[right, old[i]] -= frequency[number]
                    change[merged, old[i]] += frequency[number]
                    holders[merged, old[i]].add(number)
            words[number] = new
        change[best] = -count[best]
        for pair, difference in change.items():
            count[pair] += difference
            heapq.heappush(heap, (-count[pair], pair))
    return ranks


def dump_tokenizer(enc):
    """A tokenizer as plain values for a checkpoint. ranks has the format of a .tiktoken file."""
    ranks = enc._mergeable_ranks.items()
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks]
    fields = {"name": enc.name, "pat_str": enc._pat_str, "ranks": "".join(lines)}
    return {**fields, "special_tokens": dict(enc._special_tokens)}


def load_tokenizer(fields):
    """The tiktoken.Encoding from dump_tokenizer's fields. Raises ValueError for anything else."""
    try:
        ranks = {}
        for line in fields["ranks"].splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        special = fields["special_tokens"]
        if EOT not in special or not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError(f"a single byte or {EOT} has no token")
        return tiktoken.Encoding(
            fields["name"], pat_str=fields["pat_str"], mergeable_ranks=ranks, special_tokens=special
        )
    except Exception as e:  # tiktoken raises whatever its Rust part raises
        raise ValueError(f"the tokenizer is damaged ({type(e).__name__}: {one_line(e)})") from None


def cut(blocks, longest=PIECE):
    """Cut the concatenated blocks into pieces of at most `longest` characters.

    A cut falls between a letter and a space, where every tokenizer ends a word, so the tokens are
    those of the whole text. If a piece has no such position in its second half, it has full length.
    """
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > longest:
            border = LAST_BORDER.search(rest, start + longest // 2, start + longest)
            end = border.start() if border else start + longest
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def encode(enc, text):
    """Any text as uint32 [tokens]. Special tokens are plain text; lone surrogates become U+FFFD."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    parts = [enc.encode_to_numpy(piece, disallowed_special=()) for piece in cut([text])]
    return np.concatenate([np.empty(0, np.uint32), *parts])


def token_bytes(enc):
    """The bytes of each token id below enc.n_vocab; empty for special and unused ids."""
    strings = [b""] * enc.n_vocab
    for token, rank in enc._mergeable_ranks.items():
        strings[rank] = token
    return strings


def printable(text):
    """Text that is safe on a terminal: no CR; controls except newline and tab become U+FFFD."""
    controls = "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
    return re.sub(controls, "\N{REPLACEMENT CHARACTER}", text.replace("\r", ""))


def one_line(error):
    """The first line of an exception's message, safe to print."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0])[:400]
