"""What has to be measured on a GPU, in one call of less than ten minutes: benchmarks/gpu.sh calls this.

    python benchmarks/gpu.py --out FOLDER [--nanogpt FOLDER] [--parts gpt2 plan ...] [--seconds 560] [--cpu-dry-run]

Parts, in the order of their worth: `gpt2` beside nanoGPT, taking turns; `M1B`; `attention`, the kernels beside each other at
1,024 and 32,768 tokens a row; `plan`, what a plan says of a step's memory beside what the allocator gave; `40gb` and `24gb`,
large models on a card that is made that small; `tests`, those that need a GPU. Every cell is a process of its own. What is
known stands in FOLDER/gpu.json and FOLDER/gpu.md after each cell, so that a call that is cut short loses one of them; what
there is no time for any more is said to be not run. `--cpu-dry-run` does all of it with tiny models where there is no GPU:
its figures mean nothing.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gpu_cells
import random_shards
import turns

VOCAB = 32_000  # ids of the data: every model has as many
GPT2 = ["model=gpt2", "model.vocab=50304", "model.mlp.activation=gelu", "data.length=1024", "data.batch=32"]
M100 = ["model=M100", "model.context=32768", "data.length=32768", "data.batch=2"]
FAST = ["precision=bf16", "compile=blocks"]
CELLS: dict[str, list[dict[str, Any]]] = {
    "M1B": [{"words": ["model=M1B", "data.length=2048", "data.batch=8", *FAST], "steps": 8}],
    "attention": [
        {"words": [*words, *FAST, f"speed.attention={kernel}"], "steps": 6}
        for kernel in ("sdpa", "flash", "flex")
        for words in (M100, GPT2)
    ],
    "plan": [
        {"words": [*words, "precision=bf16"], "steps": 2, "plan": True}
        for words in (
            ["model=gpt2", "data.length=1024", "data.batch=8"],
            ["model=gpt2", "data.length=1024", "data.batch=16", "memory=checkpoint"],
            ["model=gpt2", "data.length=1024", "data.batch=16", "memory=selective", "memory.microbatch=8"],
            ["model=M350", "data.length=2048", "data.batch=8", "memory=checkpoint+8bit"],
            ["model=M350", "data.length=2048", "data.batch=4", "memory=offload_optimizer"],
            ["model=M350", "data.length=2048", "data.batch=8", "memory=checkpoint+offload_activations"],
            ["model=M350", "data.length=2048", "data.batch=4", "memory=stream"],
            ["model=M700", "data.length=2048", "data.batch=4", "memory=baseline", "optimizer=muon"],
        )
    ],
    "40gb": [
        {"words": [f"model={model}", "data.length=2048", "data.batch=8", *FAST, *more], "steps": 6, "cap_gb": 40}
        for model, more in (("M700", ["memory=selective"]), ("M1B", ["memory=checkpoint"]))
    ],
    "24gb": [
        {
            "words": [
                "model=M7B",
                "data.length=1024",
                "data.batch=16",
                "precision=bf16_pure",
                "memory=checkpoint+stream",
            ],
            "steps": 20,
            "cap_gb": 24,
            "plan": True,
        }
    ],
}
PARTS = ("gpt2", *CELLS, "tests")
ROUNDS, TURN_S = 5, 0.5  # turns of each system, and about how long one is
CELL_S = 240  # at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT, or a folder with its model.py")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=560, help="after which nothing is begun any more")
    parser.add_argument("--cpu-dry-run", action="store_true")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        data = random_shards.write(Path(name), VOCAB if not chosen.cpu_dry_run else 1000, 2_000_000)
        Bench(chosen.out, data, chosen.nanogpt, chosen.cpu_dry_run, time.monotonic() + chosen.seconds).all(chosen.parts)


class Bench:
    """Everything that was found, written down as it comes."""

    def __init__(self, out: Path, data: Path, nanogpt: Path | None, dry: bool, end: float) -> None:
        self.out, self.data, self.nanogpt, self.dry, self.end = out, data, nanogpt, dry, end
        self.found: dict[str, Any] = {"dry_run": dry, "device": self.cell({"device": True}), "parts": {}}

    def all(self, parts: list[str]) -> None:
        """Every part in its turn."""
        for part in parts:
            rows = self.found["parts"].setdefault(part, [])
            for row in self.work(part):
                rows.append({"status": "not run: no time was left"} if self.end < time.monotonic() else row())
                (self.out / "gpu.json").write_text(json.dumps(self.found, indent=1) + "\n")
                (self.out / "gpu.md").write_text(page(self.found))
                print(f"{part}: {said(rows[-1])}", flush=True)

    def work(self, part: str) -> list[Callable[[], dict[str, Any]]]:
        """The rows of a part, not yet measured."""
        if part == "gpt2":
            return [self.beside_nanogpt]
        if part == "tests":
            return [self.tests]
        return [lambda spec=spec: self.measured(spec) for spec in CELLS[part]]  # type: ignore[misc]  # a default

    def spec(self, spec: dict[str, Any]) -> dict[str, Any]:
        """A cell with its data, and in a dry run with a tiny model."""
        words = spec["words"]
        if self.dry:
            big = ("model", "data.", "compile=", "speed.attention=")
            words = [word for word in words if not word.startswith(big)]
            words += ["model=tiny", "model.vocab=1000", "data.length=64", "data.batch=4"]
            words += ["model.dropout=0"] if "optimizer=muon" not in words else []
        return {**spec, "words": [*words, "data=shards", f"data.path={self.data}", "steps=100000"], "dry": self.dry}

    def measured(self, spec: dict[str, Any]) -> dict[str, Any]:
        """A cell's row."""
        row: dict[str, Any] = {"cell": " ".join(spec["words"])}
        if "cap_gb" in spec:
            row["cell"] += f", capped to {spec['cap_gb']} GB"
        if "speed.attention=flash" in spec["words"] and importlib.util.find_spec("flash_attn") is None:
            return row | {"status": "not run: flash-attn is not installed"}
        return row | self.cell(self.spec(spec))

    def cell(self, spec: dict[str, Any]) -> dict[str, Any]:
        """What a process found: the last thing that it said, also where it had to be stopped."""
        command = [sys.executable, gpu_cells.__file__, json.dumps(spec)]
        limit = min(CELL_S, max(self.end - time.monotonic(), 30))
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            out, ended = done.stdout, done.stderr if done.returncode else ""
        except subprocess.TimeoutExpired as stopped:
            out, ended = (
                (stopped.stdout or b"").decode(),
                f"stopped after {limit:.0f} s",
            )  # it has bytes, whatever `text` says
        lines = [line for line in out.splitlines() if line.startswith("{")]
        found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        if ended:
            found["status"] = (
                "failed: " + ended.strip().splitlines()[-1] if not lines else ended.strip().splitlines()[-1]
            )
        return found

    def beside_nanogpt(self) -> dict[str, Any]:
        """Both take turns."""
        if self.nanogpt is None:
            return {"status": "not run: --nanogpt says where its model.py is"}
        spec = self.spec({"words": [*GPT2, "precision=bf16", "compile=full"], "turn_s": 0.05 if self.dry else TURN_S})
        if self.dry:
            spec["words"].append("compile=full")
        seconds: dict[str, list[float]] = {"trainkit": [], "nanoGPT": []}
        with ExitStack() as stack:
            ask = {
                system: stack.enter_context(
                    turns.worker([sys.executable, gpu_cells.__file__, json.dumps({**spec, "system": system, **more})])
                )
                for system, more in (("trainkit", {}), ("nanoGPT", {"nanogpt": str(self.nanogpt)}))
            }
            for number in range(ROUNDS + 1):
                for system, turn in ask.items():
                    found = turn()
                    if number:  # the first one warms up
                        seconds[system].append(found["seconds_per_step"])
        return {"cell": "gpt2, 32 rows of 1,024", **gpu_cells.compared(seconds, found), "status": "ok"}

    def tests(self) -> dict[str, Any]:
        """Those that are marked."""
        if importlib.util.find_spec("pytest") is None:
            return {"cell": "tests", "status": "not run: pytest is not installed"}
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
        root = Path(__file__).parents[1]
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=CELL_S)
        except subprocess.TimeoutExpired:
            return {"cell": "tests", "status": f"stopped after {CELL_S} s"}
        last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
        return {"cell": "tests", "status": last[0] if last else f"exit code {done.returncode}"}


def said(row: dict[str, Any]) -> str:
    """A row in a line."""
    return ", ".join(f"{name} {show(value)}" for name, value in row.items() if not isinstance(value, list | dict))


def show(value: Any) -> str:
    """A figure for a person."""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def page(found: dict[str, Any]) -> str:
    """All of it as tables."""
    device = found["device"]
    lines = [f"{device.get('name')}, torch {device.get('torch')}, Python {device.get('python')}, {device.get('time')}"]
    lines += ["", "**A dry run on a CPU with tiny models: these figures mean nothing.**"] if found["dry_run"] else []
    for part, rows in found["parts"].items():
        columns = list(dict.fromkeys(k for row in rows for k, v in row.items() if not isinstance(v, list | dict)))
        lines += ["", f"## {part}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(show(row[k]) if k in row else "" for k in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
