"""The errors of exporting and importing; the message says what was found, what was expected and what to change."""


class ExportError(ValueError):
    """An export cannot be written, or does not compute what the training model computes."""


class CheckpointError(ValueError):
    """A Hugging Face folder is damaged, foreign, or belongs to another model."""
