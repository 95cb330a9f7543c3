"""Text to tokens and back: byte-level BPE, as a tiktoken.Encoding; and what may be printed."""

import base64
import heapq
import itertools
import re
from collections import Counter, defaultdict

import numpy as np
import regex
import tiktoken

EOT = "<|endoftext|>"  # ends every document
# How GPT-2 cuts text into words before the merges: contractions, letters, digits, signs, spaces.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# The trainer's words: the same, of at most 32 characters, or text without spaces would be one word.
SHORT_WORDS = GPT2_PATTERN.replace("++", "{1,32}+").replace(r"\s+", r"\s{1,32}")
MOST_WORDS = 2**16  # different words that the trainer keeps count of, which bounds time and memory
PIECE = 2**18  # characters encoded at once; a million spaces overflow the stack of tiktoken's regex
LAST_BORDER = regex.compile(r"(?r)(?<=\p{L}) ")  # the last space after a letter


def train_bpe(texts, vocab_size):
    """Byte-pair encoding: {bytes: rank} of at most vocab_size tokens, the 256 single bytes first.

    Again and again the most frequent pair of neighbours becomes a token (ties: the smaller pair of
    byte strings). Deterministic; a merge visits only the words that hold the pair.
    """
    counted = Counter()
    for text in texts:
        counted.update(regex.findall(SHORT_WORDS, text))
        if len(counted) > MOST_WORDS:  # the rare half goes
            counted = Counter(dict(counted.most_common(MOST_WORDS // 2)))
    frequency = list(counted.values())
    words = [[bytes([b]) for b in word.encode("utf-8", "replace")] for word in counted]
    ranks = {bytes([b]): b for b in range(256)}
    count = Counter()  # pair -> its occurrences in the text
    holders = defaultdict(set)  # pair -> words that hold it, by number
    for number, tokens in enumerate(words):
        for pair in itertools.pairwise(tokens):
            count[pair] += frequency[number]
            holders[pair].add(number)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < vocab_size:
        negative, best = heapq.heappop(heap)
        if negative == 0 or -negative != count[best]:
            continue  # out of date: the true count was pushed when it changed
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
    """The fields of a tokenizer, plain values that a checkpoint keeps; ranks: a .tiktoken file."""
    ranks = enc._mergeable_ranks.items()
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks]
    fields = {"name": enc.name, "pat_str": enc._pat_str, "ranks": "".join(lines)}
    return {**fields, "special_tokens": dict(enc._special_tokens)}


def load_tokenizer(fields):
    """The tiktoken.Encoding of dump_tokenizer's fields. Raises ValueError on anything else."""
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
    """The text that the blocks make together, in pieces of at most `longest` characters.

    A cut falls between a letter and a space, where a word ends for every tokenizer, so the tokens
    are those of the whole; where half a piece has no such place, it falls anywhere.
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
    """Any text as uint32 [tokens]; special tokens are plain text, lone surrogates become U+FFFD."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    parts = [enc.encode_to_numpy(piece, disallowed_special=()) for piece in cut([text])]
    return np.concatenate([np.empty(0, np.uint32), *parts])


def token_bytes(enc):
    """The bytes of each token number below enc.n_vocab; none for special and unused numbers."""
    strings = [b""] * enc.n_vocab
    for token, rank in enc._mergeable_ranks.items():
        strings[rank] = token
    return strings


def printable(text):
    """Text that cannot steer a terminal: CR goes, controls but newline and tab become U+FFFD."""
    controls = "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
    return re.sub(controls, "\N{REPLACEMENT CHARACTER}", text.replace("\r", ""))


def one_line(error):
    """What an exception says, in one line that can be printed."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0])[:400]
