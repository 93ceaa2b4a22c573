"""The errors users see. Each message names what was found, what was expected and what to change."""


class ConfigError(ValueError):
    """A recipe, an override, or a combination of them that cannot run."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, foreign, or belongs to another model."""
