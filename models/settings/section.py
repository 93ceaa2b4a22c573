"""Bases of the configuration's sections. Torch-free: a login node reads them."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

FLA_MAX_HEAD = 256  # key channels of a head in fla 0.6.0's delta-rule and attention kernels
TRITON_MAX_HEAD = 256  # channels of a head in our own


class Section(BaseModel):
    """Base of every configuration section: unknown keys are errors, values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class MixerSection(Section):
    """What one kind of token mixer is: its settings, and what they cost. One file a mixer; the maths is its namesake in
    models/mixers.

    FLOPs count a multiply and an add as two, forward only. A linear mixer's recurrence is counted as written, not in
    the chunked form, which does more arithmetic by the kernel's choice.
    """

    name: ClassVar[str]
    backend: str

    def problems(self, d_model: int) -> list[str]:
        """What is wrong beyond single fields, a line each: field, value, rule, fix."""
        return []

    def head_counts(self) -> dict[str, int]:
        """Field -> value of the counts tensor parallelism must divide."""
        raise NotImplementedError

    def parameters(self, d_model: int) -> int:
        """Parameters of one mixer."""
        raise NotImplementedError

    def flops(self, d_model: int, n_tokens: int) -> float:
        """Forward FLOPs a token, averaged over a document of `n_tokens`."""
        raise NotImplementedError

    def cache_numbers(self, d_model: int) -> tuple[int, int]:
        """What decoding keeps for one sequence in one (loop, block): numbers whatever the length, numbers a token."""
        raise NotImplementedError

    def field(self, name: str) -> str:
        """Path of a field in a recipe, for messages."""
        return f"model.{self.name}.{name}"


def mean_keys(n_tokens: int, limit: int) -> float:
    """Mean over a document's queries of min(position + 1, limit): keys a query sees when it sees at most `limit`."""
    limit = min(limit, n_tokens)
    return limit - limit * (limit - 1) / (2 * n_tokens)
