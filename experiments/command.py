"""What the commands of this folder share: their parsers, and how they write what they found."""
import argparse
import sys

from data.messages import one_line
from data.token_files import write_json


def parser(name, description):
    """For `python -m experiments.NAME`. What is wrong with the options is said in one line, and the exit status is 2."""
    p = argparse.ArgumentParser(prog=f"python -m experiments.{name}", description=description, allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"experiments.{name}: error: {one_line(message)}; --help lists the options\n")
    return p


def save(name, path, value):
    """Write a JSON file, if a path is given; exits with one line where that fails."""
    try:
        if path:
            write_json(path, value)
    except OSError as e:
        sys.exit(f"experiments.{name}: error: {one_line(e)}")
