"""From what the layers did with a text to one HTML file that shows it and needs nothing else.

The data in the page, a JSON object: words {token: text}, tokens, made (how many of them were given), loss, top and layers. An
array of numbers is base64 of little-endian float32. A memory layer has theta, phi and rms of the k rows (uint16) that a token
touches at most, all others keep theirs, and q where it is not phi / sqrt(rms^2 + eps); attention and Mamba-2 have the lower
triangle of their mean map, row by row.
"""
import base64
import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from data.messages import DataError
from data.tokenizer import token_strings
from inside.record import MemoryWeights, Weights

HERE = Path(__file__).resolve().parent
MARK = "<!-- fmem look -->"         # in the second line of every page
TOP = 8                             # likeliest tokens that are shown


def visible(piece: bytes) -> str:
    """A token as text: bytes that are no whole character, and characters that cannot be seen, as their escapes."""
    text = piece.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def words_of(enc) -> list[str]:
    """The text of each token of a tiktoken.Encoding, as `visible` shows it; the end of a text as <|endoftext|>."""
    words = [visible(piece) for piece in token_strings(enc)]
    words[enc.eot_token] = "<|endoftext|>"
    return words


def packed(array: Tensor, kind=torch.float32) -> str:
    values = array.to(kind).contiguous().numpy()
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def rounded(values: Tensor) -> list[float]:
    return [float(f"{v:.5g}") for v in values.tolist()]


def layer_data(seen: Weights, eps: float) -> dict:
    """What the page needs of a layer. Raises DataError for more rows than the page can number."""
    if not isinstance(seen, MemoryWeights):
        below = torch.ones(seen.A.shape[1:], dtype=torch.bool).tril()
        return {"kind": seen.kind, "weight": packed(seen.A.mean(0)[below]), "weight_before": packed(seen.start)}
    used = (seen.theta > 0) | (seen.phi > 0)
    k, m = max(int(used.sum(1).max()), 1), seen.theta.shape[1]
    if m > 2**16:
        raise DataError(f"the page shows up to {2**16} rows per layer, not {m}")
    rows = used.int().topk(k, -1).indices.sort(-1).values           # with fewer than k rows used, some others as they are
    columns = {"theta": seen.theta, "phi": seen.phi, "rms": seen.rms[1:]}
    if not torch.allclose(seen.q, seen.phi / (seen.rms[1:].square() + eps).sqrt()):
        columns["q"] = seen.q                                       # the norm comes after the merge, an ablation
    return {"kind": "memory", "m": m, "k": k, "eps": eps, "shared": seen.shared, "rms_before": packed(seen.rms[0]),
            "rows": packed(rows, torch.uint16), **{name: packed(values.gather(1, rows)) for name, values in columns.items()},
            "eta": rounded(seen.eta), "mu": rounded(seen.mu), "entropy": rounded(seen.entropy)}


def page_data(layers: list[Weights], logits: Tensor, tokens: Tensor, words: list[str], eps: float, **more) -> dict:
    """layers and logits [T, vocab_size] of tokens [T], from inside.record; eps of the row norm; `more` stays as it is."""
    log_p = torch.log_softmax(logits.double(), -1)
    loss = -log_p[:-1].gather(1, tokens[1:, None])[:, 0]
    best = log_p.exp().topk(min(TOP, log_p.shape[1]), -1)
    top = [list(zip(ids, rounded(p), strict=True)) for ids, p in zip(best.indices.tolist(), best.values, strict=True)]
    shown = {*tokens.tolist(), *best.indices.flatten().tolist()}
    return {"words": {i: words[i] for i in sorted(shown)}, "tokens": tokens.tolist(), "made": len(tokens), "state": False,
            "loss": [None, *rounded(loss)], "top": top, "layers": [layer_data(seen, eps) for seen in layers], **more}


def page(data: dict) -> str:
    """The page. Nothing in the data can end its element or run: "<", ">", "&" are escaped, the script is named by its hash."""
    parts = {name: (HERE / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    digest = base64.b64encode(hashlib.sha256(parts["js"].encode()).digest()).decode()
    filled = {"hash": digest, "css": parts["css"], "data": text, "js": parts["js"]}
    whole, *rest = parts["html"].split("{{")
    return whole + "".join(filled[name] + after for name, _, after in (part.partition("}}") for part in rest))
