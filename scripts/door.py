"""The door of a script: the numbers it is given, and what is wrong with them told in one sentence."""

import argparse


def positive(text: str) -> int:
    """A type of argument: a whole number of at least 1."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return int(text)
