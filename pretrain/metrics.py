"""Where numbers go: metrics.jsonl (every step), TensorBoard, and the console. The main rank alone writes."""

import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# Dense bf16 peaks, without sparsity: the doubled figures on data sheets are for 2:4 sparse matrices.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0, "B200": 2250.0, "L40S": 362.0}


def peak_flops(device: torch.device, given_tflops: float | None) -> float | None:
    """Peak FLOP/s of one device; None where it is not known, and MFU is then not reported."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for key, peak in PEAK_TFLOPS.items() if key in name), None)


def memory_bytes(device: torch.device) -> int:
    """Peak memory: allocated on the device, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MetricsWriter:
    """Writes one record a step. Records past the resumed step are dropped first, so curves never run twice.

    Args:
        run_dir: the run's folder.
        total_steps: end of the progress bar.
        start_step: steps done before this process.
        log_every: steps between console lines and TensorBoard records.
    """

    def __init__(self, run_dir: Path, *, total_steps: int, start_step: int, log_every: int) -> None:
        self.file = run_dir / "metrics.jsonl"
        self.log_every = log_every
        self._drop_after(start_step)
        self.stream = self.file.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=start_step, disable=not self.is_terminal, unit="step")

    def _drop_after(self, step: int) -> None:
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed process
            if record["step"] <= step:
                kept.append(line)
        aside = self.file.with_suffix(".tmp")
        aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(aside, self.file)

    def write(self, record: dict[str, Any]) -> None:
        """Add one step's record; `record["step"]` counts from 1."""
        record = {name: _finite_or_none(value) for name, value in record.items()}
        self.stream.write(json.dumps(record, allow_nan=False) + "\n")
        self.stream.flush()
        step = record["step"]
        self.bar.update(1)
        self.bar.set_postfix_str(f"loss {_shown(record['loss'])} lr {record['lr']:.2e}")
        if step % self.log_every and "loss_per_loop" not in record:
            return
        if not self.is_terminal:
            tqdm.write(_line(record), file=sys.stderr)
        for name, value in record.items():
            if isinstance(value, list):
                for i, item in enumerate(value):
                    if item is not None:
                        self.board.add_scalar(f"{name}/{i + 1}", item, step)
            elif isinstance(value, (int, float)) and name != "step":
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush everything."""
        self.bar.close()
        self.stream.close()
        self.board.close()


def _finite_or_none(value: Any) -> Any:
    """JSON has no NaN; a figure that is not finite is null."""
    if isinstance(value, list):
        return [_finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _line(record: dict[str, Any]) -> str:
    text = (
        f"step {record['step']:>7} | loss {_shown(record['loss'])} | grad norm {_shown(record['grad_norm'])} | "
        f"lr {record['lr']:.2e} | {record['tokens_per_s']:,.0f} tokens/s"
    )
    if record.get("mfu") is not None:
        text += f" | MFU {record['mfu']:.1%}"
    if "loss_per_loop" in record:
        text += " | held-out " + " ".join(map(_shown, record["loss_per_loop"]))
    return text
