"""python sample.py --interactive: a line is read, the text continues from it, and the memory carries on to the next line."""
import contextlib
import sys
from pathlib import Path

from data.messages import one_line, printable
from sampling.text_state import load_state, save_state
from sampling.texts import END, Writing

HELP = """A line continues the text, an empty one lets it run on; Ctrl-C stops an answer, Ctrl-D ends.
/reset         forget everything: an empty memory      /save FILE   keep the memory    /load FILE   continue from there
/temp 0.7      temperature, 0 for the likeliest token  /tokens 100  most tokens of an answer
//...          a line that begins with /               /help        this               /quit        end"""


class Conversation:
    """The text so far, of which only the model's state is kept: a turn costs the same after any number of others."""

    def __init__(self, model, enc, device, seed, before=None, stops=(), **choice):
        self.model, self.enc, self.device, self.seed, self.stops, self.choice = model, enc, device, seed, stops, choice
        self.before, self.fresh = before, True              # fresh: the text is at the beginning of a line

    def turn(self, line):
        """Continue with the line and print what follows. Ctrl-C ends the answer, not the conversation."""
        text = ("" if self.fresh or not line else "\n") + (line + "\n" if line else "")
        writing = Writing(self.model, self.enc, text, self.device, [self.seed], self.before, self.stops, **self.choice)
        try:
            for _, piece in writing:
                print(printable(piece), end="", flush=True)
        except KeyboardInterrupt:
            pass
        answer, = writing.texts
        print("" if answer.shown.endswith("\n") else "\n", end="", flush=True)
        if answer.end == END:
            print("(the text has ended; the next begins with an empty memory)", flush=True)
        self.fresh = answer.end == END or (answer.shown or text or "\n").endswith("\n")
        self.before = writing.after()

    def command(self, words):
        """A line that begins with /. Returns whether there are more. Raises ValueError, OSError."""
        name, _, rest = words.partition(" ")
        rest = rest.strip()
        if name in ("/save", "/load") and not rest:
            raise ValueError(f"{name} needs the name of a file")
        if name == "/reset":
            self.before, self.fresh = None, True
            print("(an empty memory)", flush=True)
        elif name == "/save":
            if self.before is None:
                raise ValueError("there is no text yet")
            save_state(self.before, Path(rest), self.model)
            print(f"(saved; /load {printable(rest, '')} continues from here)", flush=True)
        elif name == "/load":
            self.before, self.fresh = load_state(Path(rest), self.model, self.device), False
        elif name in ("/temp", "/tokens"):
            key, kind = ("temperature", float) if name == "/temp" else ("max_new_tokens", int)
            try:
                choice = {**self.choice, key: kind(rest)}
            except ValueError:
                raise ValueError(f"{name} needs a number, not {rest[:40]}") from None
            Writing(self.model, self.enc, "", self.device, [self.seed], None, **choice)     # raises if it cannot work
            self.choice = choice
        elif name == "/help":
            print(HELP, flush=True)
        elif name != "/quit":
            raise ValueError(f"there is no {name[:40]}; /help lists what there is")
        return name != "/quit"

    def run(self, prompt=""):
        """Continue the prompt, if there is one; then read lines until there are no more."""
        terminal = sys.stdin.isatty()
        if terminal:
            with contextlib.suppress(ImportError):          # it is not on Windows
                import readline  # noqa: F401 (input() then edits lines and remembers them)
            print("/help says what can be done", file=sys.stderr, flush=True)
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        while True:
            try:
                line, prompt = prompt or input("> " if terminal else ""), ""
            except EOFError:
                return
            except KeyboardInterrupt:
                print(flush=True)
                continue
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if not self.command(line):
                        return
                else:
                    self.turn(line[1:] if line.startswith("//") else line)
            except BrokenPipeError:
                raise
            except (ValueError, OSError, RuntimeError) as e:
                print(f"sample.py: {one_line(e)}", file=sys.stderr, flush=True)
