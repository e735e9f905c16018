"""The error of a model's file that cannot be read."""


class FormatError(ValueError):
    """A file of a model that is damaged, contradicts itself or holds what is not supported; the text says which."""
