"""Train a Factorization Memory language model.

    python train.py                            # picks the device, the preset and the data; prints what and why
    python train.py --resume                   # continues the run in out/
    torchrun --nproc_per_node 2 train.py       # data parallel: the same batches, split over the processes
    torchrun --nproc_per_node 8 train.py --fsdp     # the model too is split over them (training/sharded.py)

Every field of Settings in training/options.py is an option, `--name value`. A run writes into --out:

    last.pt   the newest checkpoint      best.pt    the one with the best validation loss
    log.csv   one row per log line       loss.png   the loss curve, where matplotlib is installed
    step-N.pt the state after N steps, with --keep_every
    step-N/   instead of last.pt with --fsdp: every process writes its part

All that is random in a step is a function of (seed, step, process), so a resumed run is the unbroken one bit for bit.
"""
import dataclasses
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import fast
from data.messages import one_line
from training.checkpoint import Saved
from training.device import Meter, autocast, check_memory, out_of_memory, pick_device, pick_dtype, try_compile
from training.optimizer import make_optimizer
from training.options import Settings, check_together, parse, settle
from training.processes import Processes, Stop, end_at_once
from training.run import Run
from training.tasks import task_of
from training.threads import Threads
from variants.ablations import aux_loss
from variants.build import ModelConfig, build


def train(given):
    """Run `given` ({name: value} of Settings). Returns the last checkpoint, or None in processes other than the first.

    Raises ValueError or OSError, one line, on anything the user can mend.
    """
    # Set-up: the processes, the run to resume, the device, the settings.
    processes = Processes()
    torch.set_flush_denormal(True)                      # sharp routing makes denormal decays, 3.5 times slower on a CPU
    saved = Saved(Path(given.get("out", Settings.out)), given.get("resume"))
    device, why_device = pick_device(given.get("device", saved.settings.get("device", "auto")), processes.local_rank)
    s = settle(given, device, saved.settings)
    dtype, why_dtype = pick_dtype(s.dtype, device)
    if saved.exists() and not (s.resume or s.overwrite):
        raise ValueError(f"{saved.out} holds a run; --resume continues it, --out DIR starts another, --overwrite replaces it")
    local, micro = check_together(s, processes, saved)
    threads = Threads(s.threads, device, processes.say)
    processes.join(device, s.fsdp)
    saved.out.mkdir(parents=True, exist_ok=True)

    # The data, the model, the optimiser.
    task = task_of(s, processes)
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    config = ModelConfig(vocab_size=task.vocab_size, **{k: v for k, v in dataclasses.asdict(s).items() if k in fields})
    saved.check(config, task)
    check_memory(config, device, shares=processes.world if s.fsdp else 1)
    torch.manual_seed(s.seed)
    model = processes.place(build(config), device, dtype)       # built alike in every process
    optimizer = make_optimizer(model, s, device)
    saved.restore(model, optimizer)
    amp = autocast(device, dtype)
    meter = Meter(device, dtype, config, s.context, processes.world)
    run = Run(s, saved, processes, task, config, model, optimizer, device, amp, local, micro, threads, meter)
    scan = fast.choose(config.scan, device, config.n_rows, config.d_memory, dtype)
    run.introduce((device, why_device), (dtype, why_dtype), scan, saved)
    net, may_compile = model, s.compile is None and device.type == "cuda" and not processes.joined
    if s.compile or may_compile:
        net = try_compile(model, task.batches(0)[:micro, :-1].to(device), amp, processes.say, asked=bool(s.compile))
    net = processes.wrap(net)

    # The loop.
    with Stop() as stop:
        while run.unfinished(stop):
            parts, losses = run.next_batch(), []
            try:
                for i, windows in enumerate(parts):
                    with processes.exchange(net, model, last=i == len(parts) - 1):
                        with amp():
                            logits, state = net(windows[:, :-1], run.states[i])
                            loss = F.cross_entropy(logits.float().flatten(0, 1), task.targets(windows).flatten())
                        ((loss + aux_loss(model)) * len(windows) / local).backward()
                    losses.append(loss.detach() * len(windows) / local)
                    run.carry(i, state)
            except (MemoryError, RuntimeError) as e:
                optimizer.zero_grad(set_to_none=True)
                if run.halve(e):                        # the same step again, fewer windows at once
                    continue
                raise
            norm = processes.clip(model, s.clip)
            loss = processes.sum(torch.stack(losses).sum())
            finite = bool(torch.isfinite(norm + loss))  # the same in all processes: the gradient is their mean
            if finite:                                  # else nothing of this step may reach the weights
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.end_step(loss / processes.world, norm, taken=finite)
        run.save_at_end()
    return run.finish()


def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # a console that cannot show a character must not end a run
    given = parse(argv)
    try:
        train(given)
    except (ValueError, OSError) as e:
        sys.exit(f"train.py: error: {one_line(e)}")
    except (MemoryError, RuntimeError) as e:
        if dist.is_available() and dist.is_initialized() and re.search("gloo|nccl|peer|socket", str(e), re.IGNORECASE):
            end_at_once(f"another process of this run has ended ({str(e).strip().splitlines()[-1][:200]}); --resume continues "
                        f"from the last checkpoint, with any number of processes that divides --batch_size")
        if not out_of_memory(e):
            raise
        why = (str(e).strip() or "Python has no more").splitlines()[0]
        sys.exit(f"train.py: error: out of memory ({why}); try a smaller --micro_batch, --context or model")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; what was saved before stays")


if __name__ == "__main__":
    main()
