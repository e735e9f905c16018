"""The error of a model's file that cannot be read."""


class FormatError(ValueError):
    """A model's file is damaged, contradicts itself or holds what this project does not support; the text says which."""
