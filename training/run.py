"""The state of a run beside its model: which step it is at, what is logged, evaluated and saved, and when."""
import dataclasses
import math
import sys
import time

import numpy as np
import torch

from training.batches import Streams, detached
from training.checkpoint import FORMAT, save_checkpoint, sharded
from training.device import out_of_memory
from training.log import Log, draws, sparkline
from training.optimizer import set_learning_rate


def step_seed(seed, step, rank):
    """The seed of everything random in one step of one process, which is dropout."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


class Run:
    """A run of settings s in the folder s.out, from its start or from what `saved` (a checkpoint.Saved) holds.

    step is the number of optimiser steps done, states the memories that --carry_state hands from step to step, one per part of
    the batch that goes through the model at once.
    """

    def __init__(self, s, saved, processes, task, config, model, optimizer, device, amp, local, micro, threads, meter):
        self.s, self.out, self.processes, self.say, self.task, self.config = s, saved.out, processes, processes.say, task, config
        self.model, self.optimizer, self.device, self.amp, self.local, self.micro = model, optimizer, device, amp, local, micro
        self.threads, self.meter = threads, meter
        before = saved.checkpoint or {"step": 0, "seconds": 0.0, "best": math.inf}
        self.step, self.seconds_before, self.best = before["step"], before["seconds"], before["best"]
        self.log = Log(self.out / "log.csv", self.step, s.log == "tensorboard") if processes.first else None
        if s.overwrite and processes.first:
            saved.remove()
        self.start = self.last_time = time.perf_counter()
        self.states = saved.states(model, local // micro, micro, device) if s.carry_state else [None] * (local // micro)
        self.smooth, self.pending, self.last_step, self.saved_at = None, [], self.step, self.step if saved.checkpoint else None
        self.skipped = self.in_a_row = 0
        if s.keep_every and self.step == 0:
            self.save(self.out / "step-0.pt")

    def introduce(self, device, dtype, scan, saved):
        """Print what was chosen, and why."""
        s, say, config = self.s, self.say, self.config
        say("device    {} ({})".format(*device))
        if device[0].type == "cpu":
            say(f"threads   {self.threads.now} ({self.threads.why})")
        say(f"dtype     {str(dtype[0])[6:]} ({dtype[1]})")
        say("scan      {} ({})".format(*scan))
        say(f"data      {self.task.about}")
        say("settings  " + " ".join(f"{k}={v}" for k, v in dataclasses.asdict(s).items()))
        say(f"model     {sum(p.numel() for p in self.model.parameters()):,} parameters; d_memory={config.d_memory} "
            f"d_mlp={config.d_mlp} vocab_size={config.vocab_size}")
        say(f"batch     {s.batch_size} windows of {s.context} tokens = {s.batch_size * s.context:,} tokens per step, "
            f"{self.task.batches.per_epoch / s.batch_size:.1f} steps per epoch")
        if s.resume:
            say(f"resumed   {saved.folder or saved.file} after step {self.step}")

    # ------------------------------------------------------------------------------------------------------ a step

    @property
    def seconds(self):
        """Spent on the run so far, before it was resumed included."""
        return self.seconds_before + time.perf_counter() - self.start

    @property
    def progress(self):
        """The share of the run that is done, by steps or by seconds."""
        return max(self.step / self.s.max_steps, self.seconds / self.s.seconds if self.s.seconds else 0)

    def unfinished(self, stop):
        """Whether there is another step; all processes get the same answer. Sets self.stopped if a signal ended the run."""
        self.share, self.stopped = self.processes.agree(self.progress, bool(stop.signal), self.device)
        return self.share < 1 and not self.stopped

    def next_batch(self):
        """This process's windows of the step, int64 [windows, context + 1], in parts that go through the model at once.

        Sets the learning rate, and seeds dropout by (seed, step, process), so that a resumed run draws the same.
        """
        self.threads.begin()
        self.lr, rank = set_learning_rate(self.optimizer, self.s, self.step, self.share), self.processes.rank
        torch.manual_seed(step_seed(self.s.seed, self.step, rank))
        batches = self.task.batches
        if isinstance(batches, Streams) and batches.begins(self.step):
            self.forget()
        mine = batches(self.step, slice(rank * self.local, (rank + 1) * self.local))
        return mine.to(self.device).split(self.micro)

    def halve(self, error):
        """After the memory was too small for a step: from now on fewer windows at once. False where that is not to be done: the
        error is another, there is one window already, states are carried, or other processes wait for this one."""
        smaller = max((n for n in range(1, self.micro // 2 + 1) if self.local % n == 0), default=0)
        if not smaller or not out_of_memory(error) or self.s.carry_state or self.processes.joined:
            return False
        self.say(f"memory    too little for {self.micro} windows at once; from step {self.step + 1} on {smaller} (--micro_batch "
                 f"{smaller}), with the same batches")
        self.micro = self.s.micro_batch = smaller
        self.states = [None] * (self.local // smaller)
        return True

    def carry(self, i, state):
        """Keep the state after part i for the next step, if the settings ask for that."""
        if self.s.carry_state:
            self.states[i] = detached(state, self.device)

    def forget(self):
        self.states = [None] * len(self.states)

    def end_step(self, loss, norm, taken):
        """Count the step and log, evaluate and save if it is time to. taken: False if it was skipped, for its loss or gradient.

        Raises ValueError after too many steps skipped in a row; the checkpoint has the weights from before them.
        """
        s, self.step = self.s, self.step + 1
        self.threads.end()
        if taken:
            self.pending.append(loss)
            self.in_a_row = 0
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            self.forget()
            self.say(f"skipped   step {self.step}: loss {loss.item():.4g}, norm of the gradient {norm.item():.4g}")
        if self.in_a_row == s.max_skipped:
            self.save()
            raise ValueError(f"the loss or its gradient was not finite in {self.in_a_row} steps in a row; {self.out} has the "
                             f"weights from before them: try --resume --lr {s.lr / 3:.1g}")
        if (self.step % s.log_every == 0 or self.step == s.max_steps) and self.pending:
            self.report(norm.item())
        if self.step % s.eval_every == 0:
            self.validate_and_save()
            self.last_time = time.perf_counter()
        if s.keep_every and self.step % s.keep_every == 0:
            self.save(self.out / f"step-{self.step}.pt")

    def report(self, norm):
        """A line about the steps since the last one, on the screen and in log.csv."""
        s, mean, now = self.s, torch.stack(self.pending).mean().item(), time.perf_counter()
        self.smooth = mean if self.smooth is None else 0.8 * self.smooth + 0.2 * mean
        speed = (self.step - self.last_step) * s.batch_size * s.context / (now - self.last_time)
        left, bits = self.seconds * (1 - self.progress) / self.progress, self.smooth * self.task.bits_per_nat
        self.say(f"step {self.step}/{s.max_steps} | loss {self.smooth:.4f}{f' | {bits:.3f} bits/byte' if bits else ''} | "
                 f"lr {self.lr:.2e} | grad {norm:.2f} | {speed:,.0f} tokens/s{self.meter(speed)} | {left:.0f} s left")
        self.write(train_loss=mean, lr=self.lr, grad_norm=norm, tokens_per_second=speed, skipped=self.skipped)
        self.pending, self.last_step, self.last_time = [], self.step, now

    def write(self, **columns):
        if self.log:
            tokens = self.step * self.s.batch_size * self.s.context
            self.log.write(step=self.step, tokens=tokens, seconds=self.seconds, **columns)

    # --------------------------------------------------------------------------------------- evaluation and checkpoints

    def validate(self, limit, name):
        loss, words, columns = self.task.validate(self.model, self.device, self.amp, limit, self.micro)
        self.say(f"{name:9s} step {self.step}: {words}")
        self.write(val_loss=loss, **columns)
        return loss

    def validate_and_save(self):
        loss = self.validate(self.s.eval_tokens, "eval")
        if self.log and draws(sys.stdout):
            self.say(f"          {sparkline(self.log.validation())} validation loss so far")
        better = loss < self.best                               # never, if it is not a number
        self.best = loss if better else self.best
        self.save()
        if better:
            self.save(self.out / "best.pt")

    def snapshot(self, **weights):
        """What a checkpoint holds: all that the rest of the run depends on."""
        weights = weights or {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {"format": FORMAT, "config": dataclasses.asdict(self.config), "settings": dataclasses.asdict(self.s),
                "tokenizer": self.task.tokenizer, "corpus": self.task.corpus, **weights, "step": self.step, "best": self.best,
                "seconds": self.seconds, "states": self.states if self.s.carry_state else None,
                "random": {"seed": self.s.seed, "next_step": self.step, "next_window": self.step * self.s.batch_size}}

    def save(self, path=None):
        """Write a checkpoint to `path` (None: last.pt). All processes must call it. Raises OSError."""
        path, s, first = path or self.out / "last.pt", self.s, self.processes.first
        if not s.fsdp:
            if first:
                save_checkpoint(self.snapshot(), path)
        elif path.name == "best.pt":                            # whole, so that sample.py needs nothing else
            weights = sharded().full_weights(self.model)
            sharded().everywhere(lambda: not first or save_checkpoint(self.snapshot(model=weights), path), f"cannot write {path}")
        elif self.saved_at != self.step:
            sharded().save(self.out, self.step, self.model, self.optimizer,
                           lambda run: save_checkpoint(self.snapshot(model=None), run),
                           keep=lambda n: s.keep_every and n % s.keep_every == 0)
            self.saved_at = self.step

    def save_at_end(self):
        """Nothing of the run is lost, whether it has all its steps or was stopped."""
        if self.stopped:
            self.save()
        elif self.step % self.s.eval_every:
            self.validate_and_save()

    def finish(self):
        """Evaluate on everything and print a sample; or, if a signal ended the run, say how to resume.

        Returns the last checkpoint, or None in processes other than the first.
        """
        default, best = str(self.out) == "out", self.out / "best.pt"
        if self.stopped:
            where = "" if default else f" --out {self.out}"
            self.say(f"stopped   after step {self.step}, saved; python train.py --resume{where} continues")
        else:
            self.validate(None, "final")
            if self.processes.first:
                self.log.draw(self.out / "loss.png")
                took = self.seconds
                model = None if self.s.fsdp else self.model     # of which one process alone has a part only
                more = self.task.finish(model, self.device, self.s.sample_tokens, None if default else best)
                self.say(f"done      {took:.0f} s; {more}")
        self.processes.leave()
        if self.processes.first:
            return self.snapshot(model=None) if self.s.fsdp else self.snapshot()
        return None
