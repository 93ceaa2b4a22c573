"""The one exception kernels raise when the backend asked for is not there."""


class BackendError(ValueError):
    """A backend is unknown or not installed; the message lists those that are."""
