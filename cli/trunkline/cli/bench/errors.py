"""What stops a load run: always something the person at the terminal can act on."""


class LoadError(Exception):
    """The run cannot go on; the text says what was seen and what to try next."""
