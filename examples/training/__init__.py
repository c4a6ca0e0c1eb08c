"""What examples/train.py is made of, apart from the training itself."""


class Refused(Exception):
    """What was asked for cannot be done: the message names the option or file, what it was and what it may be."""
