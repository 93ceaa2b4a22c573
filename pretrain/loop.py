"""The outer loop: step, check, log, evaluate, save, until the last step or a request to stop."""

import faulthandler
import logging
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopline.data_pipeline.batch import Batch
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.stream import GlobalBatchStream, heldout_batches
from loopline.models.flops import train_flops
from loopline.pretrain.checkpoint import RunState, save
from loopline.pretrain.config import RunConfig
from loopline.pretrain.errors import NonFiniteError
from loopline.pretrain.metrics import MetricsWriter, memory_bytes, peak_flops
from loopline.pretrain.optimizer import learning_rate
from loopline.pretrain.parallel.topology import Topology
from loopline.pretrain.step import Stepper, StepResult

log = logging.getLogger(__name__)


@dataclass
class Loop:
    """A run in progress.

    Attributes:
        step, updates, tokens: done so far, earlier processes included; a skipped step is no update.
        writer: metrics; None on all ranks but the main one.
    """

    config: RunConfig
    topology: Topology
    stepper: Stepper
    manifest: Manifest
    stream: GlobalBatchStream
    writer: MetricsWriter | None
    data_id: str
    step: int
    updates: int
    tokens: int
    saved_step: int | None = None
    skipped_in_a_row: int = 0

    def run(self) -> None:
        """Train to the end, or until asked to stop; leave a checkpoint of the last step."""
        signals = StopSignals()
        if self.step >= self.last_step:
            log.info("nothing to do: step %d of %d is done", self.step, self.last_step)
        try:
            while self.step < self.last_step:
                faulthandler.dump_traceback_later(self.config.train.hang_timeout_s, exit=True)
                if self.advance(signals.received):
                    log.info("asked to stop: saving at step %d", self.step)
                    break
            if self.saved_step != self.step:
                self.save()
        finally:
            faulthandler.cancel_dump_traceback_later()
            signals.restore()
            self.stream.close()
            if self.writer:
                self.writer.close()

    def advance(self, wants_stop: bool = False) -> bool:
        """One step and what follows it: step, health, log, evaluate, save. Returns whether any rank asked to stop."""
        started = time.monotonic()
        lr = learning_rate(self.step, self.config.train.steps, self.config.optimizer)
        batch = next(self.stream)
        result = self.stepper.train(batch, lr, wants_stop)
        self.step += 1
        self.updates += result.is_finite
        self.tokens += result.n_valid if result.is_finite else 0
        record = self.record(result, lr, time.monotonic() - started) | self.data_figures(batch)
        if self.is_due(self.config.eval.every):
            record |= self.evaluate()
        if self.writer:
            self.writer.write(record)
        self.check_finite(result)
        if self.is_due(self.config.checkpoint.every):
            self.save()
        return result.stop

    @property
    def last_step(self) -> int:
        """Where this process stops."""
        return self.config.train.stop_at_step or self.config.train.steps

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now; the last step counts unless it is off."""
        return every > 0 and (self.step % every == 0 or self.step == self.last_step)

    def check_finite(self, result: StepResult) -> None:
        """The policy for a non-finite step: nothing is updated; too many in a row end the run. All ranks see the same
        numbers, so all decide alike."""
        if result.is_finite:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        log.warning("step %d skipped: loss %s, gradient norm %s", self.step, result.loss, result.grad_norm)
        if self.skipped_in_a_row > self.config.train.max_skipped_steps:
            raise NonFiniteError(
                f"step {self.step}: loss {result.loss}, gradient norm {result.grad_norm}; "
                f"{self.skipped_in_a_row} in a row is more than train.max_skipped_steps = "
                f"{self.config.train.max_skipped_steps}. Lower optimizer.lr, or raise train.max_skipped_steps; if the "
                "run fails again at once, the newest checkpoint holds the cause: remove it, to continue from the one "
                "before"
            )

    def record(self, result: StepResult, lr: float, seconds: float) -> dict[str, Any]:
        """One step's metrics."""
        tokens_per_step = self.config.train.global_batch_sequences * self.config.train.seq_len
        peak = peak_flops(self.topology.device, self.config.log.peak_tflops)
        tokens_per_s = tokens_per_step / seconds
        flops = train_flops(self.config.model, self.config.train.seq_len) * tokens_per_s
        return {
            "step": self.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens": self.tokens,
            "tokens_per_s": tokens_per_s,
            "mfu": None if peak is None else flops / (peak * self.topology.world_size),
            "step_time_s": seconds,
            "memory_bytes": memory_bytes(self.topology.device),
            "skipped": not result.is_finite,
            "epoch": self.stream.epoch,
            **result.figures,
        }

    def data_figures(self, batch: Batch) -> dict[str, float]:
        """Shares of padding and of each source, over all ranks; a plain stream has none and costs nothing."""
        figures = self.stream.figures(batch)
        if not figures:
            return {}
        totals = self.topology.all_reduce([float(x) for pair in figures.values() for x in pair])
        return {name: n / max(1.0, d) for name, n, d in zip(figures, totals[::2], totals[1::2])}

    def evaluate(self) -> dict[str, Any]:
        """Held-out loss after each loop."""
        batches = heldout_batches(
            self.manifest,
            seq_len=self.config.train.seq_len,
            batch_sequences=self.config.train.global_batch_sequences,
            max_batches=self.config.eval.batches,
            dp_rank=self.topology.dp_rank,
            dp_size=self.topology.dp,
        )
        figures = self.stepper.evaluate(list(batches))
        return {"loss_per_loop": figures.loss, "state_change_per_loop": figures.state_change, **figures.figures}

    def save(self) -> None:
        """Checkpoint this step."""
        state = RunState(
            step=self.step,
            updates=self.updates,
            tokens=self.tokens,
            lanes=self.topology.gather({str(k): v for k, v in self.stream.state_dict().items()}),
            data=self.data_id,
            config=self.config.model_dump(mode="json"),
        )
        folder = Path(self.config.run.dir) / "checkpoints"
        path = save(folder, state, self.stepper, self.config.checkpoint.keep)
        self.saved_step = self.step
        log.info("saved %s", path)


class StopSignals:
    """Remembers SIGTERM, SIGHUP and SIGINT, so that the loop can finish its step, save and exit.

    Schedulers signal both torchrun and its workers, and torchrun passes the signal on, so a worker gets it twice: only
    a second SIGINT, somebody at the keyboard, ends at once.
    """

    def __init__(self) -> None:
        self.received = False
        self._old = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
        for number in self._old:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            self.restore()
            sys.exit(128 + number)
        self.received = True

    def restore(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
