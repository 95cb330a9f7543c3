"""Training windows: which tokens a step reads."""
import numpy as np
import torch


class Batches:
    """Training windows of context + 1 tokens. Every epoch cuts the text at another offset and shuffles the windows.

    A batch is a function of (seed, step) alone, so that resuming, or splitting it over processes, changes nothing.
    """

    def __init__(self, tokens, context, batch_size, seed):
        slack = len(tokens) - 1 - context
        if slack < 0:
            raise ValueError(f"the training text has {len(tokens)} tokens; --context must be below that, not {context}")
        self.tokens, self.context, self.batch_size, self.seed = tokens, context, batch_size, seed
        self.offsets = min(context, slack + 1)                      # an epoch starts at one of these tokens
        self.per_epoch = (len(tokens) - self.offsets) // context    # windows, whatever the offset
        self.epoch = None

    def start(self, i):
        """Where window number i of the run begins."""
        epoch, j = divmod(i, self.per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.offset = epoch, rng.integers(self.offsets)
            self.order = rng.permutation(self.per_epoch)
        return self.offset + self.order[j] * self.context

    def __call__(self, step, part=slice(None)):
        """Windows `part` of the step's batch: int64 [windows, context + 1]."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)[part]
        starts = [self.start(i) for i in numbers]
        return torch.from_numpy(np.stack([self.tokens[a:a + self.context + 1] for a in starts]).astype(np.int64))


class Streams(Batches):
    """For --carry_state: the text cut into batch_size streams; window b of a step continues window b of the step before.

    Every epoch begins at another offset, with empty states. Also a function of (seed, step) alone.
    """

    def __init__(self, tokens, context, batch_size, seed):
        super().__init__(tokens, context, batch_size, seed)
        self.steps = self.per_epoch // batch_size
        if self.steps < 1:
            raise ValueError(f"--carry_state: the training text has no room for {batch_size} windows of {context} side by side; "
                             f"--batch_size must be at most {self.per_epoch}")

    def begins(self, step):
        """Whether the states are empty again at this step."""
        return step % self.steps == 0

    def __call__(self, step, part=slice(None)):
        epoch, j = divmod(step, self.steps)
        offset = np.random.default_rng([self.seed, epoch]).integers(self.offsets)
        starts = [offset + (b * self.steps + j) * self.context for b in range(self.batch_size)[part]]
        return torch.from_numpy(np.stack([self.tokens[a:a + self.context + 1] for a in starts]).astype(np.int64))


def detached(state, device):
    """A state without the graph that made it: gradients end at the window's start."""
    if isinstance(state, (list, tuple)):
        return type(state)(detached(part, device) for part in state)
    return state.detach().to(device) if torch.is_tensor(state) else state
