"""`nproc=4` among the words of `train` and `resume`: this process is torchrun then, and starts itself once a rank.

These words say how processes are started, and are in no run's config:

- `nproc`: ranks on this machine; `auto`: one for each GPU, or for each core where there is none.
- `restarts`: how often all are started again, from the newest checkpoint, when one was lost (0).
- `nodes`: machines that train together, each with the same command; `1:2`: one goes on without the other.
- `rendezvous`: HOST:PORT of one of them, where they meet. `address`: this machine's own, where its name is not enough.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from trainkit.errors import UserError

NAMES = {"nproc": "ranks", "restarts": "restarts"}
WORDS = ("nproc", "restarts", "nodes", "rendezvous", "address")


@dataclass(frozen=True)
class Launch:
    """How ranks are started; `nproc=None` is auto."""

    nproc: int | None
    restarts: int = 0
    nodes: tuple[int, int] = (1, 1)  # at least, at most
    rendezvous: str | None = None
    address: str | None = None


def asked(words: list[str]) -> tuple[Launch | None, list[str]]:
    """What the words say of starting ranks, if they do, and the other words.

    Raises:
        UserError: a number that is none, words that do not go together, or this process is a rank already.
    """
    given = {key: value for key, _, value in (w.partition("=") for w in words) if key in WORDS}
    rest = [w for w in words if w.partition("=")[0] not in WORDS]
    if given or "RANK" in os.environ:  # else torch's C++ warns of every wire that breaks; it looks when it is imported
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not given:
        return None, rest
    if "nproc" not in given:
        raise UserError(f"{next(iter(given))}= is about ranks that are started: add nproc=N, or nproc=auto")
    if "RANK" in os.environ:
        raise UserError(
            "nproc= starts torchrun, and this process was started by it already: leave nproc out, or torchrun"
        )
    nodes = re.fullmatch(r"([1-9]\d{0,5})(?::([1-9]\d{0,5}))?", given.get("nodes", "1"))
    least, most = (int(nodes[1]), int(nodes[2] or nodes[1])) if nodes else (1, 0)
    if least > most:
        raise UserError(f"nodes={given['nodes']} is not a number of machines: use nodes=2, or nodes=1:2 for one or two")
    if (most > 1) != ("rendezvous" in given):
        raise UserError("nodes= and rendezvous= go together: nodes=2 rendezvous=HOST:29400, the same on each of them")
    if "rendezvous" in given and not re.fullmatch(r".+:\d+", given["rendezvous"]):
        raise UserError(
            f"rendezvous={given['rendezvous']} is no HOST:PORT, such as rendezvous={given['rendezvous']}:29400"
        )
    return Launch(
        nproc=None if given["nproc"] == "auto" else _count("nproc", given["nproc"], 1),
        restarts=_count("restarts", given.get("restarts", "0"), 0),
        nodes=(least, most),
        rendezvous=given.get("rendezvous"),
        address=given.get("address"),
    ), rest


def _count(word: str, text: str, least: int) -> int:
    if not text.isdecimal() or not least <= int(text) < 1 << 20:
        more = ", or nproc=auto for one on each GPU" if word == "nproc" else ""
        raise UserError(f"{word}={text} is not a number of {NAMES[word]}: use {word}=4{more}")
    return int(text)


def command(verb: str, words: list[str], runs: Path, config_dir: Path | None) -> list[str]:
    """What a rank is started with."""
    where = ["--runs", str(runs), *(["--config-dir", str(config_dir)] if config_dir else [])]
    return [verb, *where, "--", *words]
