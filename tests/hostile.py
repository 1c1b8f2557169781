"""Hostile run.yaml and manifest.json, each with words of the line that refuses it, and good ones they are made from."""

import hashlib
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck

from trainkit import run as runs
from trainkit.checkpoint.manifest import canonical

SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
Cases = dict[str, tuple[bytes | Callable[[], bytes], str]]
GOOD_RUN = runs.composed(["experiment=char", "name=a"]).yaml()


def edited(old: str, new: str) -> bytes:
    """A run.yaml that is good but for one place."""
    assert old in GOOD_RUN
    return GOOD_RUN.replace(old, new, 1).encode()


def laughs() -> bytes:
    """A billion of them (https://en.wikipedia.org/wiki/Billion_laughs_attack)."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    return "\n".join(lines).encode()


RUN: Cases = {
    "empty": (b"", "run.yaml holds no run"),
    "a list": (b"[1, 2]", "run.yaml holds no run"),
    "not utf-8": (b"name: \xff", "run.yaml cannot be read"),
    "utf-16": (GOOD_RUN.encode("utf-16"), "run.yaml cannot be read"),
    "a null byte": (edited("name: a", "name: a\0"), "line 1: U+0000 is no character of YAML"),
    "laughs": (laughs, "line 1: an anchor has no place here"),
    "an alias": (b"a: *x", "an alias has no place here"),
    "a merge": (edited("seed: 0", "seed: 0\n<<: {steps: 1}"), "a run has no '<<'"),
    "a tag": (
        edited("seed: 0", "seed: !!python/object/apply:os.system [touch owned]"),
        "line 3: the tag tag:yaml.org,2002:py",
    ),
    "a short tag": (edited("seed: 0", "seed: !x 0"), "line 3: the tag !x has no place here"),
    "no tag": (edited("seed: 0", "seed: ! 0"), "line 3: the tag ! has no place here"),
    "a path": (edited("path: builtin", "path: !!python/object/apply:pathlib.Path [x] #"), "the tag tag:yaml.org"),
    "a directive": (b"%YAML 1.1\n---\n" + GOOD_RUN.encode(), "line 1: a directive has no place here"),
    "many directives": (
        "".join(f"%TAG !e{i}! tag:x,2000:\n" for i in range(40_000)).encode(),
        "a directive has no place",
    ),
    "two documents": ((GOOD_RUN + "---\n" + GOOD_RUN).encode(), "a second document has no place here"),
    "an environment variable": (
        edited("name: a", "name: ${oc.env:HOME}"),
        "name=${oc.env:HOME} is not a folder's name",
    ),
    "an escaped variable": (
        edited("name: a", 'name: "$\\x7boc.env:HOME}"'),
        "name=${oc.env:HOME} is not a folder's name",
    ),
    "a variable in a key": (edited("seed: 0", "${seed}: 0"), "a run has no '${seed}'"),
    "twice": (edited("seed: 0", "seed: 0\nseed: 1"), "line 4: the key 'seed' stands twice"),
    "twice inside": (edited("  depth: 6", "  depth: 6\n  depth: 7"), "the key 'depth' stands twice"),
    "a number for a key": (edited("seed: 0", "1: 0"), "line 3: a key is no text"),
    "a list for a key": (edited("seed: 0", "? [a]\n: 0"), "line 3: a key is no text"),
    "deep": (b"a: " + b"[" * 100_000, "line 1: it is more than 64 levels deep"),
    "deep maps": (b"{a: " * 100_000, "line 1: it is more than 64 levels deep"),
    "deep dashes": (b"- " * 100_000, "line 1: it is more than 64 levels deep"),
    "wide": (lambda: b"{" + b",".join(b"%x" % i for i in range(150_000)) + b"}", "a key is no text"),
    "wider": (lambda: b"[" + b",".join([b"1"] * 300_000) + b"]", "it holds more than 50000 values"),
    "many keys": (lambda: b"".join(b"k%d: 1\n" % i for i in range(60_000)), "it holds more than 50000 values"),
    "large": (lambda: b"# " + b"x" * (1 << 20), "bytes, at most 1048576 were expected"),
    "a long number": (edited("seed: 0", "seed: " + "9" * 5000), "line 3: a number has 5000 characters"),
    "too large a number": (edited("clip: 1.0", "clip: 1e999"), "line 4: 1e999 is too large a number"),
    "not a number": (edited("clip: 1.0", "clip: .nan"), "clip=nan"),
    "no name": (edited("name: a", ""), "name=None is not a folder's name"),
    "a name of none": (edited("name: a", "name: null"), "name=None: input should be a valid string"),
    "a name of control characters": (edited("seed: 0", '"a\\nb\\e[2J": 0'), "a run has no 'a b\\x1b[2J'"),
    "a choice of control characters": (edited("kind: decoder", 'kind: "\\n\\e]0;x\\a"'), "is not a choice"),
    "a long choice": (edited("kind: decoder", "kind: " + "x" * 900_000), "model=xxx"),
    "a path for a name": (edited("name: a", "name: ../../up"), "is not a folder's name"),
    "half a pair": (edited("name: a", 'name: "\\ud800"'), "line 1: "),
    "too large a character": (edited("name: a", 'name: "\\UFFFFFFFF"'), "line 1: "),
    "a target": (edited("seed: 0", "seed: 0\n_target_: os.system"), "a run has no '_target_'"),
    "an open quote": (edited("name: a", "name: 'a"), "line "),
    "a tab": (edited("  depth: 6", "\tdepth: 6"), "line "),
}


def manifest(**changes: Any) -> bytes:
    """A manifest with its own hash, good but for `changes`."""
    value: dict[str, Any] = {
        "format": 1,
        "run": "a",
        "step": 3,
        "time": 1.5,
        "versions": {"torch": "2"},
        "facts": {"metric": None, "epoch_end": False, "epoch": 0.5, "val_loss": 1.5},
        "files": {"shard-00000-of-00001.safetensors": {"size": 8, "xxh3_128": "0" * 32}},
        "tensors": {"w": {"dtype": "F32", "shape": [2], "parts": [["shard-00000-of-00001.safetensors", [0], [2]]]}},
    } | changes
    return canonical({**value, "sha256": hashlib.sha256(canonical(value)).hexdigest()})


def file(**changes: Any) -> dict[str, Any]:
    return {"files": {"a": {"size": 8, "xxh3_128": "0" * 32} | changes}}


def tensor(**changes: Any) -> dict[str, Any]:
    return {"tensors": {"w": {"dtype": "F32", "shape": [2], "parts": []} | changes}}


NO_JSON: dict[str, bytes | Callable[[], bytes]] = {
    "empty": b"",
    "not utf-8": b'{"\xff": 1}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "a mark of order": b"\xef\xbb\xbf{}",
    "cut": b'{"a": [1, 2',
    "deep": b"[" * 1_000_000,
    "deep and whole": b"[" * 5000 + b"]" * 5000,
    "deep maps": b'{"a":' * 1_000_000,
    "wide": lambda: b"[" + b"1," * 2_400_000 + b"1]",
    "texts": lambda: b'""' * 5_000_000,
    "an open text": lambda: b'"' + b'\\"' * 2_000_000,
    "large": lambda: b" " * (97 << 20),
    "twice": b'{"a": 1, "a": 1}',
    "not a number": b'{"a": NaN}',
    "infinite": b'{"a": -Infinity}',
    "too large a number": b'{"a": 1e999}',
    "a long number": b'{"a": ' + b"9" * 5000 + b"}",
    "half a pair": b'{"a": "\\ud800"}',
    "a control character": b'{"a": "\x1b"}',
}
MANIFEST: Cases = {
    **{case: (raw, "not the JSON that was written") for case, raw in NO_JSON.items()},
    "a list": (b"[]", "is not a manifest"),
    "more": (manifest(more=1), "is not a manifest"),
    "another format": (manifest(format=[1] * 999), "has format [1, 1"),
    "a true format": (manifest(format=True), "has format True"),
    "a changed byte": (manifest().replace(b'"run":"a"', b'"run":"b"'), "does not have its own hash"),
    "spaces": (manifest().replace(b":", b": "), "does not have its own hash"),
    "a negative step": (manifest(step=-1), "its step -1 is none"),
    "a long step": (manifest(step=10**10), "its step 10000000000 is none"),
    "a true step": (manifest(step=True), "its step True is none"),
    "a run of none": (manifest(run=None), "its run None"),
    "a time beyond all": (manifest(time=10**30), "its time"),
    "a version": (manifest(versions={"a\n": 1}), "its version of 'a\\n' is no text"),
    "facts": (manifest(facts=[1]), "its facts are no object"),
    "a metric": (manifest(facts={"metric": "0.1"}), "its metric is no number"),
    "an end": (manifest(facts={"epoch_end": "no"}), "its epoch_end is neither true nor false"),
    "a list of files": (manifest(files=[]), "its files are no object"),
    "a file": (manifest(files={"a": 1}), "the size or the hash of the file 'a' is none"),
    "a size below none": (manifest(**file(size=-1)), "the size or the hash of the file 'a' is none"),
    "a size of 2**70": (manifest(**file(size=2**70)), "the size or the hash of the file 'a' is none"),
    "a size that is text": (manifest(**file(size="8")), "the size or the hash of the file 'a' is none"),
    "a true size": (manifest(**file(size=True)), "the size or the hash of the file 'a' is none"),
    "half a size": (manifest(**file(size=1.5)), "the size or the hash of the file 'a' is none"),
    "a hash": (manifest(**file(xxh3_128=None)), "the size or the hash of the file 'a' is none"),
    **{
        f"the name {name[:9]!r}": (manifest(files={name: {"size": 1, "xxh3_128": "0"}}), "it names a file ")
        for name in (
            "../up",
            "/etc/passwd",
            "a/b",
            "a\0",
            "",
            ".",
            "..",
            ".hidden",
            "a\n",
            "manifest.json",
            "x" * 5000,
            "é",
        )
    },
    "a file to be held": (manifest(**file(size=1 << 40), tensors={}), "the file 'a' has more than 134217728 bytes"),
    **{
        f"the parts {parts}": (manifest(**tensor(parts=parts)), "the tensor 'w' does not lie in its files")
        for parts in (None, 1, ["a"], [["elsewhere", [0], [2]]], [[["a"], [0], [2]]], [["a"]], [None])
    },
    "a tensor": (manifest(tensors={"w": None}), "the dtype or the shape of the tensor 'w' is none"),
    "a tensor's name": (manifest(tensors={"\x1b[2J" * 999: None}), "the dtype or the shape of the tensor '\\x1b[2J"),
    "no dtype": (manifest(**tensor(dtype=None)), "the dtype or the shape of the tensor 'w' is none"),
    **{
        f"the shape {str(shape)[:20]}": (
            manifest(**tensor(shape=shape)),
            "the dtype or the shape of the tensor 'w' is none",
        )
        for shape in (
            [-1],
            [2**70],
            [0, 2**62],
            [0, 2**40, 2**40],
            [2**31, 2**31],
            [1] * 65,
            [1.0],
            [True],
            ["2"],
            2,
            None,
            [[2]],
            [0, -1],
        )
    },
}
