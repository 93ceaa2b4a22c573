"""The errors users see. Each message names what was found, what was expected and what to change."""

from loopline.models.hf.errors import CheckpointError, ExportError

__all__ = ["CheckpointError", "ConfigError", "ExportError", "NonFiniteError"]


class ConfigError(ValueError):
    """A recipe, an override, or a combination of them that cannot run."""


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not a number."""
