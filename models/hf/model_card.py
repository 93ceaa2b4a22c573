"""The README.md an export carries: what the model is, how to load it, what was checked, what it cannot do."""

from loopline.models.config import ModelConfig
from loopline.models.flops import model_parameters
from loopline.models.hf.parity import ParityReport

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- loopline
- looped-transformer
- custom_code
---

# {name}

A looped language model: {n_blocks} stored blocks applied {n_loops} times, {n_parameters:,} parameters
(width {d_model}, vocabulary {vocab_size:,}). Mixers: `{pattern}`. Trained with Loopline.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True, dtype="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

- `n_loops=` in `model(...)` and `model.generate(...)` sets how often the stack is applied; past {n_loops} is
  extrapolation.
- `model(..., output_depth_logits=True).depth_logits` holds the logits after each loop.
- `trust_remote_code=True` runs `modeling_loopline.py` from this folder and the files it imports; they need torch and
  transformers only.
- Pad batches on the left. Rows that pack several documents are taken by full and window attention alone.
- Linear mixers use flash-linear-attention's kernels on CUDA where that package is installed.

Checked at export, in fp32, against the training model: logits (up to {max_logit:.1f}) within {max_diff:.1e} after
each of 1 to {n_checked} loops, and within {max_diff_cached:.1e} decoding from the cache. Weights are stored in {dtype}.
"""


def model_card(config: ModelConfig, report: ParityReport, name: str) -> str:
    """Text of README.md for an export called `name`."""
    return CARD.format(
        name=name,
        n_parameters=model_parameters(config),
        max_logit=report.max_logit,
        max_diff=max(report.max_diff),
        max_diff_cached=report.max_diff_cached,
        n_checked=len(report.max_diff),
        dtype=report.dtype,
        **config.model_dump(include={"n_blocks", "n_loops", "d_model", "vocab_size", "pattern"}),
    )
