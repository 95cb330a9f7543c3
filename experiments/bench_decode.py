"""Generation on a CPU, the joined step of fast/decode.py against single calls: python -m experiments.bench_decode

The shape of the CPU preset, with weights that were never trained, one text and eight; everything is alternated within one
process, medians are compared. Writes experiments/results/decode.json. Nothing else should be running.
"""
import platform
from pathlib import Path

import torch

import fast
from experiments.command import parser, save
from experiments.timing import clock, show_beside
from fmem import copy_state, sample
from variants.build import ModelConfig, build


def main(argv=None):
    p = parser("bench_decode", "The joined step against single calls.")
    p.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results/decode.json")
    p.add_argument("--tokens", type=int, default=100, help="per repetition (default: 100)")
    a = p.parse_args(argv)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    model = build(ModelConfig(vocab_size=1025, n_layer=4, d_model=192, n_rows=32, k_rows=8)).eval()
    found = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(), "speedup": {}}
    for B in (1, 8):
        for name, choice in (("greedy", (0, None, None, None)), ("as sample.py", (0.8, None, 0.95, None))):
            runs = {}
            with torch.no_grad():
                token, (_, state) = torch.zeros(B, dtype=torch.long), model(torch.zeros(B, 1, dtype=torch.long))
                joined, own = fast.capture_step(model, token, copy_state(state), sample, choice), copy_state(state)

                def single(token=token, state=own, choice=choice):
                    token.copy_(sample(model(token, state)[0], *choice))

                for form, step in (("single calls", single), ("joined", joined)):
                    runs[form] = lambda step=step: [step() for _ in range(a.tokens)]
                times = clock(runs, 9, torch.device("cpu"))
            found["speedup"][f"{B}, {name}"] = round(times["single calls"][0] / times["joined"][0], 2)
            print(f"B {B}, {name}, {a.tokens} tokens: {show_beside(times, 'single calls')}", flush=True)
    save("bench_decode", a.out, found)


if __name__ == "__main__":
    main()
