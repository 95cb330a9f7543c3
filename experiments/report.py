"""Write the results page, its figures and the tables of README.md and docs/ from results/: python -m experiments.report

Reads results/experiments.jsonl (experiments.run writes it), results/bench_models.json (experiments.bench_models),
results/bench_cpu_epyc.json (experiments.bench_scan) and results/survives.json (the tests of endurance). What has not been run is left out, with a line that says so. Needs matplotlib
for the figures; without it only the text is written.
"""
import json
import re

from experiments import estimate
from experiments.run import MODELS, results
from experiments.sections_changes import changes_section, rates_table
from experiments.sections_inside import ablation_section, routing_section, speed
from experiments.sections_memory import code_section, headline, headline_table, why_section, why_table
from experiments.sections_quality import long, recall_section, rows_section, short
from experiments.tables import HERE, NAMES, Figures, over_seeds, spread, table, training_row

ROOT = HERE.parent


def reach(done, bench):
    """The goals that were set for the models, and what was reached."""
    rows = []

    def compare(a, b):
        x, y = (over_seeds(done, f"short/{m}_{{}}", "bits_per_byte") for m in (a, b))
        return [p - q for p, q in zip(x, y, strict=False)]

    for a, b, asked in (("sparse", "transformer", "below 0"), ("dense", "transformer", "below 0"),
                        ("extended", "mamba2", "at most 0")):
        difference = compare(a, b)
        if difference:
            rows.append([f"{NAMES[a]} against {NAMES[b]}, bits per byte, same seed", asked, spread(difference)])
    for m in MODELS:
        runs = over_seeds(done, f"long/{m}_{{}}", "long")
        if runs:
            rises = [100 * (run["rows"][-1]["position"] / run["base"] - 1) for run in runs]
            rows.append([f"{NAMES[m]}: loss by position at 128 times the training length, rise in %",
                         "below 2" if m not in ("transformer", "mamba2") else "", spread(rises, 2)])
    row = training_row(bench, 256, 512)
    if row:
        for m in ("sparse", "dense"):
            rows.append([f"{NAMES[m]}: training speed over the Transformer's, context 512", "1.0",
                         f"{row['seconds']['transformer'][0] / row['seconds'][m][0]:.2f}"])
            rows.append([f"{NAMES[m]}: training speed over Mamba-2's, context 512", "1.4",
                         f"{row['seconds']['mamba2'][0] / row['seconds'][m][0]:.2f}"])
    generation = [r for r in bench if r["table"] == "generation"]
    for B in (1, 16):
        one = [r["token_seconds"]["sparse"][0] for r in generation if r["B"] == B]
        if one:
            rows.append([f"{NAMES['sparse']}: a token after 131,072 over one after 1,024, {B} text{'s' * (B > 1)}", "flat",
                         f"{one[-1] / one[0]:.2f}"])
    return table(["", "asked", "reached"], rows)


def survives(did):
    """What the tests of endurance did at full length: the table of docs/robustness.md."""
    def count(*names, what="mutations"):
        return f"{sum(did[name][what] for name in names):,}"

    damaged = "mutations_checkpoint", "mutations_state", "mutations_in_parts", "mutations_data", "mutations_corpora"
    wrong = "wrong_content_sample", "wrong_content_eval", "wrong_content_resume", "wrong_content_state"
    killed, prepared, large, agree = did["killed"], did["prepare_killed"], did["prepare_large"], did["step_and_chunks"]
    longest = [name for name in did if name.startswith("long_prompt_")]
    rows = [
        ["training killed (SIGKILL) at random moments, a checkpoint after every step",
         f"{killed['kills']} kills, {killed['half']} while a checkpoint was half written",
         "resumed each time; weights, optimiser and log as without, bit for bit"],
        ["data/prepare.py killed", f"{prepared['kills']} kills, {prepared['resumed']} with finished files to resume from",
         "the same bytes as without"],
        ["bits turned, pieces lost, zeroed, doubled or put in: checkpoints, checkpoints in parts, states, prepared folders, corpora",
         f"{count(*damaged)} files", f"{count(*damaged, what='refused')} refused in one line, the others loaded to the same, or as text"],
        ["whole files with wrong content (fields, shapes, NaN, sizes), for sample.py, evaluate.py, --resume, --load-state",
         f"{count(*wrong, what='files')} files", f"{count(*wrong, what='refused')} refused in one line, the others worked"],
        ["prepared folders changed and given new checksums that agree", f"{count('mutations_data_resigned')} folders",
         f"{count('mutations_data_resigned', what='refused')} refused in one line, the others read"],
        ["prompts of any bytes: control sequences, half characters, lone surrogates", f"{did['prompts']['prompts']:,} prompts",
         "answered; nothing printed can steer a terminal"],
        ["prompts of 10 MB: text, one letter, spaces, no spaces, any bytes", f"{len(longest)} prompts", "answered"],
        ["generation without end", f"{did['endless_generation']['tokens']:,} tokens",
         f"memory grew by {did['endless_generation']['growth_percent']:.2f} %, all finite"],
        ["reading without end", f"{did['endless_reading']['tokens']:,} tokens",
         f"memory grew by {did['endless_reading']['growth_percent']:.2f} %, all finite"],
        ["the same text step by step and in chunks, float32", f"{agree['tokens']:,} tokens",
         f"logits differ by {agree['logits']:.0e}, states by {agree['state']:.0e}"],
        ["a corpus of .txt, .jsonl and .jsonl.gz", f"{large['bytes'] / 1e9:.2f} GB, {large['workers']} cores",
         f"{large['peak_mb']} MB of memory at most; {large['mb_per_second']:.1f} MB/s (tiktoken alone: "
         f"{large['tiktoken_mb_per_second']:.1f})"],
        ["answers of a server to a download: broken off, stalled, of another file, no HTTP", f"{did['downloads']['answers']:,} downloads",
         f"{did['downloads']['fetched']:,} right in the end, one line for the others; nothing wrong got its name"],
        ["the same damage to exported folders", f"{did['exports']['mutations']:,} files", "all noticed by --check"],
        ["lines of a conversation, bytes of all sorts", f"{did['conversation']['lines']:,} lines",
         f"{did['conversation']['refused']:,} refused in one line, the others answered"],
        ["one of two processes of torchrun killed, the model whole in each or split (--fsdp)",
         f"resumed with {did['dead_process']['resumed_with']} and {did['dead_process--fsdp']['resumed_with']}",
         "the run ends in one line; then the losses of one process, to rounding"]]
    return table(["what", "how much", "what happened"], rows)


def forms(bench):
    """The forms of the scan against each other, from bench_scan: the table of docs/speed.md."""
    rows = {}
    for row in (row for row in bench if row["table"] == "forms"):
        rows.setdefault((row["T"], row["m"]), {})[row["direction"]] = row

    def cell(row, key):
        return f"{row[key]:.1f}" if key in row else ""

    keys = [(way, key) for key in ("loop_over_fast", "chunked_over_fast") for way in ("forward", "both")]
    keys += [("both", "compiled_over_fast"), ("both", "fast_over_products")]
    heads = [f"{key.replace('_over_', ' / ')}, {way}" for way, key in keys]
    return table(["T", "m", *heads], [[T, m, *(cell(both[way], key) for way, key in keys)] for (T, m), both in rows.items()])


def gpu(folder):
    """What experiments.gpu found, a table for each part; empty where it was not run."""
    tables = []
    for file in sorted(folder.glob("part-*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        columns = list(dict.fromkeys(key for row in found["rows"] for key in row if key not in ("name", "took", "all")))
        rows = [[row["name"], *(f"{row[key]:.4g}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in columns)]
                for row in found["rows"]]
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        tables.append(f"**{found['title'].replace('_', ' ')}**, {found['device']} ({versions})\n\n{table(['', *columns], rows)}")
    return "\n".join(tables)


def gpu_line(folder):
    """The sentence of README.md on what was measured on a GPU."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("part-*.json"))}
    if not {"part-1", "part-6"} <= found.keys():
        return "**Not measured yet**: neither this preset nor the kernels have run on a GPU."
    checked = found["part-1"]["rows"]
    speed = {row["name"]: row["tokens/s"] for row in found["part-6"]["rows"] if "tokens/s" in row}
    words = ", ".join(f"{name} {tokens:,.0f}" for name, tokens in speed.items())
    return (f"**Measured** on {found['part-1']['device']}: {sum(bool(row.get('right')) for row in checked)} of {len(checked)} "
            f"configurations of the kernels right; tokens/s of training at width 512: {words}.")


START, END = "<!-- written by experiments/report.py -->\n", "<!-- end -->\n"


def between_marks(path, *bodies):
    """The page at `path` with these in the places of what stands between its marks, one after the other."""
    first, *parts = path.read_text(encoding="utf-8").split(START)
    return first + "".join(START + "\n" + body + "\n" + END + part.split(END, 1)[1]
                           for body, part in zip(bodies, parts, strict=True))


def pages(draw=True):
    """{path: text} of the pages; with draw the figures are drawn, too."""
    done, path = results(), HERE / "results/bench_models.json"
    bench = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    figures = Figures(draw)
    sections = [short(done, bench, figures), long(done, figures), rows_section(done, figures), speed(bench, figures),
                recall_section(done, figures), routing_section(done, figures), ablation_section(done), changes_section(done, figures),
                why_section(done), code_section(done)]
    conclusions = (HERE / "results/conclusions.md").read_text(encoding="utf-8").strip()
    page = f"""# Results

Written by `python -m experiments.report` from results/experiments.jsonl and results/bench_models.json: no number here is typed by
hand. `python -m experiments.run --list` shows every command, `python -m experiments.run` runs what is missing, one per core on one
thread each. Nearly all of it ran on two cores of an Intel Xeon virtual machine (AVX-512, no GPU), PyTorch 2.13.0, float32. The models have
a million parameters or fewer (three of section 8: 3.6 million) and read a million tokens or fewer (in section 8 ten million): enough to tell the mixers apart at this size,
and no more than that. Another number of threads rounds differently and moves the third decimal.

## Language, recall, state

{headline(done, figures)}
## Goals, and what was reached

{reach(done, bench)}
{conclusions}

""" + "\n".join(section for section in sections if section)
    rows = []
    for m in MODELS:
        runs = over_seeds(done, f"long/{m}_{{}}", "long")
        if runs:
            far = [100 * (run["rows"][-1]["position"] / run["base"] - 1) for run in runs]
            rows.append([NAMES[m], spread(over_seeds(done, f"short/{m}_{{}}", "bits_per_byte")), spread(far, 1)])
    compared = table(["", "bits per byte, context 256", "rise of the loss 128 times beyond the training length, %"], rows)
    did = json.loads((HERE / "results/survives.json").read_text(encoding="utf-8"))
    scans = json.loads((HERE / "results/bench_cpu_epyc.json").read_text(encoding="utf-8"))["rows"]
    kernels, preset = estimate.tables(json.loads((HERE / "results/estimates.json").read_text(encoding="utf-8")))
    tables = {"README.md": [compared], "docs/robustness.md": [survives(did)],
              "docs/memory.md": [why_table(done), rates_table(done), headline_table(done)[0]],
              "docs/speed.md": [forms(scans), kernels, preset + gpu(HERE / "results/gpu")]}
    written = {ROOT / name: between_marks(ROOT / name, *bodies) for name, bodies in tables.items()}
    line = gpu_line(HERE / "results/gpu")
    written[ROOT / "README.md"] = re.sub(r"\*\*(Not measured yet|Measured)\*\*.*", lambda _: line, written[ROOT / "README.md"])
    return {HERE / "RESULTS.md": page, **written}


def main():
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
