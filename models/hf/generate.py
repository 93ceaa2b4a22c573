"""Text from an export, through transformers alone: what `loopline generate` runs."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from loopline.models.hf.errors import CheckpointError
from loopline.models.hf.modeling_loopline import LooplineForCausalLM


def generate_text(
    folder: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    n_loops: int | None = None,
    seed: int = 0,
    device: str | None = None,
) -> str:
    """Continue `prompt` with the model in `folder`. The installed modelling code runs, never the
    copy in the folder.

    Args:
        max_new_tokens: the text ends here if the model does not end it.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        n_loops: passes over the stack; None means what the model was trained with.
        seed: of the sampling. torch's own random state is left as it was.
        device: None means CUDA where there is one.
    Returns:
        The new text, without the prompt.
    Raises:
        CheckpointError: not a folder with a model and a tokenizer.
        ValueError: a setting out of range.
    """
    if temperature < 0 or max_new_tokens < 1 or (n_loops is not None and n_loops < 1):
        raise ValueError(
            f"temperature={temperature} must be >= 0, max_new_tokens={max_new_tokens} and n_loops={n_loops} >= 1"
        )
    for name in ("config.json", "tokenizer.json"):  # transformers would look for a missing one on the Hub
        if not (Path(folder) / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; give an export with a tokenizer")
    model_type = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type != LooplineForCausalLM.config_class.model_type:
        raise CheckpointError(f"{folder} holds a model of type {model_type!r}; give a folder from `loopline export hf`")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LooplineForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model = model.to(torch.device(device))
    # An empty prompt starts from what ends a document, which is what stands before one in training.
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    inputs = torch.tensor([ids], device=device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    loops = {} if n_loops is None else {"n_loops": n_loops}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        output = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens, **sampling, **loops
        )
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
