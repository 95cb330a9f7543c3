"""Speed of whole models beside a Transformer and Mamba-2: python -m experiments.bench_models

Training by context, generation by context, peak memory, the size of the state. Everything compared is alternated within one
process and the median taken; [low-high] is the middle half of the repetitions.
"""
import argparse
import functools
import os

import torch
import torch.nn.functional as F

from experiments.timing import DEVICE, GPU, clock, in_a_process, measure_peak, run_tables, show_beside
from fmem import PREFILL
from variants.build import ModelConfig, build

MODELS = {"sparse": {}, "dense": {"k_rows": None}, "extended": {"conv": 4, "gate": True}, "transformer": {"mixer": "attention"},
          "mamba2": {"mixer": "mamba2"}}
# of the experiments with ten million tokens, besides those
CHANGED = {"shared+shift": {"shared_row": True, "shift": True}, "conv+gate": {"conv": 4, "gate": True},
           "shared+shift+gate": {"shared_row": True, "shift": True, "gate": True},
           "all": {"shared_row": True, "shift": True, "conv": 4, "gate": True}}


def whole_model(name, quick, d_model, n_layer):
    size = dict(d_model=32, n_layer=1, n_rows=8, k_rows=2, d_state=8) if quick else dict(
        d_model=d_model, n_layer=n_layer, n_rows=d_model // 4, k_rows=d_model // 16)
    if name == "extended":                                      # rows twice as wide, at the MLP's expense
        size |= dict(d_memory=2 * size["d_model"], d_mlp={32: 32, 128: 184, 256: 352}[size["d_model"]])
    return build(ModelConfig(vocab_size=1025, **{**size, **{**MODELS, **CHANGED}[name]})).to(DEVICE)


def train_step(model, tokens):
    with torch.autocast("cuda", torch.bfloat16, enabled=GPU):
        logits, _ = model(tokens[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()


def print_training_peak(name, T, quick):
    model = whole_model(name, quick, 256, 4)
    for shape in ((1, 33), (max(4096 // T, 1), T + 1)):         # the first to warm up and to make the gradients
        tokens = torch.zeros(shape, dtype=torch.long, device=DEVICE)
        peak = measure_peak(lambda: train_step(model, tokens))          # noqa: B023
    print(peak)


def table_training(quick):
    """(d) Training whole models of as many parameters each: forward and backward of 4,096 tokens, by context."""
    rows = []
    for d, n_layer, T in ((32, 1, 32),) if quick else ((128, 5, 256), *((256, 4, T) for T in (256, 512, 1024, 2048, 4096))):
        models = {name: whole_model(name, quick, d, n_layer) for name in MODELS}
        tokens = torch.randint(1025, (1 if quick else 4096 // T, T + 1), device=DEVICE)
        times = clock({name: functools.partial(train_step, model, tokens) for name, model in models.items()}, 2 if quick else 7)
        row = dict(table="training", d_model=d, n_layer=n_layer, T=T, B=len(tokens), seconds=times)
        row["speed_over_transformer"] = {name: times["transformer"][0] / t[0] for name, t in times.items()}
        if (GPU or os.path.exists("/proc/self/clear_refs")) and (quick or (d == 256 and T in (256, 1024, 4096))):
            row["peak_bytes"] = {name: in_a_process(f"bench_models.print_training_peak({name!r}, {T}, {quick})")
                                 for name in (["sparse"] if quick else MODELS)}
        rows.append(row)
        print(f"training d {d} T {T:5d}  " + show_beside(times, "transformer")
              + "".join(f"  {k} {v / 2**20:.0f} MiB" for k, v in row.get("peak_bytes", {}).items()), flush=True)
    return rows


def table_changes(quick):
    """(f) Training the models of ten million tokens: forward and backward of 4,096 tokens in windows of 256."""
    names = ["sparse", *CHANGED, "transformer", "mamba2"]
    models = {name: whole_model(name, quick, 128, 5) for name in names}
    tokens = torch.randint(1025, (1 if quick else 16, 257), device=DEVICE)
    times = clock({name: functools.partial(train_step, model, tokens) for name, model in models.items()}, 2 if quick else 11)
    print(show_beside(times, "transformer"), flush=True)
    return [dict(table="changes", tokens=tokens[:, 1:].numel(), seconds=times)]


def context_state(model, context, B):
    """A state as after `context` tokens: of attention a cache with arbitrary content, of the others the start (its size,
    and the cost of a step, are the same after any text)."""
    x = torch.zeros(B, 1, dtype=torch.long, device=DEVICE)
    if model.config.mixer != "attention":
        return model(x)[1]
    layer = model.blocks[0].memory
    return [(torch.randn(2, B, layer.n_kv, context + 512, layer.D, device=DEVICE), context) for _ in model.blocks]


@torch.no_grad()
def table_generation(quick):
    """(e) Generation by context: reading the prompt (one text), a further token, and the bytes of the state."""
    rows = []
    models = {name: whole_model(name, quick, 128, 5).eval() for name in MODELS}
    for context in (64, 128) if quick else (1024, 4096, 16384, 65536, 131072):
        prompts = {}
        for name, model in models.items():                      # attention's prompt is quadratic: minutes beyond this
            if context <= 16384 or model.config.mixer != "attention":
                pieces = torch.randint(1025, (1, context), device=DEVICE).split(PREFILL, 1)

                def read(model=model, pieces=pieces):
                    state = None
                    for piece in pieces:
                        state = model.hidden(piece, state)[1]
                prompts[name] = read
        prompt_seconds = clock(prompts, 1 if context > 16384 else 3)
        for B in (1, 16):
            token = torch.zeros(B, dtype=torch.long, device=DEVICE)
            sizes, runs = {}, {}
            for name, model in models.items():
                one = [v.numel() * v.element_size() for layer in context_state(model, 1, 1)
                       for v in (layer if isinstance(layer, tuple) else [layer]) if torch.is_tensor(v)]
                sizes[name] = B * (sum(one) * context // 513 if model.config.mixer == "attention" else sum(one))
                if sizes[name] < (60 if GPU else 2) * 2**30:
                    runs[name] = stepper(model, token, context_state(model, context, B))
            times = clock(runs, 10 if quick else 50)
            rows.append(dict(table="generation", context=context, B=B, token_seconds=times, state_bytes=sizes,
                             prompt_seconds=prompt_seconds if B == 1 else None))
            print(f"generation after {context:7,d} tokens, B {B:2d}  " + show_beside(times, "sparse")
                  + "".join(f"  {k} {v / 2**20:.2f} MiB" for k, v in sizes.items()), flush=True)
            if B == 1:
                print("  prompt  " + show_beside(prompt_seconds, "sparse"), flush=True)
            del runs
    return rows


def stepper(model, token, state):
    """A function that makes one step, each time from the state of the one before, as generation does."""
    def step():
        nonlocal state
        _, state = model(token, state)
    return step


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m experiments.bench_models", description="Measure the speed of whole models.")
    p.add_argument("--out", default="bench_models.json", help="file for the figures (default: bench_models.json)")
    p.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    p.add_argument("--table", choices=("training", "generation", "changes"), help="only this one (default: all)")
    run_tables(p, argv, (table_training, table_generation, table_changes), "bench_models")


if __name__ == "__main__":
    main()
