"""The one error of this package that is meant for the person who runs it."""


class DataError(ValueError):
    """Data, a data setting or a data file is wrong. The message says what was found, the rule, and the fix."""

    def __init__(self, message: str) -> None:
        # Names of files and tar members come from anywhere; none of them may steer the terminal.
        super().__init__(printable(message))


def printable(value: object) -> str:
    """`str(value)` with control characters, and bytes of a file name that are not UTF-8, as Python escapes."""
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
