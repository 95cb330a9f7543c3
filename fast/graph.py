"""Generation as a CUDA graph: all launches of a step recorded once and replayed, for without it they cost more than the work."""
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from .check import WANTED


def record_step(model, token: Tensor, state: list, sample: Callable, choice: tuple) -> Callable[[], Tensor] | None:
    """A step of all layers and the choice of the next token as one CUDA graph: a function that returns the next token [B] and
    moves the state on, in place. The memory never grows, so one recording serves for any number of tokens.

    The arguments are those of `capture_step`. None where a layer keeps more than one tensor, or the step cannot be recorded, for
    which a line on stderr gives the reason.
    """
    if not all(isinstance(h, Tensor) for h in state):
        return None
    # A step changes a memory in place only if it is contiguous; else the graph would replay a frozen one.
    state[:] = [h.contiguous() for h in state]
    token, before = token.clone(), [token.clone(), *(h.clone() for h in state)]
    generators = choice[-1] if isinstance(choice[-1], list) else [choice[-1]] if choice[-1] is not None else []
    randomness = torch.cuda.get_rng_state(token.device), [generator.get_state() for generator in generators]

    def plain():
        logits, _ = model(token, state)
        token.copy_(sample(logits, *choice))
        return logits

    def restore():
        """The trial steps have not happened."""
        for now, then in zip([token, *state], before, strict=True):
            now.copy_(then)
        torch.cuda.set_rng_state(randomness[0], token.device)
        for generator, then in zip(generators, randomness[1], strict=True):
            generator.set_state(then)

    replay = None
    # Autocast's cache of narrow weights would be freed with its context, and the graph would read what comes after them.
    narrow = dict(enabled=torch.is_autocast_enabled("cuda"), dtype=torch.get_autocast_dtype("cuda"))
    tolerance = 0.1 if narrow["enabled"] else 1e-3      # a few roundings of bf16, in each of many layers; a mistake is of size 1
    with torch.autocast("cuda", cache_enabled=False, **narrow):
        for name, make in (("fused step", lambda: fused(model, token, state, sample, choice)),
                           ("CUDA graph for the steps", lambda: plain)):
            if replay:
                break
            try:
                step = make()
                if step is None:
                    continue
                replay = record(step, token, generators)
                if WANTED and step is plain and not same_tokens(plain, replay, token, restore):
                    raise RuntimeError("its first tokens are not those of single steps")
                if WANTED and step is not plain and not same_logits(plain, replay, token, restore, tolerance):
                    raise RuntimeError("its first logits are not those of single steps")
            except Exception as e:                      # Triton's errors are no RuntimeErrors
                replay, why = None, (str(e).strip() or type(e).__name__).splitlines()[0]
                print(f"fmem: no {name}: {why}", file=sys.stderr)
            restore()

    def next_token():
        replay()
        return token.clone()

    next_token.step = step          # the graph reads the weights that a fused step has joined: they have to live as long
    return next_token if replay else None


def record(step: Callable, token: Tensor, generators: list) -> Callable[[], Tensor]:
    """The launches of a step, which draws from the generators, as a graph: a function that replays it and returns its logits."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(token.device)
    for generator in generators:
        graph.register_generator_state(generator)
    side.wait_stream(torch.cuda.current_stream(token.device))
    with torch.cuda.stream(side):
        for _ in range(3):                              # compiles the kernels and sets up the libraries, outside the graph
            step()
    torch.cuda.current_stream(token.device).wait_stream(side)
    with torch.cuda.graph(graph):
        logits = step()

    def replay():
        graph.replay()
        return logits

    return replay


def fused(model, token: Tensor, *arguments) -> Callable[[], Tensor] | None:
    """`fused_step` of decode_gpu.py; None where the Triton kernels do not run or are not trusted."""
    from . import choose
    config = model.config
    if token.is_cuda and choose(config.scan, token.device, config.n_rows, config.d_memory)[0] != "kernel":
        return None
    try:
        from .decode_gpu import fused_step
    except ImportError:
        return None
    return fused_step(model, token, *arguments)


def same_tokens(step: Callable, replay: Callable, token: Tensor, restore: Callable, n: int = 8) -> bool:
    """Whether n calls of each, from where restore() puts them, leave the same tokens in `token`."""
    made = []
    for one in (step, replay):
        restore()
        for _ in range(n):
            one()
            made.append(token.clone())
    return all(map(torch.equal, made[:n], made[n:]))


def same_logits(step: Callable, replay: Callable, token: Tensor, restore: Callable, tolerance: float, n: int = 8) -> bool:
    """Whether n replays have the logits of single steps with the same tokens, to a share of the largest. Their tokens may differ:
    what is computed in another order is rounded in another way, and where two tokens are as likely that decides."""
    restore()
    made = [(token.clone(), step().float().clone()) for _ in range(n)]
    restore()
    for given, want in made:
        token.copy_(given)
        if not (replay().float() - want).abs().max() <= tolerance * want.abs().max():       # NaN is no likeness
            return False
    return True
