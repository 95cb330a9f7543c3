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

    def restore():
        """The trial steps have not happened."""
        for now, then in zip([token, *state], before, strict=True):
            now.copy_(then)
        torch.cuda.set_rng_state(randomness[0], token.device)
        for generator, then in zip(generators, randomness[1], strict=True):
            generator.set_state(then)

    graph = None
    # Autocast's cache of narrow weights would be freed with its context, and the graph would read what comes after them.
    narrow = dict(enabled=torch.is_autocast_enabled("cuda"), dtype=torch.get_autocast_dtype("cuda"))
    with torch.autocast("cuda", cache_enabled=False, **narrow):
        for name, step in (("fused step", fused(model, token, state, sample, choice)), ("CUDA graph for the steps", plain)):
            if not step or graph:
                continue
            try:
                graph = record(step, token, generators)
                if WANTED and not same_tokens(plain, graph.replay, token, restore):
                    graph = None
                    raise RuntimeError("its first tokens are not those of single steps")
            except Exception as e:                      # Triton's errors are no RuntimeErrors
                why = (str(e).strip() or type(e).__name__).splitlines()[0]
                print(f"fmem: no {name}: {why}", file=sys.stderr)
            restore()

    def replay():
        graph.replay()
        return token.clone()

    return replay if graph else None


def record(step: Callable, token: Tensor, generators: list) -> torch.cuda.CUDAGraph:
    """The launches of a step, which draws from the generators, as a graph."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(token.device)
    for generator in generators:
        graph.register_generator_state(generator)
    side.wait_stream(torch.cuda.current_stream(token.device))
    with torch.cuda.stream(side):
        for _ in range(3):                              # compiles the kernels and sets up the libraries, outside the graph
            step()
    torch.cuda.current_stream(token.device).wait_stream(side)
    with torch.cuda.graph(graph):
        step()
    return graph


def fused(*arguments) -> Callable[[], None] | None:
    """`fused_step` of decode_gpu.py; None without Triton."""
    try:
        from .decode_gpu import fused_step
    except ImportError:
        return None
    return fused_step(*arguments)


def same_tokens(step: Callable, replay: Callable, token: Tensor, restore: Callable, n: int = 8) -> bool:
    """Whether n calls of each, from where restore() puts them, leave the same tokens in `token`."""
    made = []
    for one in (step, replay):
        restore()
        for _ in range(n):
            one()
            made.append(token.clone())
    return all(map(torch.equal, made[:n], made[n:]))
