"""Files that anyone may have written: whatever is in them, one clear line, nothing executed, little time and memory."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import trainkit
from tests.conftest import SMALL
from tests.hostile import GOOD_RUN, MANIFEST, RUN, SLOW, manifest
from tests.hostile_data import INDEX, TOKENIZER, data_folder, fast, index
from trainkit import run as runs
from trainkit import strict
from trainkit.checkpoint import manifest as manifests
from trainkit.checkpoint import store
from trainkit.checkpoint.manifest import BadCheckpoint, canonical
from trainkit.cli import main
from trainkit.data import shards, tokenizers
from trainkit.errors import DamagedError, UserError

ROOT = Path(trainkit.__file__).parents[1]
ERRORS = (UserError, BadCheckpoint, DamagedError)
TIMES, GROWTH = 50, 1 << 30  # of what json needs for two million words; bytes


def read_index(raw: bytes) -> object:
    """Open a data folder that is good but for its index."""
    folder = Path("data")
    if not folder.exists():
        data_folder(folder)
    (folder / "index.json").write_bytes(raw)
    return shards.open_corpus(folder)


DOORS: dict[str, tuple[dict[str, Any], Callable[[bytes], object]]] = {
    "run.yaml": (RUN, runs.saved),
    "manifest.json": (MANIFEST, manifests.decode),
    "index.json": (INDEX, read_index),
    "tokenizer.json": (TOKENIZER, tokenizers.load),
}
GOOD = {
    "run.yaml": GOOD_RUN.encode(),
    "manifest.json": manifest(),
    "index.json": index(),
    "tokenizer.json": fast({"a": 0, "b": 1}),
}
EVERY = [(door, case) for door, (cases, _) in DOORS.items() for case in cases]


def refused(door: str, raw: bytes) -> str:
    """What is said of a file that is refused: one line that a terminal shows as it is."""
    with pytest.raises(ERRORS) as caught:
        DOORS[door][1](raw)
    said = str(caught.value)
    assert said.isprintable(), said
    assert 0 < len(said) < 700, said
    return said


def accepted_or_refused(door: str, raw: bytes) -> None:
    try:
        DOORS[door][1](raw)
    except ERRORS:
        refused(door, raw)


@pytest.mark.parametrize(("door", "case"), EVERY)
def test_a_hostile_file_gets_one_line(door: str, case: str) -> None:
    raw, words = DOORS[door][0][case]
    assert words in refused(door, raw() if callable(raw) else raw)


@pytest.mark.parametrize("door", DOORS)
def test_the_same_file_unchanged_is_read(door: str) -> None:
    DOORS[door][1](GOOD[door])


@pytest.mark.parametrize("door", DOORS)
@given(st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=SLOW)
def test_a_file_cut_and_sewn_is_refused_or_read(door: str, data: st.DataObject) -> None:
    good = GOOD[door]
    a, b = (data.draw(st.integers(0, len(good))) for _ in range(2))
    middle = data.draw(
        st.binary(max_size=12) | st.sampled_from([b"NaN", b"[" * 99, b"-1", b"&a", b"*a", b"!x", b'":', b"null"])
    )
    accepted_or_refused(door, good[:a] + middle + good[b:])


numbers = st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**70, 1.5, 1e300, True, None])
odd = st.recursive(
    numbers | st.text(max_size=8) | st.sampled_from(["..", "/etc/passwd", "a\0b", "x" * 300, "a\nb"]),
    lambda some: st.lists(some, max_size=4) | st.dictionaries(st.text(max_size=8), some, max_size=3),
    max_leaves=6,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value, with each of its keys."""
    for key in list(value if isinstance(value, dict) else range(len(value))):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


@pytest.mark.parametrize("door", DOORS)
@given(st.data())
@settings(deadline=None, max_examples=100, suppress_health_check=SLOW)
def test_an_odd_value_in_a_field_is_refused_or_read(door: str, data: st.DataObject) -> None:
    value = json.loads(GOOD[door]) if door != "run.yaml" else strict.parse_yaml(GOOD[door].decode())
    container, key = data.draw(st.sampled_from(list(places(value))))
    container[key] = data.draw(odd)
    if door == "run.yaml":
        accepted_or_refused(door, yaml.safe_dump(value).encode())
    elif door == "manifest.json":  # whoever can write one can write its hash
        value.pop("sha256", None)
        accepted_or_refused(door, canonical({**value, "sha256": hashlib.sha256(canonical(value)).hexdigest()}))
    else:
        accepted_or_refused(door, json.dumps(value).encode())


def measure() -> None:
    """Print the most that memory grew over all hostile files, and the seconds of processor that each took."""
    usual = [int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in Path("/proc/self/statm").read_text().split()[:2]]
    resource.setrlimit(resource.RLIMIT_AS, (usual[0] + 2 * GROWTH, usual[0] + 2 * GROWTH))
    took = {}
    for door, case in EVERY:
        raw, _ = DOORS[door][0][case]
        raw = raw() if callable(raw) else raw
        began = time.process_time()
        refused(door, raw)
        took[f"{door} {case}"] = time.process_time() - began
    # not ru_maxrss, which a process has from the one that started it
    most = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    words, began = json.dumps([*map(str, range(2_000_000))]), time.process_time()
    usually = json.loads(words) and time.process_time() - began
    print(json.dumps([(int(most.split()[1]) << 10) - usual[1], took, usually]))


def in_a_process(code: str) -> Any:
    """What a program of this module prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.test_hostile import *; {code}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_none_takes_long_or_much() -> None:
    grown, took, usually = in_a_process("measure()")
    assert (grown < GROWTH, max(took.values()) < TIMES * usually) == (True, True), (grown, took, usually)


WATCHED = ("pickle.find_class", "marshal.loads", "exec", "compile", "os.system", "os.exec", "subprocess.Popen")


def watch() -> None:
    """Load a checkpoint twice, and print what Python's audit hooks saw the second time."""
    path = sorted(Path("runs/a/checkpoints").glob("step-*"))[-1]
    fired: list[str] = []

    def load() -> None:
        loaded = store.load(path)
        runs.saved(loaded.files["run.yaml"])
        tokenizers.load(loaded.files["tokenizer.json"])

    load()  # whatever is imported late is imported now
    sys.addaudithook(lambda event, _: fired.append(event) if event in (*WATCHED, "socket.connect") else None)
    load()
    seen = list(fired)
    compile("1", "", "eval")
    print(json.dumps([seen, fired]))


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    return left.value.code, capsys.readouterr().err  # type: ignore[return-value]


def test_loading_a_checkpoint_executes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "train", *SMALL, "name=a")[0] == 0
    seen, after = in_a_process("watch()")
    assert seen == []
    assert after == ["compile"]  # the hook did listen


@pytest.mark.parametrize("case", ["a tag", "a short tag", "not utf-8", "a pipe", "missing"])
def test_the_verbs_say_it_in_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "train", *SMALL, "name=a")[0] == 0
    file = Path("runs/a/run.yaml")
    raw = RUN[case][0] if case in RUN else b""
    file.unlink()
    if case == "a pipe":
        os.mkfifo(file)
    elif case != "missing":
        file.write_bytes(raw)
    for verb in (["resume", "a"], ["list-checkpoints"], ["train", *SMALL, "name=a"]):
        code, err = said(capsys, *verb)
        if case == "missing" and verb[0] != "resume":
            continue
        assert (code, err.count("\n")) == (2, 1), err
        assert "run.yaml" in err


def signed(path: Path, name: str, raw: bytes | None) -> None:
    """Put another file into a checkpoint, or take one out, as whoever sends it to you can: with all hashes right."""
    value = json.loads((path / "manifest.json").read_bytes())
    del value["sha256"], value["files"][name]
    (path / name).unlink()
    if raw is not None:
        (path / name).write_bytes(raw)
        value["files"][name] = {"size": len(raw), "xxh3_128": shards.hash_file(path / name)}
    value["sha256"] = hashlib.sha256(canonical(value)).hexdigest()
    (path / "manifest.json").write_bytes(canonical(value))


def test_a_foreign_checkpoint_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "train", *SMALL, "name=a")[0] == 0
    path = sorted(Path("runs/a/checkpoints").glob("step-*"))[-1]
    run = (path / "run.yaml").read_bytes()
    files = [
        *(
            ("run.yaml", RUN[case][0], RUN[case][1])
            for case in ("a tag", "laughs", "not utf-8", "an environment variable")
        ),
        *(("run.yaml", raw, "") for raw in (None, b"", b"[]")),
        ("run.yaml", run.replace(b"width: 16", b"width: 1600000"), "is not of the model that its run.yaml describes"),
        ("run.yaml", run.replace(b"depth: 2", b"depth: 2000000000"), "is not of the model that its run.yaml describes"),
        *(("tokenizer.json", TOKENIZER[case][0], TOKENIZER[case][1]) for case in ("a panic", "deep", "an id of 2**32")),
        ("tokenizer.json", None, "not a saved tokenizer"),
    ]
    for name, raw, words in files:
        foreign = shutil.copytree(path, Path("foreign") / path.name)
        signed(foreign, name, raw() if callable(raw) else raw)
        code, err = said(capsys, "generate", str(foreign), "--tokens", "1")
        assert (code, err.count("\n")) == (2, 1), err
        assert words in err
        shutil.rmtree("foreign")


def test_a_hostile_data_folder_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    data_folder(Path("data"))
    small = [word for word in SMALL if not word.startswith(("data=", "data.path", "data.validation"))]
    for raw, words in INDEX.values():
        Path("data/index.json").write_bytes(raw() if callable(raw) else raw)
        code, err = said(capsys, "train", *small, "data=shards", "data.path=data")
        assert (code, err.count("\n")) == (2, 1), err
        assert words in err


def test_no_file_is_looked_for_outside_its_folder() -> None:
    data_folder(Path("data"))
    Path("data/index.json").write_bytes(index())
    assert shards.verify(Path("data")) == ["a.bin", "b.bin"]  # their hashes here are made up
    corpus = shards.open_corpus(Path("data"))
    assert corpus.train[0].read(898, 2).tolist() == [127, 128]
    for name in ("index.json", "tokenizer.json", "b.bin"):
        file = Path("data") / name
        file.rename(name)
        file.symlink_to(Path("..") / name)
        with pytest.raises(UserError, match=name):
            shards.open_corpus(Path("data"))
        if name != "b.bin":
            file.unlink()
            Path(name).rename(file)
    with pytest.raises(UserError, match=r"b\.bin is missing or cut short"):  # a link by now
        corpus.validation[0].read(0, 1)


def test_a_file_that_became_shorter_is_no_crash() -> None:
    data_folder(Path("data"))
    Path("data/index.json").write_bytes(index())
    corpus = shards.open_corpus(Path("data"))
    os.truncate("data/a.bin", 100)
    with pytest.raises(UserError, match=r"a\.bin is missing or cut short"):
        corpus.train[0].read(0, 1)


@pytest.mark.skipif(find_spec("atheris") is not None, reason="atheris is here")
def test_the_fuzzer_says_what_it_lacks() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "fuzz"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "fuzz: it needs the package atheris: pip install atheris\n")
