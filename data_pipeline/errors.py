"""The one error of this package that is meant for the person who runs it."""


class DataError(ValueError):
    """Data, a data setting or a data file is wrong. The message says what was found, the rule, and the fix."""
