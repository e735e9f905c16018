"""The error of a model's file that cannot be read, and how errors are put on a terminal."""


class FormatError(ValueError):
    """A file of a model that is damaged, contradicts itself or holds what is not supported; the text says which."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


def printable(text: str) -> str:
    """The text on one line, control characters as their escapes: what a file says must not steer the terminal."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
