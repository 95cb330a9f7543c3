"""What is printed: errors of the data in one line, and nothing that could steer a terminal."""


class DataError(ValueError):
    """Text, tokens or a tokenizer that cannot be used; the message is one line that says what to do."""


def printable(text, keep="\n\t"):
    """Control characters replaced, so that no text, name or message can steer the terminal it is printed on."""
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in text)


def one_line(error):
    """What an exception says, in one line that can be printed."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], "")[:400]
