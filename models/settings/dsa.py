"""Settings of DeepSeek sparse attention."""

from typing import ClassVar, Literal

from pydantic import Field

from loopline.kernels.dsa.gather_tiles import MAX_D_HEAD, max_rows
from loopline.models.settings.full import FullAttentionConfig
from loopline.models.settings.section import mean_keys

TRITON_MAX_INDEX_HEAD = 128  # channels of an index head in our kernels


class SparseAttentionConfig(FullAttentionConfig):
    """DeepSeek sparse attention over grouped queries: an indexer picks the keys each query attends to."""

    name: ClassVar[str] = "dsa"

    top_k: int = Field(512, ge=1, description="keys a query attends to")
    index_n_heads: int = Field(4, ge=1, description="heads of the indexer")
    index_d_head: int = Field(64, ge=2, description="head size of the indexer")
    index_d_rope: int = Field(32, ge=0, description="channels of an indexer head that turn with position")
    index_loss: Literal["sparse", "dense"] = Field(
        "sparse",
        description="the indexer learns from attention over the selected keys, or over all keys while attention is "
        "dense (warm-up)",
    )
    index_loss_weight: float = Field(1.0, gt=0, description="factor on the indexer's loss")
    index_loss_rows: int = Field(
        1,
        ge=1,
        description="the indexer learns from one in so many tiles of 64 queries, each counted as often: its loss costs "
        "so much less and is noisier; which tiles depends on block, loop and the row's tokens",
    )
    selection_loops: tuple[int, ...] | None = Field(
        None, strict=False, description="loops that choose keys; the others reuse the last choice; none: every loop"
    )
    selection_tile: int | None = Field(
        None,
        ge=1,
        description="neighbouring tokens that share a choice, made when the first of them is read, and see each other "
        "besides: for rows of 32k tokens and more; none: every query chooses its own keys",
    )
    backend: Literal["auto", "triton", "reference"] = Field("auto", description="kernel")  # type: ignore[assignment]

    def selecting_loop(self, loop_idx: int) -> int:
        """The loop whose choice `loop_idx` uses: itself, or the last one before it that chooses."""
        if self.selection_loops is None:
            return loop_idx
        return max(r for r in self.selection_loops if r <= loop_idx)

    def loops_served(self, loop_idx: int, n_loops: int) -> int:
        """Loops that use the choice of `loop_idx`, of `n_loops`."""
        return sum(self.selecting_loop(r) == loop_idx for r in range(n_loops))

    def problems(self, d_model: int) -> list[str]:
        """Sizes that do not divide, and loops out of order."""
        found = super().problems(d_model)
        if self.index_d_rope > self.index_d_head or self.index_d_rope % 2:
            found.append(
                f"{self.field('index_d_rope')} ({self.index_d_rope}) must be even and at most "
                f"{self.field('index_d_head')} ({self.index_d_head}): rotary positions turn pairs of channels; lower it"
            )
        if self.backend == "triton" and self.index_d_head > TRITON_MAX_INDEX_HEAD:
            found.append(
                f"{self.field('index_d_head')} ({self.index_d_head}) must be at most {TRITON_MAX_INDEX_HEAD} with "
                f"{self.field('backend')} = 'triton', which has no kernel for more: lower it, or set the backend to "
                "'reference'"
            )
        if self.selection_tile is not None and self.backend != "reference":
            n_shared, width = self.n_heads // (self.n_kv_heads or self.n_heads), self.head_size(d_model)
            if width > MAX_D_HEAD:
                found.append(
                    f"{self.field('d_head')} ({width}) must be at most {MAX_D_HEAD} for our kernel of "
                    f"{self.field('selection_tile')}: lower it, or set {self.field('backend')} to 'reference'"
                )
            elif self.selection_tile * n_shared > max_rows(width):
                found.append(
                    f"{self.field('selection_tile')} ({self.selection_tile}) times the {n_shared} query heads of a key "
                    f"head must be at most {max_rows(width)} for heads of {width} channels, what our kernel takes: "
                    f"lower it, or set {self.field('backend')} to 'reference'"
                )
        loops = self.selection_loops
        if loops is not None and (not loops or loops[0] != 0 or list(loops) != sorted(set(loops))):
            found.append(
                f"{self.field('selection_loops')} ({list(loops)}) must rise from 0: the first loop has no earlier "
                "choice to reuse; start with 0"
            )
        return found

    def parameters(self, d_model: int) -> int:
        """Full attention's; index queries, keys and head weights; the index key's norm, with bias."""
        return super().parameters(d_model) + self._index_matrices(d_model) + 2 * self.index_d_head

    def flops(self, d_model: int, n_tokens: int) -> float:
        """Full attention's over the selected keys, and the indexer's scores over all keys (in every loop: the mean over
        loops that reuse a choice is lower)."""
        scores = 2 * self.index_n_heads * (self.index_d_head + 1) * mean_keys(n_tokens, n_tokens)
        attention = 4 * self.n_heads * self.head_size(d_model) * self._keys(n_tokens)
        matrices = super().parameters(d_model) + self._index_matrices(d_model)
        return 2 * matrices + attention + scores

    def cache_numbers(self, d_model: int) -> tuple[int, int]:
        """A key, a value and an index key a token; with choices by tile index queries and head weights too."""
        fixed, per_token = super().cache_numbers(d_model)
        queries = 0 if self.selection_tile is None else self.index_n_heads * (self.index_d_head + 1)
        return fixed, per_token + self.index_d_head + queries

    def _index_matrices(self, d_model: int) -> int:
        return d_model * (self.index_n_heads * self.index_d_head + self.index_d_head + self.index_n_heads)

    def _keys(self, n_tokens: int) -> float:
        if self.index_loss == "dense":
            return mean_keys(n_tokens, n_tokens)
        if self.selection_tile is None:
            return mean_keys(n_tokens, self.top_k)
        firsts = range(0, n_tokens, self.selection_tile)
        sizes = [min(self.selection_tile, n_tokens - first) for first in firsts]
        pairs = sum(n * min(first, self.top_k) + n * (n + 1) / 2 for first, n in zip(firsts, sizes))
        return pairs / n_tokens
