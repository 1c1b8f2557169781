"""JSON and YAML as data: what plain words mean, that what we write is read as it was, and what is never read at all."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tests import test_choices
from tests.conftest import SMALL
from tests.hostile import NO_JSON, RUN, SLOW
from trainkit import run as runs
from trainkit import strict
from trainkit.choices import choices
from trainkit.cli import main
from trainkit.errors import UserError


@pytest.fixture(params=["libyaml", "python"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict, "_PARSER", yaml.CSafeLoader if request.param == "libyaml" else yaml.SafeLoader)


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("case", RUN)
def test_with_or_without_libyaml(case: str) -> None:
    raw, _ = RUN[case]
    with pytest.raises(UserError) as caught:
        runs.saved(raw() if callable(raw) else raw)
    assert str(caught.value).isprintable()


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(
            (word, word)
            for word in ("no", "off", "on", "yes", "n", "012", "0o14", "0x1f", "1_000", "12:30:45", "2020-01-01")
        ),
        *(
            ("1e-4", 1e-4),
            ("1.0e-05", 1e-5),
            ("-1.5E+3", -1500.0),
            (".5", 0.5),
            ("5.", 5.0),
            ("-12", -12),
            ("+5", 5),
            ("0", 0),
        ),
        *(
            ("true", True),
            ("False", False),
            ("NULL", None),
            ("~", None),
            ("", None),
            ("tRue", "tRue"),
            (".INF", float("inf")),
        ),
        *(
            ("'1'", "1"),
            ('"1"', "1"),
            ("|-\n  1", "1"),
            (">-\n  1", "1"),
            ('"no"', "no"),
            ('"a\\nb"', "a\nb"),
            ("<<", "<<"),
            ("a#b", "a#b"),
            ("1.2.3", "1.2.3"),
        ),
        *(
            ("{a: [1, {b: }]}", {"a": [1, {"b": None}]}),
            ("a:\n- x\n- y", {"a": ["x", "y"]}),
            ("---\na: 1\n...", {"a": 1}),
        ),
        *(("[" * 64 + "]" * 64, json.loads("[" * 64 + "]" * 64)), ("# nothing", None), ("? a\n: b", {"a": "b"})),
    ],
)
def test_plain_words_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = strict.parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


NEEDS = {
    **test_choices.NEEDS,
    "data=text": ["data.path=\"books: 'of' #1\""],
    "data=shards": ["data.path=12:30:45"],
    "data=mixture": ["data.sources.a.path=no", "data.sources.off.path=0x1f"],
}
EVERY_CHOICE = [[f"{group}={c}"] for group, found in choices().items() for c in found]
WORDS = [
    "off",
    "~",
    "012",
    "0o14",
    "1e5",
    ".inf",
    "+1",
    "<<",
    "=",
    "#x",
    "'",
    '"',
    "%x",
    "a: b",
    "- a",
    "|",
    "...",
    " a\n b",
    "\n",
]


def as_before(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.create(text), resolve=True)


@pytest.mark.parametrize("choice", EVERY_CHOICE, ids=lambda c: c[0])
def test_every_run_is_read_as_it_was_written(choice: list[str]) -> None:
    written = runs.composed([*choice, *NEEDS.get(choice[0], [])]).yaml()
    found = strict.parse_yaml(written)
    assert repr(found) == repr(as_before(written))
    assert runs.saved(written).yaml() == written


text = st.one_of(st.text(), st.sampled_from(WORDS)).filter(
    lambda t: "${" not in t and "\\$" not in t
)  # which OmegaConf resolves
leaf = st.one_of(st.none(), st.booleans(), st.integers(-(10**40), 10**40), st.floats(allow_nan=False), text)
tree = st.dictionaries(
    text,
    st.recursive(leaf, lambda some: st.lists(some, max_size=4) | st.dictionaries(text, some, max_size=4)),
    max_size=4,
)


@pytest.mark.usefixtures("parser")
@given(tree)
@settings(deadline=None, max_examples=150, suppress_health_check=SLOW)
def test_whatever_omegaconf_writes_is_read_alike(value: Any) -> None:
    written = OmegaConf.to_yaml(OmegaConf.create(value))
    assert repr(strict.parse_yaml(written)) == repr(as_before(written))


@pytest.mark.usefixtures("parser")
@given(
    st.dictionaries(st.text() | st.sampled_from(WORDS), leaf | st.lists(leaf | st.sampled_from(["${x", "\\${", "???"])))
)
@settings(deadline=None, max_examples=150, suppress_health_check=SLOW)
def test_whatever_we_write_is_read_as_it_was(value: Any) -> None:
    assert repr(strict.parse_yaml(strict.write_yaml(value))) == repr(value)


def test_what_looks_like_an_interpolation_is_a_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "${oc.env:HOME} ${x"
    (place / "corpus").rename(place / name)
    words = [word for word in SMALL if not word.startswith("data.path=")]
    given = [*words, "data.path='\\${oc.env:HOME} \\${x'", "name=a", "checkpoint.every=2"]
    for verb in (["train", *given, "stop_at=2"], ["resume", "a", "stop_at=4"], ["train", *given]):
        with pytest.raises(SystemExit) as left:
            main(verb)
        assert left.value.code == 0, capsys.readouterr().err
    run = runs.read(Path("runs/a"))
    assert run is not None
    assert run.data.path == name  # type: ignore[union-attr]


def test_many_keys_or_brackets_are_refused_at_once() -> None:
    for raw in ("".join(f"k{i}: 1\n" for i in range(200_000)), "[" * 100_000, "{a: " * 100_000, "- " * 100_000):
        began = time.process_time()
        with pytest.raises(ValueError, match="more than"):
            strict.parse_yaml(raw, max_bytes=1 << 30)
        assert time.process_time() - began < 1


@pytest.mark.parametrize("case", NO_JSON)
def test_what_is_no_strict_json_is_refused(case: str) -> None:
    raw = NO_JSON[case]
    with pytest.raises(ValueError) as caught:
        strict.parse_json(raw() if callable(raw) else raw, max_bytes=64 << 20)
    assert str(caught.value).isprintable()


whole = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**60), 10**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda some: st.lists(some, max_size=4) | st.dictionaries(st.text(), some, max_size=4),
)


@given(whole, st.booleans())
@settings(deadline=None, suppress_health_check=SLOW)
def test_strict_json_is_json(value: Any, escaped: bool) -> None:
    written = json.dumps(value, ensure_ascii=escaped)
    assert repr(strict.parse_json(written.encode(), max_bytes=1 << 20)) == repr(value)


def test_the_bounds_are_exact() -> None:
    assert strict.parse_json(b"[" * 64 + b"]" * 64, max_bytes=128)
    with pytest.raises(ValueError, match="it is more than 64 levels deep"):
        strict.parse_json(b"[" * 65 + b"]" * 65, max_bytes=130)
    with pytest.raises(ValueError, match="it is more than 64 levels deep"):
        strict.parse_yaml("[" * 65 + "]" * 65)
    with pytest.raises(ValueError, match="it has 4 bytes, at most 3 were expected"):
        strict.parse_json(b"1234", max_bytes=3)
    four = b'{"a,[": [1, "]"], "\\",": "\\\\"}'
    assert strict.parse_json(four, max_bytes=99, max_nodes=5)
    for text in ("[1, {a: 2}]", "- 1\n- a: 2"):
        assert strict.parse_yaml(text, max_nodes=5) == [1, {"a": 2}]
        with pytest.raises(ValueError, match="it holds more than 4 values"):
            strict.parse_yaml(text, max_nodes=4)
    with pytest.raises(ValueError, match="it holds more than 4 values"):
        strict.parse_json(four[:-1] + b', "b": 1, "c": 2}', max_bytes=99, max_nodes=4)
    with pytest.raises(ValueError, match="it holds more than 4 values"):  # as soon as its texts are too many
        strict.parse_json(b'""' * 9, max_bytes=99, max_nodes=4)
    assert strict.parse_json(b"9" * 64, max_bytes=64) == int("9" * 64)
    with pytest.raises(ValueError, match="a number has 65 characters"):
        strict.parse_json(b"9" * 65, max_bytes=65)


def test_a_file_is_read_to_its_bound(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1234")
    assert strict.read_file(file, 4) == b"1234"
    (tmp_path / "link").symlink_to(file)
    assert strict.read_file(tmp_path / "link", 4) == b"1234"
    with pytest.raises(OSError):
        strict.read_file(tmp_path / "link", 4, follow=False)
    with pytest.raises(ValueError, match="it is longer than 3 bytes"):
        strict.read_file(file, 3)
    with pytest.raises(OSError):
        strict.read_file(tmp_path, 4)
    with pytest.raises(ValueError, match="it is not a regular file"):
        strict.read_file(Path("/dev/zero"), 4)


def test_one_line_is_one_line() -> None:
    assert strict.one_line("a\n b\t\x1b[2J\u202e\0") == "a b \\x1b[2J\\u202e\\x00"
    assert strict.one_line("x" * 10**7, 5) == "xxxxx..."
