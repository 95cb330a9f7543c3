"""lm-evaluation-harness on two tasks of our own, offline: python -m integrations.harness out/best.pt [--batch_size 8]

    fmem_bits    bits per byte of held-out speeches (paragraphs), each from an empty memory
    fmem_next    four lines: which is the one that follows in the text? Three are from elsewhere in it (log_prob: their mean)

The tasks are made of the validation text of the checkpoint's data. The checkpoint is exported as by integrations.hf, the harness
loads it through transformers, and every number is worked out once more by this repository's own model: both are printed.
Needs the package lm-eval (pip install "lm-eval[hf]"); any other task of the harness runs on an exported folder by

    lm_eval --model hf --model_args pretrained=DIR,trust_remote_code=True --tasks ...
"""
import argparse
import json
import math
import os
import random
import re
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from data import token_files
from data.messages import DataError, one_line
from data.token_files import write_json
from data.tokenizer import EOT, encode
from integrations.hf import export
from training.checkpoint import load_checkpoint, model_from, tokenizer_of

TASKS = {
    "fmem_bits": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                  "metric_list": [{"metric": "bits_per_byte"}]},
    "fmem_next": {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}",
                  "doc_to_choice": "{{choices}}", "target_delimiter": "",
                  "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
}


def documents(text, n, seed=0):
    """-> {task: documents} of a text, n of each at most. Raises DataError if it is too short."""
    g, paragraphs = random.Random(seed), [p for p in re.split(r"\n\s*\n|" + re.escape(EOT), text) if 40 <= len(p) <= 600]
    lines = [line for line in text.split("\n") if len(line) >= 20]
    long = [p.split("\n") for p in paragraphs if p.count("\n") >= 3 and all(len(line) >= 20 for line in p.split("\n")[-1:])]
    if len(paragraphs) < 2 or len(long) < 2:
        raise DataError("the validation text has too few paragraphs of several lines for these tasks")
    made = []
    for start in g.sample(long, min(n, len(long))):
        choices = [start[-1], *g.sample([line for line in lines if line != start[-1]], 3)]
        order = g.sample(range(4), 4)
        made.append({"text": "\n".join(start[:-1]), "choices": ["\n" + choices[i] for i in order], "answer": order.index(0)})
    return {"fmem_bits": [{"text": p} for p in g.sample(paragraphs, min(n, len(paragraphs)))], "fmem_next": made}


@torch.no_grad()
def nats(model, tokens, last):
    """Minus the log probability of the last so many of the tokens after those before them."""
    logits, _ = model(torch.tensor([tokens[:-1]]))
    losses = F.cross_entropy(logits[0].float(), torch.tensor(tokens[1:]), reduction="none")
    return losses[len(losses) - last:].double().sum().item()


def own_results(model, enc, docs):
    """What the harness should find, worked out with this repository's model alone, a document at a time."""
    bits = [(nats(model, [enc.eot_token, *encode(enc, doc["text"]).tolist()], len(encode(enc, doc["text"]))),
             len(doc["text"].encode())) for doc in docs["fmem_bits"]]
    right = right_norm = total = 0
    for doc in docs["fmem_next"]:
        before = doc["text"].rstrip()                   # the harness counts spaces at the end to what follows
        scores = []
        for choice in doc["choices"]:
            whole = encode(enc, doc["text"] + choice).tolist()
            scores.append(-nats(model, whole, len(whole) - len(encode(enc, before))))
        total += sum(scores)
        right += max(range(4), key=scores.__getitem__) == doc["answer"]
        # by length in characters, as the harness has it
        right_norm += max(range(4), key=lambda i: scores[i] / len(doc["choices"][i])) == doc["answer"]
    n = len(docs["fmem_next"])
    return {"fmem_bits": {"bits_per_byte": sum(x for x, _ in bits) / sum(b for _, b in bits) / math.log(2)},
            "fmem_next": {"acc": right / n, "acc_norm": right_norm / n, "log_prob": total / n / 4}}


def harness_results(folder, work, docs, batch_size):
    """The same by lm-evaluation-harness, from an exported folder, without any network."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(work / "cache"), TOKENIZERS_PARALLELISM="false")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise DataError(f'this needs the evaluation harness ({one_line(e)}); pip install "lm-eval[hf]"') from None
    for name, task in TASKS.items():
        file = work / f"{name}.jsonl"
        file.write_text("".join(json.dumps(doc) + "\n" for doc in docs[name]), encoding="utf-8")
        content = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
                   "test_split": "test", **task, "metadata": {"version": 1.0}}
        (work / f"{name}.yaml").write_text(json.dumps(content), encoding="utf-8")       # JSON is YAML
    arguments = {"pretrained": str(folder), "trust_remote_code": True, "add_bos_token": False, "max_length": 4096,
                 "dtype": "float32"}
    found = simple_evaluate(model="hf", model_args=arguments, tasks=list(TASKS), batch_size=batch_size, device="cpu",
                            task_manager=TaskManager(include_path=str(work), include_defaults=False), bootstrap_iters=0)
    results = {name: {metric.split(",")[0]: value for metric, value in found["results"][name].items()
                      if metric.endswith(",none") and "stderr" not in metric} for name in TASKS}
    scores = [score for sample in found["samples"]["fmem_next"] for score, _ in sample["filtered_resps"]]
    results["fmem_next"]["log_prob"] = sum(scores) / len(scores)        # the mean of all choices
    return results


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m integrations.harness", allow_abbrev=False,
                                description="Evaluate a checkpoint with lm-evaluation-harness.")
    p.error = lambda message: p.exit(2, f"integrations.harness: error: {one_line(message)}; --help lists the options\n")
    p.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    p.add_argument("--data", metavar="DIR", help="prepared folder (default: that of the training)")
    p.add_argument("--documents", type=int, default=200, help="of each task, at most (default: 200)")
    p.add_argument("--batch_size", type=int, default=1, help="documents at once; the results are the same (default: 1)")
    p.add_argument("--json", metavar="FILE", type=Path, help="write the results")
    a = p.parse_args(argv)
    try:
        if not (1 <= a.documents <= 10**6 and 1 <= a.batch_size <= 10**4):
            raise DataError("--documents must be from 1 to a million, --batch_size from 1 to 10,000")
        torch.set_flush_denormal(True)
        checkpoint = load_checkpoint(a.checkpoint)
        enc, model = tokenizer_of(checkpoint), model_from(checkpoint, "cpu", scan="auto")
        tokens = token_files.load(a.data or checkpoint["settings"]["data"])[1]
        docs = documents(enc.decode(tokens[:2**22].tolist()), a.documents)
        with tempfile.TemporaryDirectory() as work:
            export(checkpoint, Path(work) / "model")
            theirs, own = harness_results(Path(work) / "model", Path(work), docs, a.batch_size), own_results(model, enc, docs)
        print(f"{'task':12}{'documents':>10}  {'metric':14}{'harness':>10}{'our own':>10}")
        for name, metrics in own.items():
            for metric, value in metrics.items():
                print(f"{name:12}{len(docs[name]):10}  {metric:14}{theirs[name][metric]:10.5f}{value:10.5f}")
        if a.json:
            write_json(a.json, {"harness": theirs, "own": own, "documents": {name: len(some) for name, some in docs.items()},
                                "batch_size": a.batch_size, "mixer": model.config.mixer})
    except (ValueError, OSError, RuntimeError) as e:
        sys.exit(f"integrations.harness: error: {one_line(e)}")


if __name__ == "__main__":
    main()
