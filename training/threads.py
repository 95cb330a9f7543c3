"""How many threads a run on a CPU takes: all cores, or fewer where other programs keep some of them busy.

Threads that share a product wait for the last of them. If another program holds one core of two, that is most of the time: two
threads then make half the speed of one alone. So `--threads auto` times a few steps with fewer threads, if the machine is busy at
the start or when a run has become half as fast, and with more again when the others are done; these are steps like all others.
Sums in another order round differently, so a run is repeated bit for bit only with a fixed number.
"""
import os
import statistics
import time

import torch

TRIAL, WINDOW = 4, 5        # steps with each number of threads, the first not counted; steps whose median is the speed
BUSY, IDLE = 0.5, 0.25      # cores that others use: from here on a trial may help; below this all cores are free
PAUSE = 30.0                # seconds between two looks at what the others do


def used():
    """Seconds of CPU time that all processes of the machine have used, and this one; None where that cannot be known."""
    try:
        with open("/proc/stat", encoding="ascii") as f:
            numbers = [int(word) for word in f.readline().split()[1:]]
        return (sum(numbers[:3]) + sum(numbers[5:7])) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:2])
    except (OSError, ValueError, IndexError, AttributeError):
        return None


class Load:
    """Cores that other processes keep busy, on average between two looks."""

    def __init__(self, clock=time.perf_counter, used=used):
        self.clock, self.used = clock, used
        self.then, self.before = clock(), used()

    def __call__(self):
        """-> since the last look, or None where that cannot be known."""
        now, after = self.clock(), self.used()
        seconds, before, self.then, self.before = now - self.then, self.before, now, after
        if not before or not after or seconds <= 0:
            return None
        return max(after[0] - before[0] - (after[1] - before[1]), 0) / seconds


class Threads:
    """setting: "auto" or a number of threads. begin() and end() stand around the work of each step. Raises ValueError."""

    def __init__(self, setting, device, say, load=None, clock=time.perf_counter, set_threads=torch.set_num_threads):
        self.say, self.clock, self.set_threads = say, clock, set_threads
        self.all = self.now = torch.get_num_threads()
        fixed = "OMP_NUM_THREADS" in os.environ
        self.auto = setting == "auto" and device.type == "cpu" and self.all > 1 and not fixed
        self.why = "as asked" if setting != "auto" else "as OMP_NUM_THREADS says" if fixed else "one for each core"
        if setting != "auto":
            if not setting.isascii() or not setting.isdigit() or not 1 <= int(setting[:9]) <= 1024:
                raise ValueError(f"--threads must be auto or a number from 1 to 1024, not {setting}")
            self.set(int(setting))
        self.times, self.usual, self.trial, self.waiting = [], None, None, []
        if self.auto:
            self.load = load or Load()
            if load is None:
                time.sleep(0.2)
            self.looked = clock()
            if (self.load() or 0) >= BUSY:
                self.why = "other programs are busy: fewer are tried first"
                self.begin_trial("other programs are busy")

    def set(self, n):
        if n != self.now:
            self.set_threads(n)
        self.now = n

    def begin(self):
        self.start = self.clock()

    def end(self):
        """After a step: note its time, and begin or go through a trial if it is time to."""
        if not self.auto:
            return
        self.times.append(self.clock() - self.start)
        if self.trial is not None:
            if len(self.times) == TRIAL:
                self.trial[self.now] = statistics.median(self.times[1:])
                self.next_trial()
            return
        self.times = self.times[-WINDOW:]
        if len(self.times) < WINDOW:
            return
        median = statistics.median(self.times)
        self.usual = min(self.usual or median, median)
        if median > 2 * self.usual:
            self.begin_trial("a step takes twice as long as before")
        elif self.now < self.all and self.clock() - self.looked > PAUSE:
            self.looked, others = self.clock(), self.load()
            if others is not None and others < IDLE:
                self.begin_trial("the other programs are done")

    def begin_trial(self, why):
        n, some = self.all, []
        while n:
            some, n = [*some, n], n // 2
        self.reason, self.trial, self.waiting, self.before = why, {}, some, self.now
        self.next_trial()

    def next_trial(self):
        self.times = []
        if self.waiting:
            self.set(self.waiting.pop(0))
            return
        best = min(self.trial, key=self.trial.get)
        self.set(best)
        if best != self.before or best != self.all:
            faster = self.trial[self.all] / self.trial[best] if best < self.all else self.trial[self.before] / self.trial[best]
            self.say(f"threads   {best} of {self.all} ({self.reason}; {faster:.1f} times as fast as with "
                     f"{self.all if best < self.all else self.before})")
        self.usual, self.trial, self.looked = self.trial[best], None, self.clock()
        self.load()
