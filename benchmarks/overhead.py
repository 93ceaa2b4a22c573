"""The trainer's tokens/s against a bare torch loop over the same model and batches, in one process, in turn.

    python benchmarks/overhead.py [--recipe quickstart] [--steps 40] [--set a.b=c]

What the trainer adds is data reading, the counts it reduces, gradient-norm clipping by its own code, metrics.jsonl and
TensorBoard. Prints one JSON object; the target is a median step at most 5 % longer than the bare loop's.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from loopline.data_pipeline.batch import Batch
from loopline.models.looped_lm import LoopedLM
from loopline.pretrain import build, corpus
from loopline.pretrain.config import RunConfig, load_config
from loopline.pretrain.loop import Loop
from loopline.pretrain.metrics import MetricsWriter
from loopline.pretrain.optimizer import build_adamw
from loopline.pretrain.parallel.topology import init_topology, pick_device
from loopline.pretrain.train import open_stream

WARM_UP = 3


class BareLoop:
    """What one would write by hand: forward, cross-entropy, backward, clip, AdamW."""

    def __init__(self, config: RunConfig, model: LoopedLM) -> None:
        self.model, self.config = model, config
        self.optimizer = build_adamw(dict(model.named_parameters()), config.optimizer)

    def step(self, batch: Batch) -> float:
        device = next(self.model.parameters()).device
        total = 0.0
        for micro in batch.micro_batches(self.config.train.micro_batch_sequences):
            tokens = torch.from_numpy(micro.tokens).to(device).long()
            labels = torch.from_numpy(micro.labels).to(device).long()
            logits = self.model(tokens, micro.cu_seqlens.tolist())
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") / batch.n_valid
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def build_trainer(config: RunConfig, run_dir: Path) -> tuple[Loop, LoopedLM]:
    device = pick_device(config.train.device, 0)
    topology = init_topology(tp=1, pp=1, n_loops=config.model.n_loops, device=device, needs_groups=False, timeout_s=60)
    manifest = corpus.open_corpus(config, 0)
    run_dir.mkdir(parents=True, exist_ok=True)
    loop = Loop(
        config=config,
        topology=topology,
        stepper=build.build_stepper(config, topology, build.build_model(config, topology)),
        manifest=manifest,
        stream=open_stream(config, manifest, 0, 1, None),
        writer=MetricsWriter(run_dir, total_steps=config.train.steps, start_step=0, log_every=config.log.every),
        data_id="",
        step=0,
        updates=0,
        tokens=0,
    )
    return loop, build.build_model(config, topology)


def timed(work) -> float:  # type: ignore[no-untyped-def]
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c")
    args = parser.parse_args()
    n_steps = args.steps + WARM_UP
    fixed = [f"train.steps={n_steps}", "checkpoint.every=0", "eval.every=0", "run.dir=unused"]
    config = load_config(args.recipe, [*args.overrides, *fixed])
    with tempfile.TemporaryDirectory() as folder:
        loop, model = build_trainer(config, Path(folder))
        bare = BareLoop(config, model)
        bare_stream = open_stream(config, loop.manifest, 0, 1, None)
        trainer_s, bare_s = [], []
        for _ in range(n_steps):
            batch = next(bare_stream)
            trainer_s.append(timed(loop.advance))
            bare_s.append(timed(lambda batch=batch: bare.step(batch)))
        assert loop.writer is not None
        loop.writer.close()
    trainer_s, bare_s = trainer_s[WARM_UP:], bare_s[WARM_UP:]
    tokens = config.train.global_batch_sequences * config.train.seq_len
    ratios = [a / b for a, b in zip(trainer_s, bare_s, strict=True)]
    report = {
        "recipe": args.recipe,
        "steps": args.steps,
        "trainer_tokens_per_s": tokens / statistics.median(trainer_s),
        "bare_tokens_per_s": tokens / statistics.median(bare_s),
        "median_ratio_of_step_times": statistics.median(ratios),
        "target": "ratio <= 1.05",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
