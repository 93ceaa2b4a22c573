"""What a model is, as strict frozen data. Torch-free: a login node reads it.

Each mixer's settings stand in settings/, one file a mixer; its maths stands in mixers/.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from loopline.models.loop_plan import LoopPlan
from loopline.models.settings.deltanet import DeltaNetConfig
from loopline.models.settings.dsa import SparseAttentionConfig
from loopline.models.settings.full import FullAttentionConfig
from loopline.models.settings.gdn import GatedDeltaConfig
from loopline.models.settings.gla import GatedLinearConfig
from loopline.models.settings.hgrn2 import HGRN2Config
from loopline.models.settings.kda import KimiDeltaConfig
from loopline.models.settings.mamba2 import Mamba2Config
from loopline.models.settings.nsa import NativeSparseConfig
from loopline.models.settings.retnet import RetentionConfig
from loopline.models.settings.section import MixerSection, Section
from loopline.models.settings.window import WindowAttentionConfig

# The names a pattern may use. Each is a field of ModelConfig with the mixer's settings.
MIXERS: dict[str, type[MixerSection]] = {
    section.name: section
    for section in (
        FullAttentionConfig,
        WindowAttentionConfig,
        GatedDeltaConfig,
        KimiDeltaConfig,
        DeltaNetConfig,
        Mamba2Config,
        GatedLinearConfig,
        HGRN2Config,
        RetentionConfig,
        NativeSparseConfig,
        SparseAttentionConfig,
    )
}


class ModelConfig(Section):
    """A looped language model: `n_blocks` stored blocks, applied `n_loops` times."""

    vocab_size: int = Field(4096, ge=2, description="rows of the embedding")
    d_model: int = Field(64, ge=2, description="width of the residual stream")
    n_blocks: int = Field(2, ge=1, description="stored blocks")
    n_loops: int = Field(2, ge=1, description="times the stack is applied")
    pattern: str | Annotated[tuple[str, ...], Field(strict=False)] = Field(
        "full",
        description="mixers of the blocks: 'gdn*4,full' (repeated to n_blocks), 'full,gdn...,full' (the dots fill), "
        "or a list with a name for every block",
    )
    d_ffn: int = Field(176, ge=1, description="inner width of the SwiGLU")
    norm: Literal["pre", "sandwich"] = Field("pre", description="norm before each branch, or before and after")
    norm_eps: float = Field(1e-6, gt=0)
    update: Literal["replace", "norm", "gate"] = Field(
        "gate",
        description="between loops: h <- M(h); h <- final_norm(M(h)) (Ouro); h <- M(h) + rho_r * h (LT2)",
    )
    tie_embeddings: bool = Field(False, description="the head uses the embedding's weights")
    exit_gate: bool = Field(
        False,
        description="a linear from the state after each loop to the logit of stopping there (Ouro); kept as it is",
    )
    full: FullAttentionConfig = FullAttentionConfig()
    window: WindowAttentionConfig = WindowAttentionConfig()
    gdn: GatedDeltaConfig = GatedDeltaConfig()
    kda: KimiDeltaConfig = KimiDeltaConfig()
    deltanet: DeltaNetConfig = DeltaNetConfig()
    mamba2: Mamba2Config = Mamba2Config()
    gla: GatedLinearConfig = GatedLinearConfig()
    hgrn2: HGRN2Config = HGRN2Config()
    retnet: RetentionConfig = RetentionConfig()
    nsa: NativeSparseConfig = NativeSparseConfig()
    dsa: SparseAttentionConfig = SparseAttentionConfig()

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        parse_pattern(self.pattern, self.n_blocks)
        problems = [problem for section in self.sections.values() for problem in section.problems(self.d_model)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def mixer_names(self) -> list[str]:
        """Mixer of each stored block."""
        return parse_pattern(self.pattern, self.n_blocks)

    @property
    def sections(self) -> dict[str, MixerSection]:
        """Settings of the mixers this model has, by name."""
        return {name: getattr(self, name) for name in dict.fromkeys(self.mixer_names)}

    @property
    def plan(self) -> LoopPlan:
        """Order in which blocks run."""
        return LoopPlan(self.n_blocks, self.n_loops)


def parse_pattern(pattern: str | tuple[str, ...], n_blocks: int) -> list[str]:
    """The mixer of each of `n_blocks` blocks.

    Args:
        pattern: 'gdn*4,full', repeated and cut to n_blocks; or 'full*2,gdn...,full*2', where the one item with dots is
            repeated to fill; or a name for every block.
    Raises:
        ValueError: an unknown mixer, a bad count, or a number of blocks that does not fit.
    """
    if not isinstance(pattern, str):
        if len(pattern) != n_blocks:
            raise ValueError(
                f"model.pattern lists {len(pattern)} mixers and model.n_blocks is {n_blocks}: make them agree"
            )
        return [_known(name, pattern) for name in pattern]
    before: list[str] = []
    fill: str | None = None
    after: list[str] = []
    for item in pattern.split(","):
        name, has_count, count = item.strip().partition("*")
        if name.endswith("..."):
            if fill is not None or has_count:
                raise ValueError(f"model.pattern {pattern!r}: one item may end in '...', and it takes no count")
            fill = _known(name.removesuffix("..."), pattern)
            continue
        if has_count and not (count.isascii() and count.isdigit() and int(count) >= 1):
            raise ValueError(f"model.pattern {pattern!r}: count {count!r} must be a whole number >= 1")
        (before if fill is None else after).extend([_known(name, pattern)] * int(count or 1))
    if fill is None:
        return [before[i % len(before)] for i in range(n_blocks)]
    n_fill = n_blocks - len(before) - len(after)
    if n_fill < 0:
        raise ValueError(
            f"model.pattern {pattern!r} names {n_blocks - n_fill} blocks beside '...' and model.n_blocks is "
            f"{n_blocks}: raise n_blocks or name fewer"
        )
    return before + [fill] * n_fill + after


def _known(name: str, pattern: str | tuple[str, ...]) -> str:
    if name not in MIXERS:
        raise ValueError(f"model.pattern {pattern!r}: unknown mixer {name!r}; known: {', '.join(MIXERS)}")
    return name
