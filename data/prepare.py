"""Turn text into what train.py reads: files of tokens and the tokenizer that made them.

    python data/prepare.py                                   # 37 plays of Shakespeare, into data/default
    python data/prepare.py --corpus enwik8                   # one by name, into data/enwik8; --corpus list shows them
    python data/prepare.py --input a.txt books/ --out data/mine  # your own: files and folders of any size

It reads .txt and .txt.gz (UTF-8, one document), .jsonl and .jsonl.gz (a document per line, in the field --field) and .parquet
(a document per row; needs pyarrow), in pieces, so that a corpus may be larger than memory. token_files.py says what a prepared
folder holds. What --corpus downloads is kept in data/downloads (download.py says how).

Every document ends with <|endoftext|>. The splits are made of whole documents (a single text gives its last tenth to
validation). The folder appears all at once when it is complete; a prepared folder is replaced only with --overwrite. Until
then the work is kept in a hidden folder beside it, and after a kill the same command resumes from there. The bytes of the
result depend on the input and the options alone, not on --workers or on where a run was stopped.
"""
import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

if not __package__:                                     # run as a script, which puts data/ on the path, not its parent
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.corpora import CORPORA, default_corpus
from data.download import locked
from data.messages import DataError, one_line, printable
from data.sources import READERS, SUFFIXES, Source, find_sources, read_text, split
from data.token_files import DEFAULT, file_hash, load, meta_hash, shard_name, write_json, write_tokens
from data.tokenizer import PIECE, cut, dump_tokenizer, encode, load_tokenizer, make_tokenizer, tokenizer_hash

JOB = 2**20         # characters that a worker takes at once


def jobs(sources, pick, field, position=(0, 0, 0)):
    """Pieces of documents in the order of the sources, about JOB characters at a time: (position, [(text, last), ...]).

    last: the document ends with this piece. position: what gives the rest when it is passed again, [source, pieces
    of it that are done, number of its first document].
    """
    first, skip, number = position
    job, size = [], 0
    for i, source in enumerate(sources[first:], first):
        begun, count = number, 0
        for blocks in READERS.get(source.kind, read_text)(source, field):
            texts = cut(blocks) if pick(source, number) else iter(())
            number += 1
            text = next(texts, "")
            while text:
                after = next(texts, "")
                count += 1
                if count > skip:
                    job.append((text, not after))
                    size += len(text)
                    if size >= JOB:
                        yield (i, count, begun), job
                        job, size = [], 0
                text = after
        skip, source.done = 0, 1.0
    if job:
        yield (len(sources), 0, number), job


def in_order(pool, work, items, ahead):
    """map(work, items) in the threads of `pool`, at most `ahead` items at a time: what is waiting stays small."""
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


BPE_TEXT = 2**25    # characters of the training text from which the tokenizer is made, evenly out of a larger corpus


def some_text(sources, pick, field, total):
    """Pieces of the training text that make about BPE_TEXT characters."""
    seen = taken = 0
    for _, job in jobs(sources, pick, field):
        for text, _ in job:
            seen += len(text)
            if taken < BPE_TEXT and taken <= seen * min(1, BPE_TEXT / total):
                taken += len(text)
                yield text


class Progress:
    """A line every ten seconds: the share done, the speed, the time left."""

    def __init__(self, name, sources):
        self.name, self.sources, self.sizes = name, sources, [s.size for s in sources]
        self.start = self.last = time.perf_counter()
        self.bytes, self.begun = 0, self.share()

    def share(self):
        return sum(n * s.done for n, s in zip(self.sizes, self.sources, strict=True)) / max(sum(self.sizes), 1)

    def __call__(self, size):
        now, self.bytes = time.perf_counter(), self.bytes + size
        if now - self.last >= 10:
            share = self.share()
            speed, left = self.bytes / (now - self.start), (1 - share) / max(share - self.begun, 1e-9) * (now - self.start)
            print(f"data: {self.name} {share:.1%}, {self.bytes / 1e6:,.0f} MB, {speed / 1e6:.1f} MB/s, {left:,.0f} s left",
                  flush=True)
            self.last = now


def begun_work(work, plan):
    """What an earlier, interrupted call with the same plan has left in the folder `work`: its progress, or None."""
    try:
        progress = json.loads((work / "progress.json").read_text(encoding="utf-8"))
        whole = all(file_hash(work / name) == sha for name, sha in progress["files"].items())
        return progress if progress["plan"] == plan and whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def prepare(out=DEFAULT, documents=None, val_names=None, corpus=None, tokenizer="bpe", vocab_size=1024,
            overwrite=False, field="text", workers=None, shard_tokens=2**26, test_names=()):
    """Write a prepared folder. Raises DataError, OSError.

    documents: {name: text}, a list of Source, None for the default corpus, or a function that gives it: -> documents, val_names,
    test_names, corpus. val_names: those to validate on (None: see `split`). test_names: those of a third split, to test on.
    workers: threads that tokenize (None: one per core). shard_tokens: more in a split go to several files.
    """
    out, workers = Path(out), workers or os.cpu_count() or 1
    if not 256 <= vocab_size <= 2**20:
        raise DataError(f"--vocab_size {vocab_size}: the 256 bytes are tokens already, so 256 to {2**20}")
    if not (1 <= workers <= 1024 and 1 <= shard_tokens <= 2**40):
        raise DataError("--workers must be from 1 to 1024, --shard_tokens from 1 to 2**40")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; --out names a folder")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise DataError(f"{out} exists already; --overwrite replaces it, --out DIR writes elsewhere")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):              # said now rather than after the work
        raise DataError(f"{out.parent} cannot be written to; python data/prepare.py --out DIR writes elsewhere, "
                        f"python train.py --data DIR reads it there")
    if documents is None:
        documents, val_names, corpus = default_corpus()
    elif callable(documents):
        documents, val_names, test_names, corpus = documents()
    if isinstance(documents, dict):
        documents = [Source(name, text=text) for name, text in documents.items() if text]
    splits, total = split(documents, val_names, test_names), sum(source.size for source in documents)
    print(printable(f"data: {corpus}, {len(documents):,} files, {total:,} bytes"), flush=True)
    work, old = out.parent / f".{out.name}.part", out.parent / f".{out.name}.old"
    plan = [[source.identity() for source in sources] for sources, _ in splits.values()]
    plan = hashlib.sha256(json.dumps([plan, field, tokenizer, vocab_size, shard_tokens, PIECE]).encode()).hexdigest()
    with locked(out.parent / f".{out.name}.lock"):
        progress = begun_work(work, plan)
        if progress:
            done = sum(len(state["counts"]) for state in progress["splits"].values())
            print(f"data: resumes where an earlier call stopped, after {done} files of tokens", flush=True)
        else:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            progress = {"plan": plan, "tokenizer": None, "files": {}, "splits": {
                name: {"counts": [], "documents": 0, "bytes": 0, "position": [0, 0, 0]} for name in splits}}
        try:
            meta = write_folder(work, splits, corpus, tokenizer, vocab_size, field, workers, shard_tokens, total, progress)
        except BaseException as e:
            if not any(state["counts"] for state in progress["splits"].values()):
                shutil.rmtree(work, ignore_errors=True)
            elif isinstance(e, OSError | DataError):
                raise type(e)(f"{e} (what is done is kept in {work}; the same command resumes from there)") from None
            raise
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(out, old)
        os.replace(work, out)
        (out / "progress.json").unlink()
        shutil.rmtree(old, ignore_errors=True)
    return meta


def write_folder(work, splits, corpus, tokenizer, vocab_size, field, workers, shard_tokens, total, progress):
    """Complete the folder `work` from `progress` on (see `prepare`): tokenizer, files of tokens, meta.json."""
    def keep(file):
        progress["files"][file.name] = file_hash(file)
        write_json(work / "progress.json", progress)

    ranks = work / "tokenizer.tiktoken"
    if progress["tokenizer"]:
        fields = {**progress["tokenizer"], "ranks": ranks.read_text(encoding="ascii")}
        enc = load_tokenizer(fields)
    else:
        if tokenizer == "bpe" and total > BPE_TEXT // 2:
            print(f"data: the tokenizer is trained on at most {BPE_TEXT / 1e6:.0f} million characters, taken evenly", flush=True)
        enc = make_tokenizer(tokenizer, some_text(*splits["train"], field, total), vocab_size)
        fields = dump_tokenizer(enc)
        ranks.write_text(fields["ranks"], encoding="ascii", newline="\n")
        progress["tokenizer"] = {k: v for k, v in fields.items() if k != "ranks"}
        keep(ranks)
    end = np.array([enc.eot_token], np.uint32)

    def tokenize(item):
        """-> the position after the item, its tokens, documents that end in it, its size in bytes."""
        position, job = item
        tokens = np.concatenate([part for text, last in job for part in (encode(enc, text), end[:last])])
        return position, tokens, sum(last for _, last in job), sum(len(text.encode("utf-8", "replace")) for text, _ in job)

    def shard(done, state, report):
        """The tokens that come next, until they are shard_tokens or more."""
        count = 0
        while count < shard_tokens and (result := next(done, None)):
            state["position"], tokens, documents, size = result
            state["documents"] += documents
            state["bytes"] += size
            count += len(tokens)
            report(size)
            yield tokens

    meta = {"corpus": corpus, "tokenizer": progress["tokenizer"], "files": progress["files"]}
    with ThreadPoolExecutor(workers) as pool:
        for name, (sources, pick) in splits.items():
            state = progress["splits"][name]
            for i, source in enumerate(sources):
                source.done = float(i < state["position"][0])
            report = Progress(name, sources)
            done = in_order(pool, tokenize, jobs(sources, pick, field, state["position"]), 2 * workers)
            while count := write_tokens(path := work / shard_name(name, len(state["counts"])), shard(done, state, report),
                                        enc.n_vocab, tokenizer_hash(fields)):
                state["counts"].append(count)
                keep(path)
            path.unlink()                               # the last one is empty
            count, size = sum(state["counts"]), state["bytes"]
            if not count:
                purpose = {"train": "training", "val": "validation", "test": "the test"}[name]
                raise DataError(f"no document is left for {purpose}; --val FILE says which are for validation")
            print(f"data: {name} {state['documents']:,} documents, {size:,} bytes, {count:,} tokens of {enc.n_vocab:,} kinds, "
                  f"{size / count:.2f} bytes per token", flush=True)
            meta[name] = {"sources": [source.name for source in sources[:1000]], "documents": state["documents"], "bytes": size,
                          "tokens": count, "shards": len(state["counts"])}
    meta["sha256"] = meta_hash(meta)
    write_json(work / "meta.json", meta)
    return meta


def list_corpora():
    """What --corpus knows: a line for each, without any download."""
    for name, corpus in CORPORA.items():
        print(f"{name:16}{corpus.size:60}{corpus.licence:18}{corpus.place}")


def main(argv=None):
    p = argparse.ArgumentParser(description="Prepare a corpus for train.py.", allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"data/prepare.py: error: {one_line(message)}; --help lists the options\n")
    p.add_argument("--input", nargs="+", metavar="PATH", help=f"files, and folders of files that end with {', '.join(SUFFIXES)} "
                   "(default: Shakespeare)")
    p.add_argument("--corpus", metavar="NAME", help="a corpus by name, fetched where it is not here yet; list: shows them")
    p.add_argument("--gb", type=float, default=2.0, help="of fineweb-edu, gigabytes of text (default: 2)")
    p.add_argument("--val", nargs="+", metavar="PATH", help="files and folders to validate on (default: a tenth of the input)")
    p.add_argument("--out", metavar="DIR", help="folder to write (default: data/default, or data/NAME of the first input)")
    p.add_argument("--field", default="text", help="field of .jsonl, or column of .parquet, that has the text (default: text)")
    p.add_argument("--tokenizer", default="bpe", help="bpe: trained on the training split; or a name tiktoken knows, as gpt2")
    p.add_argument("--vocab_size", type=int, default=1024, help="tokens of the bpe, without <|endoftext|> (default: 1024)")
    p.add_argument("--workers", type=int, help="threads that tokenize (default: one per core); the result is the same")
    p.add_argument("--shard_tokens", type=int, default=2**26,
                   help="tokens per file, about; a run keeps every file open (default: 2**26)")
    p.add_argument("--overwrite", action="store_true", help="replace a folder that exists")
    p.add_argument("--check", metavar="DIR", help="only compare a prepared folder with its checksums")
    a = p.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # names of files can be any bytes
    try:
        if a.check:
            load(a.check, check=True)
            print(f"data: {a.check} is whole")
            return
        if a.corpus == "list":
            list_corpora()
            return
        documents = val = corpus = None
        out = DEFAULT
        if a.workers is not None and a.workers < 1:
            raise DataError(f"--workers must be from 1 to 1024, not {a.workers}")
        if a.input:
            documents, corpus = find_sources(a.input), ", ".join(Path(f).name for f in a.input[:3])
            corpus += f" and {len(a.input) - 3} more" if len(a.input) > 3 else ""
            out = DEFAULT.parent / Path(a.input[0]).stem
            if a.val:
                val = find_sources(a.val)
                names = {source.path.resolve() for source in val}
                documents = [source for source in documents if source.path.resolve() not in names] + val
        elif a.val:
            raise DataError("--val needs --input")
        if a.corpus:
            for wrong, what in ((a.input, "--corpus and --input exclude each other"),
                                (a.corpus not in CORPORA, f"--corpus must be one of {', '.join(CORPORA)}, or list"),
                                (not 0 < a.gb < 1e6, f"--gb must be above 0 and below a million, not {a.gb:g}")):
                if wrong:
                    raise DataError(what)
            documents = partial(CORPORA[a.corpus].load, DEFAULT.parent / "downloads" / a.corpus, a.gb)
            out = DEFAULT if a.corpus == "shakespeare" else DEFAULT.parent / a.corpus
        out = Path(a.out or out)
        prepare(out, documents, val and {source.name for source in val}, corpus, a.tokenizer, a.vocab_size, a.overwrite, a.field,
                a.workers, a.shard_tokens)
    except (DataError, OSError) as e:
        sys.exit(f"data/prepare.py: error: {one_line(e)}")
    except KeyboardInterrupt:
        sys.exit("data/prepare.py: interrupted; the same command resumes from what is done")
    print(printable(f"data: ready; python train.py{'' if out == DEFAULT else f' --data {out}'}"))


if __name__ == "__main__":
    main()
