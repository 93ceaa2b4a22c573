"""The documentation is true: commands run, links, names and tables match the code, the tour prints what it says.

A fenced block of README.md after `<!-- test -->` is run, in order, in one temporary folder; the one after
`<!-- multi-node -->` is parsed, and run shrunk as two torchrun agents of this machine.
"""

import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from loopline.models.config import MIXERS
from loopline.models.mixers.registry import MIXER_MODULES
from loopline.models.settings.section import Section
from loopline.pretrain.config import RunConfig, load_config, recipe_names
from tests.tolerances import TOLERANCES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in ("runs", "data", "build") for part in path.relative_to(ROOT).parts)
)
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
FIXED_NAMES = {
    "run": ["dir", "seed"],
    "train": ["steps", "seq_len", "global_batch_sequences", "micro_batch_sequences"],
    "parallel": ["tp", "pp", "sequence_parallel", "zero_stage", "recompute"],
    "model": ["n_loops", "n_blocks", "pattern"],
    "data": ["manifest"],
    "checkpoint": ["every"],
}


def marked_commands(mark: str) -> list[str]:
    """Commands of the bash blocks that follow `<!-- mark -->`, continued lines joined."""
    blocks = re.findall(rf"<!-- {mark} -->\n```bash\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


COMMANDS = marked_commands("test")
(MULTI_NODE,) = marked_commands("multi-node")


def environment() -> dict[str, str]:
    """As with .venv activated; offline and one thread a process, as the rest of the tests."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


# Commands.


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def ran(workdir: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """Every marked command, run in order up to the first that fails."""
    done: dict[str, subprocess.CompletedProcess[str]] = {}
    for command in COMMANDS:
        done[command] = subprocess.run(
            shlex.split(command), cwd=workdir, env=environment(), capture_output=True, text=True, timeout=120
        )
        if done[command].returncode:
            break
    return done


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_readme_runs(command, ran):
    assert command in ran, "an earlier command failed"
    assert ran[command].returncode == 0, ran[command].stderr
    assert "Traceback" not in ran[command].stderr


@pytest.mark.slow
def test_the_run_by_hand_goes_on_over_the_layout_change(ran, workdir):
    records = [json.loads(line) for line in (workdir / "runs/first/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 11))
    logs = [file.read_text() for file in sorted((workdir / "runs/first/logs").glob("rank_*.log"))]
    assert len(logs) == 2
    assert "layout: tp 1 pp 1 dp 1" in logs[0]
    assert "layout: tp 2 pp 1 dp 1" in logs[0]


@pytest.mark.slow
def test_a_run_directory_holds_what_the_table_lists(ran, workdir):
    (table,) = re.findall(r"## The run directory\n\n(.*?)\n\n", README, re.DOTALL)
    paths = re.findall(r"`([^`]+)`", "".join(line.split("|")[1] for line in table.splitlines()[2:]))
    for path in paths:
        assert list((workdir / "runs/first").glob(path)), path
    listed = {path.split("/")[0] for path in paths}
    assert {path.name for path in (workdir / "runs/first").iterdir()} == listed


def test_every_bash_block_is_run_or_known():
    blocks = re.findall(r"^([^\n]*)\n```bash\n(.*?)```", README, re.DOTALL | re.MULTILINE)
    untested = [text for before, text in blocks if not before.endswith("-->")]
    assert len(blocks) >= 6
    assert all(line.startswith(("make ", ".venv/bin/pip ")) for text in untested for line in text.splitlines())


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z]+)", README))))
def test_make_target_exists(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_multi_node_command_parses_down_to_its_config():
    from torch.distributed.run import get_args_parser

    arguments = shlex.split(MULTI_NODE)
    assert arguments.pop(0) == "torchrun"
    parsed = get_args_parser().parse_args(arguments)
    assert parsed.module
    assert parsed.training_script == "loopline.pretrain.train"
    world_size = int(parsed.nnodes) * int(parsed.nproc_per_node)
    recipe, *rest = parsed.training_script_args
    assert set(rest[::2]) == {"--set"}
    load_config(recipe, rest[1::2]).validate_for(world_size)
    (planned,) = [command for command in COMMANDS if f"--world-size {world_size}" in command]
    assert set(re.findall(r"--set (parallel\S+|train\S+)", MULTI_NODE)) == set(re.findall(r"--set (\S+)", planned))


@pytest.mark.slow
def test_multi_node_command_trains_as_two_agents_of_one_machine(data, cache_dir, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    text = MULTI_NODE.replace("node0:29500", f"127.0.0.1:{port}").replace("--nproc-per-node=8", "--nproc-per-node=1")
    text = text.replace("/shared/data", str(cache_dir / "stdlib-bpe4096")).replace("/shared", str(tmp_path))
    smaller = ["parallel.tp=1", "parallel.sequence_parallel=false", "optimizer.warmup_steps=0"]
    smaller += ["train.steps=2", "train.seq_len=32", "train.global_batch_sequences=8", "train.micro_batch_sequences=2"]
    agents = [
        subprocess.Popen(
            shlex.split(text.replace("--node-rank=0", f"--node-rank={rank}"))
            + [x for override in smaller for x in ("--set", override)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    assert json.loads((tmp_path / "runs/first/environment.json").read_text())["world_size"] == 2
    assert len((tmp_path / "runs/first/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_the_tour_prints_what_the_readme_shows(tmp_path):
    """The whole quickstart: what it prints, and that the model learnt more than token frequencies, loops helping."""
    tour, corpus = tmp_path / "tour", tmp_path / "corpus"
    n_steps = load_config("quickstart").train.steps
    command = [sys.executable, "-m", "loopline.launchers.quickstart", "--dir", str(tour), "--corpus", str(corpus)]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    end = done.stdout[done.stdout.index("== done") :]
    shown = re.search(r"```text\n(held-out loss.*?)```", README, re.DOTALL)
    assert shown is not None
    labels = [line[:20].rstrip() for line in shown[1].splitlines()]
    printed = {line[:20].rstrip(): line[21:] for line in end.splitlines() if line[:20].strip()}
    assert set(labels) <= set(printed)

    by_depth = [float(x) for x in re.findall(r"([\d.]+) \(\d\)", printed["held-out loss"])]
    assert len(by_depth) == 4
    assert all(math.isfinite(loss) and loss > 0 for loss in by_depth)
    # The stated bound: half a nat under what a model of token frequencies reaches; and the trained depth, three loops,
    # beats one.
    unigram = float(printed["held-out loss"].rsplit(" ", 1)[1])
    assert by_depth[2] < unigram - 0.5
    assert by_depth[2] < by_depth[0]
    assert float(printed["logits difference"].split()[0]) <= 1e-5
    assert Path(printed["loss curve"]).read_bytes().startswith(b"\x89PNG")
    assert list(Path(printed["checkpoints"]).glob("step_*"))
    assert list(Path(printed["TensorBoard"].split()[-1]).glob("events.*"))

    records = [json.loads(line) for line in (tour / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, n_steps + 1))
    losses = [record["loss"] for record in records]
    assert max(losses[-3:]) < min(losses[:3]) - 0.2
    log = (tour / "logs/rank_00000.log").read_text()
    assert log.index("layout: tp 1 pp 2 dp 1") < log.index("layout: tp 2 pp 1 dp 1")
    assert f"continuing from {tour}/checkpoints/step_{n_steps // 2:08d} at step {n_steps // 2}" in log

    # In a process of its own: transformers keeps the code of the first export it loads for the life of a process.
    program = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert sum(p.numel() for p in model.parameters()) > 1e6\n"
    )
    load = [sys.executable, "-c", program, printed["export"]]
    loaded = subprocess.run(load, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert loaded.returncode == 0, loaded.stderr


# Names, links and tables.


def has_field(path: str) -> bool:
    kind: type = RunConfig
    for part in path.split("."):
        if not (isinstance(kind, type) and issubclass(kind, Section) and part in kind.model_fields):
            return False
        kind = kind.model_fields[part].annotation  # type: ignore[assignment]
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_setting_named_in_a_page_exists(page):
    text = page.read_text(encoding="utf-8")
    sections = "|".join(RunConfig.model_fields)
    spans = re.findall(rf"`((?:{sections})\.[a-z_.]+)(?:[ =][^`]*)?`", text)
    named = {name for name in spans if not name.endswith((".py", ".md", ".toml", ".pt"))}
    named |= set(re.findall(r"--set ([a-z_.]+)=", text)) - {"a.b"}
    assert not [name for name in sorted(named) if not has_field(name)]


def test_the_readme_lists_the_fixed_names():
    names = [f"{section}.{field}" for section, fields in FIXED_NAMES.items() for field in fields]
    assert not [name for name in names if f"`{name}`" not in README or not has_field(name)]


def recipe_rows() -> dict[str, str]:
    """Row of every recipe: a cell may name several, and stand for families by a word in capitals."""
    (table,) = re.findall(r"\| recipe \|.*?\n\n", README, re.DOTALL)
    rows = {}
    for row in table.strip().splitlines()[2:]:
        for name in re.findall(r"`([^`]+)`", row.split("|")[1]):
            family = {
                "MIXER": [mixer for mixer in MIXERS if mixer not in ("full", "gdn")],
                "VARIANT": re.findall(r"`([^`]+)`", row.split("|")[2]),
            }
            (word,) = [word for word in family if word in name] or [""]
            rows |= {name.replace(word, value): row for value in family[word]} if word else {name: row}
    return rows


def test_the_readme_lists_every_recipe_as_it_is():
    rows = recipe_rows()
    assert sorted([*rows, "lt2_600m", "lt2_1b"]) == recipe_names()  # those two are what their variants share
    for name in ("debug", "quickstart"):
        config = load_config(name)
        model = config.model
        expected = f"{model.n_blocks} blocks (`{model.pattern}`), {model.n_loops} loops, d_model {model.d_model}"
        assert expected in rows[name]
        assert f"`{config.run.dir}`" in rows[name]
    assert all(load_config(name).run.dir == f"runs/{name}" for name in rows)


def test_every_recipe_a_command_names_exists():
    pattern = r"(?:loopline train|loopline plan|loopline\.pretrain\.train|loopline\.launchers\.local) ([a-z]+)"
    named = {name for page in PAGES for name in re.findall(pattern, page.read_text(encoding="utf-8"))}
    assert named
    assert named <= set(recipe_names())


def test_the_readme_lists_every_mixer():
    (table,) = re.findall(r"\| name \| mixer \|.*?\n\n", README, re.DOTALL)
    assert [row.split("|")[1].strip(" `") for row in table.strip().splitlines()[2:]] == list(MIXERS)


def test_the_costs_of_mixers_in_the_documentation_are_those_of_the_formulas():
    text = (ROOT / "docs/mixers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d,]+) \| ([\d,]+) \|", text, re.MULTILINE)
    assert [row[0] for row in rows] == list(MIXERS)
    model = load_config("lt2_1b").model
    sizes = {name: getattr(model, name) for name in MIXERS} | {
        "gla": MIXERS["gla"](n_heads=16, d_head_k=64, d_head_v=128)
    }
    for name, parameters, short, long, fixed, per_token in rows:
        section, d = sizes[name], model.d_model
        assert parameters == f"{section.parameters(d) / 1e6:.1f}", name
        assert (short, long) == tuple(f"{section.flops(d, n) / 1e6:.1f}" for n in (4096, 65536)), name
        assert (fixed, per_token) == tuple(f"{n:,}" for n in section.cache_numbers(d)), name


def test_the_backends_of_mixers_in_the_readme_are_those_of_their_ops():
    (table,) = re.findall(r"\| name \| mixer \|.*?\n\n", README, re.DOTALL)
    for row in table.strip().splitlines()[2:]:
        cells = row.split("|")
        assert re.findall(r"`(\w+)`", cells[-2]) == list(MIXER_MODULES[cells[1].strip(" `")].backends)


def test_the_tolerances_in_the_documentation_are_those_of_the_tests():
    text = (ROOT / "docs/numerics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (fp32|bf16) \| `(\w+)` \| ([\d.e-]+) \|", text, re.MULTILINE)
    assert {(dtype, kind): float(value) for dtype, kind, value in rows} == TOLERANCES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_named_in_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    prose = FENCE.sub("", text)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]+)?\)", prose):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        linked = page if not target else (page.parent / target)
        assert linked.exists(), target
        if anchor:
            assert anchor[1:] in headings(linked.read_text(encoding="utf-8")), anchor
    packages = "benchmarks|data_pipeline|docs|kernels|launchers|models|pretrain|tests"
    for path in re.findall(rf"`((?:{packages})/[\w/.-]+\.(?:py|md|toml))(?:::\w+)?`", prose):
        assert (ROOT / path).exists(), path


def headings(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_ascii(page):
    assert page.read_text(encoding="utf-8").isascii()
