"""The tour: text to a trained looped hybrid in Hugging Face format, on two CPU processes. `make quickstart` runs it.

Every step is a command a user could type; it is printed before it runs.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from loopline.launchers.local import local_command, run_local
from loopline.pretrain.config import load_config


def main(argv: list[str] | None = None) -> int:
    """Run the tour into `--dir`; refuses a folder that already holds one."""
    parser = argparse.ArgumentParser(prog="loopline.launchers.quickstart", description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--corpus", type=Path, default=Path("data/stdlib-bpe4096"))
    parser.add_argument("--steps", type=int, default=None, help="shorter tour: fewer steps than the recipe's")
    args = parser.parse_args(argv)
    if args.dir.exists():
        print(f"{args.dir} exists: remove it to take the tour again, or give another --dir", file=sys.stderr)
        return 2
    export, n_steps = args.dir / "export", args.steps or load_config("quickstart").train.steps

    say("1. a corpus from the Python files every machine has")
    if not (args.corpus / "manifest.json").exists():
        loopline("data", "build", "stdlib", str(args.corpus), "--vocab-size", "4096", "--record-tokens", "16384")
    common = [
        f"run.dir={args.dir}",
        f"data.manifest={args.corpus / 'manifest.json'}",
        f"train.steps={n_steps}",
        f"checkpoint.every={max(1, n_steps // 4)}",
        f"eval.every={max(1, n_steps // 4)}",
    ]
    say("2. train on two pipeline stages, loops as virtual stages, ZeRO 1")
    first = [*common, "parallel.pp=2", "parallel.zero_stage=1", f"train.stop_at_step={n_steps // 2}"]
    launch(first)
    say("3. continue the same run on another layout: two tensor-parallel ranks")
    launch([*common, "parallel.tp=2"])
    say("4. held-out loss with 1, 2, ... loops")
    evaluation = json.loads(loopline("eval", str(args.dir), "--max-loops", "4", "--max-batches", "40"))
    say("5. export to Hugging Face format, logits held to the training model's")
    parity = json.loads(loopline("export", "hf", str(args.dir), str(export)))
    say("6. generate with plain transformers")
    text = plain_transformers(export, "def main(")
    picture = draw_curves(args.dir)

    records = [json.loads(line) for line in (args.dir / "metrics.jsonl").read_text().splitlines()]
    speeds = {layout: records[i]["tokens_per_s"] for layout, i in (("pp=2", n_steps // 4), ("tp=2", n_steps - 2))}
    losses = ", ".join(f"{loss:.3f} ({r + 1})" for r, loss in enumerate(evaluation["loss_by_depth"]))
    say("done")
    print(f"generated            {text!r}")
    print(f"held-out loss        {losses} nats/token, by loops; unigram entropy {evaluation['unigram_entropy']:.3f}")
    print(f"tokens/s             {', '.join(f'{name}: {speed:,.0f}' for name, speed in speeds.items())}")
    print(f"logits difference    {max(parity['max_diff']):.1e} over depths 1..{len(parity['max_diff'])}")
    print(f"checkpoints          {args.dir / 'checkpoints'}")
    print(f"TensorBoard          tensorboard --logdir {args.dir / 'tensorboard'}")
    print(f"loss curve           {picture}")
    print(f"export               {export}")
    return 0


def say(text: str) -> None:
    """A heading."""
    print(f"\n== {text}", flush=True)


def loopline(*arguments: str) -> str:
    """Run one `loopline` command; its standard output.

    Raises:
        SystemExit: it failed; its own message has been printed.
    """
    print("$ loopline", *arguments, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "loopline.pretrain.cli", *arguments], stdout=subprocess.PIPE, text=True
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def launch(overrides: list[str]) -> None:
    """Train on two processes under torchrun.

    Raises:
        SystemExit: the job failed.
    """
    print("$", "torchrun", *local_command("quickstart", overrides, 2)[3:], flush=True)
    status = run_local("quickstart", overrides, 2)
    if status:
        raise SystemExit(status)


def plain_transformers(export: Path, prompt: str) -> str:
    """Generate in a process that imports transformers and nothing of ours."""
    program = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "inputs = tokenizer(sys.argv[2], return_tensors='pt', return_token_type_ids=False)\n"
        "output = model.generate(**inputs, max_new_tokens=48, do_sample=False)\n"
        "assert not any(name.split('.')[0] == 'loopline' for name in sys.modules)\n"
        "sys.stdout.write(tokenizer.decode(output[0], skip_special_tokens=True))\n"
    )
    command = [sys.executable, "-c", program, str(export), prompt]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def draw_curves(run_dir: Path) -> Path:
    """Training and held-out loss as a PNG, from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], label="training", linewidth=1)
    evals = [r for r in records if "loss_per_loop" in r]
    for loop in range(len(evals[0]["loss_per_loop"]) if evals else 0):
        losses = [r["loss_per_loop"][loop] for r in evals]
        axes.plot([r["step"] for r in evals], losses, "o-", label=f"held-out, {loop + 1} loops")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=run_dir.name)
    axes.legend()
    picture = run_dir / "loss.png"
    figure.savefig(picture, dpi=120)
    return picture


if __name__ == "__main__":
    sys.exit(main())
