"""Texts as they are written: several side by side, whole characters at a time, each up to what ends it."""
import codecs
import time

import torch
import torch.nn.functional as F

from data.tokenizer import encode, token_strings
from fmem import PREFILL, copy_state

END, STOP, LENGTH = "end of text", "stop", "length"     # why a text ended


class Text:
    """What one text has become so far: its tokens, and its characters as far as they are certain.

    seed: of its choices, in a generator of its own, so that it does not depend on the texts beside it. before: what
    Writing.after gave, to continue that text; its last bytes may be the beginning of a character. stops: strings that end it.
    """

    def __init__(self, enc, pieces, device, seed, stops=(), before=None):
        self.enc, self.pieces, self.seed, self.stops = enc, pieces, seed, stops
        self.generator = torch.Generator(device).manual_seed(seed)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")      # holds back a character until it is complete
        if before:
            self.generator.set_state(before["generator"].cpu())
            self.decoder.setstate((bytes(before["held"]), 0))
        self.tokens, self.shown, self.waiting, self.held, self.end = [], "", "", [], None

    def add(self, token):
        """The text's next token -> what is now certain to be part of the text and was not before."""
        self.tokens.append(token)
        if token == self.enc.eot_token:
            self.end = END
            return self.rest()
        self.waiting += self.decoder.decode(self.pieces[token])
        found = [at for at in (self.waiting.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.end = STOP
            return self.show(self.waiting[:min(found)])
        # the end of what is waiting may be the beginning of a stop
        held = max((n for stop in self.stops for n in range(1, min(len(stop), len(self.waiting) + 1))
                    if self.waiting.endswith(stop[:n])), default=0)
        sure, self.waiting = self.waiting[:len(self.waiting) - held], self.waiting[len(self.waiting) - held:]
        return self.show(sure)

    def rest(self):
        """What was held back, when the text has ended."""
        if self.end == STOP:
            return ""
        if self.end is None:
            self.end, self.held = LENGTH, list(self.decoder.getstate()[0])
        waiting, self.waiting = self.waiting, ""
        return self.show(waiting + self.decoder.decode(b"", final=True))

    def show(self, piece):
        self.shown += piece
        return piece


class Writing:
    """Texts that continue a prompt, side by side: iterate over (text, what is new of it), once.

    The prompt is read once. seeds: one for each text; before: what the `after` of an earlier Writing gave; choice: temperature,
    top_k and top_p of FMem.generate. Raises ValueError for choices that cannot work.
    """

    def __init__(self, model, enc, prompt, device, seeds, before=None, stops=(), max_new_tokens=300, **choice):
        self.model, self.most, self.choice, self.device = model, max_new_tokens, choice, device
        self.begin = before["state"] if before else None
        first = before["token"] if before else enc.eot_token        # a text begins where the one before it ended
        self.prompt = [first, *encode(enc, prompt).tolist()]
        self.pieces = token_strings(enc)
        self.texts = [Text(enc, self.pieces, device, seed, stops, before if i == 0 else None) for i, seed in enumerate(seeds)]
        if prompt and before:
            self.texts[0].decoder.reset()
        # says now what is wrong
        self.generate(torch.tensor([[first]] * len(seeds), device=device), self.begin)
        self.held, self.last, self.count, self.seconds = None, None, 0, 0.0

    def generate(self, tokens, state):
        generators = [text.generator for text in self.texts]
        return self.model.generate(tokens, self.most, generator=generators, state=state, **self.choice)

    @torch.no_grad()
    def read(self, tokens, state):
        """The state after tokens, a list, at least one."""
        for some in torch.tensor([tokens], device=self.device).split(PREFILL, 1):
            _, state = self.model.hidden(some, state)
        return state

    def __iter__(self):
        state, n = self.begin, len(self.texts)
        if len(self.prompt) > 1:
            state = self.read(self.prompt[:-1], state)
        if n > 1 and state is not None:
            state = [repeated(layer, n, axis=1 if self.model.config.mixer == "attention" else 0) for layer in state]
        new, start = self.generate(torch.tensor([self.prompt[-1:]] * n, device=self.device), state), None
        while any(text.end is None for text in self.texts):
            try:
                tokens = next(new).tolist()
            except StopIteration as end:
                self.held = end.value                   # of all tokens but the last, which only a text of full length needs
                break
            now = time.perf_counter()
            start = start or now                        # the first token is the prompt's work
            self.seconds = now - start
            for text, token in zip(self.texts, tokens, strict=True):
                if text.end is None:
                    self.count += 1
                    yield text, text.add(token)
        for text in self.texts:
            yield text, text.rest()

    def in_order(self):
        """(text, what to print of it next), one text after the other: the first as it comes, the others when it is their turn."""
        turn = printed = 0
        for _ in self:
            while turn < len(self.texts):
                text = self.texts[turn]
                if printed < len(text.shown):
                    yield text, text.shown[printed:]
                    printed = len(text.shown)
                if text.end is None:
                    break
                turn, printed = turn + 1, 0
                yield text, None

    def after(self):
        """Of a single text, however it ended: its last token, the state before that, and what else continues it."""
        text, = self.texts
        tokens, state = text.tokens, self.held
        if text.end == END:
            state = None                                # the next text has an empty memory
        elif state is None or not tokens:
            whole = [*self.prompt, *tokens]
            state = self.read(whole[:-1], self.begin) if len(whole) > 1 else self.begin
        return {"token": tokens[-1] if tokens else self.prompt[-1], "state": state, "generator": text.generator.get_state(),
                "held": text.held}

    def log_probs(self, text):
        """The log probabilities that the model gave to the text's tokens, whatever temperature, top_k and top_p made of them."""
        whole, state, found, n = [*self.prompt, *text.tokens], self.begin, [], len(text.tokens)
        for some in torch.tensor([whole], device=self.device).unfold(1, 2, 1).split(256, 1):
            with torch.no_grad():
                logits, state = self.model(some[..., 0], state if state is None else copy_state(state))
            found += F.log_softmax(logits.float(), -1).gather(-1, some[..., 1:]).flatten().tolist()
        return found[len(found) - n:]


def repeated(state, n, axis):
    """A layer's state for n texts that continue alike."""
    if isinstance(state, (list, tuple)):
        return type(state)(repeated(part, n, axis) for part in state)
    return state.repeat_interleave(n, axis) if isinstance(state, torch.Tensor) and state.dim() > axis else state
