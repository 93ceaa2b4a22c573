"""One source, one result: with any number of workers, after any kill, with a full disk in between."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loopline.data_pipeline.build import build
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.jsonl_source import JsonlSource
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.sources import FileSource
from loopline.data_pipeline.tokenizer import TokenizerFile
from loopline.data_pipeline.workers import _serve as serve

SETTINGS = {"vocab_size": 300, "heldout_fraction": 0.15, "record_tokens": 3000, "shard_bytes": 50_000}
# A build in a process of its own; `SLOW_S` stretches every part so that a kill lands inside one.
SCRIPT = f"""
import os, resource, sys, time
from loopline.data_pipeline.build import build
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.sources import FileSource

class SlowSource(FileSource):
    def read(self, part):
        for text in super().read(part):
            time.sleep(float(os.environ.get("SLOW_S", 0)))
            yield text

if __name__ == "__main__":
    if "FILE_BYTES" in os.environ:
        n_bytes = int(os.environ["FILE_BYTES"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    try:
        source = SlowSource(sys.argv[1], (".py",), part_bytes=8_000)
        build(source, sys.argv[2], workers=int(sys.argv[3]), **{SETTINGS!r})
    except DataError as error:
        sys.exit(f"DataError: {{error}}")
"""


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "build_slowly.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def start(script, text_folder):
    """Starts a build in a process group of its own; whatever is left of it is killed at the end."""
    started = []

    def start(out: Path, workers: int, **environment: object) -> subprocess.Popen:
        command = [sys.executable, script, text_folder, out, str(workers)]
        process = subprocess.Popen(
            command,
            env={**os.environ, **{name: str(value) for name, value in environment.items()}},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.stderr.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def n_chunks(out: Path) -> int:
    return len(list((out / ".build" / "chunks").glob("part-*.json")))


def wait_until(condition, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            # The resource tracker of multiprocessing is a child too.
            if parent == pid and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("part_bytes", [5_000, 60_000])
def test_any_number_of_workers_and_any_parts_give_the_same_bytes(small, text_folder, tmp_path, workers, part_bytes):
    source = FileSource(text_folder, (".py",), part_bytes=part_bytes)
    assert len(source.parts()) > 3
    build(source, tmp_path / "out", workers=workers, **SETTINGS)
    assert content(tmp_path / "out") == content(small.folder)


@pytest.mark.parametrize(("workers", "n_done"), [(0, 0), (0, 5), (2, 1), (3, 9)])
def test_a_build_killed_anywhere_and_run_again_gives_the_same_bytes(small, start, tmp_path, workers, n_done):
    killed = start(tmp_path, workers, SLOW_S=0.02)
    wait_until(lambda: n_chunks(tmp_path) >= n_done and (tmp_path / ".build" / "chunks").exists())
    workers_left = children(killed.pid)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    with pytest.raises(DataError, match=r"build was interrupted"):
        Manifest.load(tmp_path)
    wait_until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers_left), 10)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".build" / "chunks").glob("part-*.json")}
    assert len(kept) >= n_done

    again = start(tmp_path, (workers + 1) % 4, SLOW_S=0.01)
    wait_until(lambda: n_chunks(tmp_path) > len(kept) or again.poll() is not None)
    for name, time_ns in kept.items():
        path = tmp_path / ".build" / "chunks" / name
        assert not path.exists() or path.stat().st_mtime_ns == time_ns  # taken, not made again
    assert again.wait(60) == 0, again.stderr.read()
    assert content(tmp_path) == content(small.folder)


def test_a_kill_between_the_shards_and_the_manifest_is_repaired(small, text_folder, tmp_path, monkeypatch):
    source = FileSource(text_folder, (".py",), part_bytes=8_000)

    def die(self, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Manifest, "save", die)
        for shard_bytes in (SETTINGS["shard_bytes"], 5_000):
            with pytest.raises(KeyboardInterrupt):
                build(source, tmp_path, **{**SETTINGS, "shard_bytes": shard_bytes})
    assert (tmp_path / "train-000000.tar").exists()
    with pytest.raises(DataError, match=r"build was interrupted"):
        Manifest.load(tmp_path)
    assert len(list(tmp_path.glob("train-*.tar"))) > len(list(small.folder.glob("train-*.tar")))
    mine = tmp_path / "train-000003.tar"
    ours = mine.read_bytes()
    mine.write_bytes(b"mine")
    with pytest.raises(DataError, match=r"holds train-000003.tar, which no build under way there wrote"):
        build(source, tmp_path, **SETTINGS)
    assert mine.read_bytes() == b"mine" != ours
    mine.unlink()
    build(source, tmp_path, **SETTINGS)  # with other settings than those of the shards there
    assert content(tmp_path) == content(small.folder)


def test_a_file_that_comes_during_the_build_is_not_overwritten(text_folder, tmp_path):
    class Slow(FileSource):
        def read(self, part):
            (tmp_path / "out" / "train-000000.tar").write_text("mine")
            return super().read(part)

    with pytest.raises(DataError, match=r"holds train-000000.tar, which no build"):
        build(Slow(text_folder, (".py",)), tmp_path / "out", **SETTINGS)
    assert (tmp_path / "out" / "train-000000.tar").read_text() == "mine"


PARENT = """
import sys, time
from loopline.data_pipeline.workers import run_items

def work(item):
    print("begun", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    list(run_items(work, [1, 2], 2))
"""


def test_workers_end_with_their_parent_in_the_middle_of_an_item(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    process = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True)
    with process.stdout:
        assert [process.stdout.readline() for _ in range(2)] == ["begun\n"] * 2
        workers = children(process.pid)
        process.kill()
        process.wait()
    assert len(workers) == 2
    wait_until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers), 10)


@pytest.mark.parametrize("items", [[], ["item"]], ids=["waiting", "answering"])
def test_a_worker_whose_pipe_is_closed_ends_in_silence(items, capfd):
    """The main process has its own error to show, and workers of a full disk fail one after the other."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    for item in items:
        ours.send(item)
    worker = context.Process(target=serve, args=(print, theirs))
    worker.start()
    theirs.close()
    ours.close()  # unread answers make this a reset, and not an end
    worker.join(60)
    assert worker.exitcode == 0
    assert capfd.readouterr().err == ""


def test_a_killed_worker_is_a_clear_error_and_the_rerun_is_whole(small, start, tmp_path):
    process = start(tmp_path, 2, SLOW_S=0.05)
    wait_until(lambda: n_chunks(tmp_path) >= 2)
    victim, _ = children(process.pid)
    os.kill(victim, signal.SIGKILL)
    assert process.wait(30) != 0
    message = process.stderr.read()
    assert "DataError: a worker process died (exit status -9" in message
    assert "Traceback" not in message
    assert ".py" in message
    again = start(tmp_path, 2)
    assert again.wait(60) == 0, again.stderr.read()
    assert content(tmp_path) == content(small.folder)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [3_000, 20_000])
def test_a_full_disk_ends_in_a_clear_error_and_the_rerun_goes_on(small, start, tmp_path, workers, limit):
    process = start(tmp_path, workers, FILE_BYTES=limit)  # too little for the tokenizer, or for a shard
    assert process.wait(60) != 0
    message = process.stderr.read()
    assert "DataError: " in message
    assert "no room for more (File too large). Free space" in message
    assert "Traceback" not in message
    assert not (tmp_path / "manifest.json").exists()
    again = start(tmp_path, workers)
    assert again.wait(60) == 0, again.stderr.read()
    assert content(tmp_path) == content(small.folder)


def test_a_damaged_or_foreign_chunk_is_made_again(small, text_folder, start, tmp_path):
    killed = start(tmp_path, 0, SLOW_S=0.01)
    wait_until(lambda: n_chunks(tmp_path) >= 6)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    chunks = tmp_path / ".build" / "chunks"
    with (chunks / "part-000000.tokens").open("r+b") as file:
        file.seek(300)
        file.write(b"\x01\x02")
    (chunks / "part-000001.tokens").write_bytes(b"")
    (chunks / "part-000002.json").write_text("{")
    os.replace(chunks / "part-000004.json", chunks / "part-000003.json")
    (chunks / ".part-000005.tokens.99").write_bytes(b"half")
    build(FileSource(text_folder, (".py",), part_bytes=8_000), tmp_path, **SETTINGS)
    assert content(tmp_path) == content(small.folder)


def test_text_edited_after_the_kill_is_read_again(text_folder, small, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(6):
        (texts / f"{i}.txt").write_text(f"text number {i} " * 50)
    tokenizer = TokenizerFile(small.folder)

    class Interrupted(FileSource):
        def read(self, part):
            if part.files[0].name != "4.txt":
                return super().read(part)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(Interrupted(texts, part_bytes=1), tmp_path / "out", tokenizer=tokenizer, heldout_fraction=0)
    (texts / "0.txt").write_text("text number 9 " * 50)  # the same size
    source = FileSource(texts, part_bytes=1)
    build(source, tmp_path / "out", tokenizer=tokenizer, heldout_fraction=0)
    build(source, tmp_path / "new", tokenizer=tokenizer, heldout_fraction=0)
    assert content(tmp_path / "out") == content(tmp_path / "new")


def test_text_that_changes_while_it_is_read_is_refused(small, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("before " * 50)

    class Edited(FileSource):
        def read(self, part):
            yield from super().read(part)
            file.write_text("after")

    with pytest.raises(DataError, match=r"a.txt changed while it was read"):
        build(Edited(file), tmp_path / "out", tokenizer=TokenizerFile(small.folder), heldout_fraction=0)


def test_two_builders_of_one_folder_do_not_mix(small, start, text_folder, tmp_path):
    first = start(tmp_path, 0, SLOW_S=0.02)
    wait_until(lambda: n_chunks(tmp_path) >= 1)
    with pytest.raises(DataError, match=r"another process is building"):
        build(FileSource(text_folder, (".py",)), tmp_path, **SETTINGS)
    assert first.wait(60) == 0, first.stderr.read()
    assert content(tmp_path) == content(small.folder)


def test_bad_rows_reach_the_user_from_worker_processes(small, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' * 20 + '{"text": 1}\n')
    with pytest.raises(DataError, match=r"a.jsonl:21: found a JSON int"):
        build(
            JsonlSource(tmp_path, part_bytes=60),
            tmp_path / "out",
            tokenizer=TokenizerFile(small.folder),
            heldout_fraction=0,
            workers=2,
        )


def test_the_histogram_counts_every_document_and_older_manifests_need_none(small, all_documents, tmp_path):
    for name, split in small.splits.items():
        expected = [0] * len(split.length_histogram)
        for document in all_documents(small, name):
            expected[len(document).bit_length() - 1] += 1
        assert list(split.length_histogram) == expected
        assert expected[-1] > 0
    facts = json.loads(small.path.read_text())
    for split in facts["splits"].values():
        del split["length_histogram"]
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    older = Manifest.load(tmp_path)
    assert older.splits["train"].length_histogram is None
    assert older.content_sha256("train") == small.content_sha256("train")
    older.save(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == facts
    facts["splits"]["train"]["length_histogram"] = [1]
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match=r"the counts of splits.train.length_histogram add up to 1"):
        Manifest.load(tmp_path)
