"""The processes of a run: ranks from torchrun, what they agree on, signals, and what happens when one of them ends."""
import contextlib
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from data.messages import printable


class Processes:
    """This process among those that torchrun started (rank `rank` of `world`); without torchrun the only one."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank, self.torchrun = int(os.environ.get("LOCAL_RANK", 0)), "WORLD_SIZE" in os.environ
        self.first = self.rank == 0

    def say(self, *words):
        """Print, in the first process alone, nothing that could steer a terminal."""
        if self.first:
            print(*(printable(str(word)) for word in words), flush=True)

    def join(self, device, split):
        """Meet the other processes, if there are any. split: the model is split over them (--fsdp)."""
        self.split, self.joined = split, self.world > 1 or split
        if self.joined:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def wait(self):
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def sum(self, value):
        """The sum of a tensor over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def agree(self, progress, stopped, device):
        """progress as the first process sees it, and whether any process was told to stop: the same answer in all of them."""
        if self.world > 1:
            word = self.sum(torch.tensor([progress if self.first else 0.0, float(stopped)], dtype=torch.float64, device=device))
            return word[0].item(), word[1].item() > 0
        return progress, stopped

    def place(self, model, device, dtype):
        """The model on the device, or this process's part of it. Raises ValueError where it cannot be split."""
        if self.split:
            from training import sharded
            return sharded.shard(model, device, dtype)
        return model.to(device)

    def wrap(self, net):
        """The model whose backward pass leaves every process with the mean gradient."""
        return torch.nn.parallel.DistributedDataParallel(net) if self.world > 1 and not self.split else net

    def exchange(self, net, model, last):
        """A context for a part of a batch: only with the last part are gradients, which add up until then, exchanged."""
        if self.split:
            model.set_requires_gradient_sync(last)
        elif self.world > 1 and not last:
            return net.no_sync()
        return contextlib.nullcontext()

    def clip(self, model, largest):
        """Bring the norm of the whole gradient to at most `largest`; returns what it was."""
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
        return norm.full_tensor() if self.split else norm

    def leave(self):
        if self.joined:
            # DDP is freed with Python's lock in hand and then waits for gloo's thread, which needs that lock to let go of the
            # last result: forever. A moment for that thread avoids it.
            time.sleep(0.5)
            dist.destroy_process_group()


class Stop:
    """Ctrl-C and SIGTERM end the run after the current step; a second one ends it at once."""

    def __enter__(self):
        self.signal, self.before = None, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):                   # not in the main thread: no handlers
                self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        self.signal = number
        self.__exit__()

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def end_at_once(message):
    """Print one line and exit with code 1 without destructors, which would wait for a process that has ended."""
    print(f"train.py: error: {message}", file=sys.stderr, flush=True)
    os._exit(1)
