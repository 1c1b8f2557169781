"""A training step of the same model by trainkit, nanoGPT, the Hugging Face Trainer and a plain torch loop.

    python benchmarks/vs_peers.py --nanogpt PATH_TO_A_CHECKOUT [--rounds 7] [--json FILE]

The model is GPT-2-shaped: 6 layers, width 384, 6 heads, vocabulary 50,304, tied, no bias, no dropout; 8 rows of 256
tokens; AdamW, gradients clipped at 1. Every system has a process of its own, set up in its own way; they take turns, a few
steps each, for several rounds; the figure is the median step. The first round warms up, and so does the first step of a turn.

Before and after each turn the rate of a matrix product is measured, too: a turn of trainkit has its MFU of the median product
around it, as its step is the median one, and another of the upper quartile, where less of the products than of the step met
another's load. The figures are those of the median turn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import random_shards
import turns
from peers import BATCH, CONTEXT, HEADS, LAYERS, VOCAB, WIDTH, Turn, hf_trainer, nanogpt, plain, timed

SYSTEMS = ("trainkit", "nanoGPT", "HF Trainer", "plain torch")
ROWS = [(precision, compiled) for precision in ("fp32", "bf16") for compiled in (False, True)]


def trainkit(precision: str, compiled: bool, data: Path) -> tuple[Turn, dict[str, float]]:
    """`Learner.train_step`, and what of it is spent outside forward, backward and optimizer."""
    from trainkit import build, optimizers
    from trainkit import run as runs

    words = f"vocab={VOCAB} width={WIDTH} depth={LAYERS} context={CONTEXT} attention.heads={HEADS} norm=layernorm"
    words += " position=learned mlp.activation=gelu"
    overrides = [f"model.{word}" for word in words.split()]
    overrides += ["data=shards", f"data.path={data}", f"data.length={CONTEXT}", f"data.batch={BATCH}", "steps=100000"]
    overrides += [f"precision={precision}", f"compile={'full' if compiled else 'off'}"]
    overrides += ["speed.attention=math"] if compiled or precision == "bf16" else []
    run = runs.composed(overrides)
    learner = build.learner(run, run.data.open(), build.ranks(run))
    spent = {"inside": 0.0, "whole": 0.0}

    def inside(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            found = function(*args, **kwargs)
            spent["inside"] += time.perf_counter() - begin
            return found

        return counted

    object.__setattr__(learner.task, "backward", inside(learner.task.backward))
    optimizers.step = inside(optimizers.step)
    learner.clip_gradients = inside(learner.clip_gradients)  # type: ignore[method-assign]
    learner.optimizer.zero_grad = inside(learner.optimizer.zero_grad)  # type: ignore[method-assign]

    def step() -> None:
        begin = time.perf_counter()
        float(learner.train_step()["loss"])
        spent["whole"] += time.perf_counter() - begin

    return timed(step), spent


def measure(precision: str, compiled: bool, rounds: int, checkout: Path, same_malloc: bool) -> dict[str, Any]:
    """One row: every system in a process of its own, which takes a turn whenever it is told to."""
    with tempfile.TemporaryDirectory() as name:
        data = random_shards.write(Path(name), VOCAB, 400_000)
        seconds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
        rates, of_median, of_quartile = [], [], []
        with ExitStack() as stack:
            row = f"{precision}-{'compiled' if compiled else 'eager'}"
            say = [sys.executable, __file__, "--nanogpt", str(checkout), "--row", row, "--data", str(data)]
            say += [*(["--same-malloc"] if same_malloc else []), "--system"]
            workers = {system: stack.enter_context(turns.worker([*say, system])) for system in SYSTEMS}
            for number in range(rounds + 1):
                for system, ask in workers.items():
                    around = matmul_rates(precision)
                    found = ask()
                    around += matmul_rates(precision)
                    if not number:
                        continue
                    seconds[system] += found["seconds"]
                    if system == "trainkit":
                        outside, step = found["outside"], statistics.median(found["seconds"])
                        _, middle, upper = statistics.quantiles(around, n=4)
                        rates += around
                        of_median.append(step * middle)
                        of_quartile.append(step * upper)
    from trainkit import run as runs

    flops = runs.composed(["model=gpt2", f"model.vocab={VOCAB}", f"model.width={WIDTH}", f"model.depth={LAYERS}",
                           f"model.attention.heads={HEADS}", "model.bias=false"]).model.flops_per_token(CONTEXT)  # fmt: skip
    medians = {system: statistics.median(found) for system, found in seconds.items()}
    return {
        "precision": precision,
        "compiled": compiled,
        "tokens_per_s": {system: BATCH * CONTEXT / median for system, median in medians.items()},
        "spread": {system: max(found) / min(found) for system, found in seconds.items()},
        "outside": outside,
        "matmul_gflops": statistics.median(rates) / 1e9,
        "mfu": BATCH * CONTEXT * flops / statistics.median(of_median),
        "mfu_of_upper_quartile": BATCH * CONTEXT * flops / statistics.median(of_quartile),
    }


def work(system: str, precision: str, compiled: bool, data: Path, checkout: Path, same_malloc: bool) -> None:
    """A system's process: a turn for every line that comes in."""
    import torch

    if same_malloc:
        from trainkit.speed import keep_freed

        keep_freed()

    torch.manual_seed(0)
    spent = {"inside": 0.0, "whole": 0.0}
    if system == "trainkit":
        turn, spent = trainkit(precision, compiled, data)
    elif system == "nanoGPT":
        turn = nanogpt(precision, compiled, data, checkout)
    elif system == "HF Trainer":
        turn = hf_trainer(precision, compiled, data, data.parent / "hf")
    else:
        turn = plain(precision, compiled, data)

    def take() -> dict[str, Any]:
        spent.update(inside=0.0, whole=0.0)
        return {"seconds": turn(), "outside": 1 - spent["inside"] / spent["whole"] if spent["whole"] else 0.0}

    turns.serve(take)


def matmul_rates(precision: str) -> list[float]:
    import torch

    from trainkit import hardware

    return hardware.product_rates(torch.device("cpu"), torch.bfloat16 if precision == "bf16" else torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--nanogpt", type=Path, required=True, help="a checkout of nanoGPT, or a folder with its model.py"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--same-malloc", action="store_true", help="give the peers what speed.keep_freed does, too")
    parser.add_argument("--row", help="only this row, such as bf16-compiled; prints JSON")
    parser.add_argument("--system", choices=SYSTEMS, help="be this system's process; for the script itself")
    parser.add_argument("--data", type=Path, help="its data")
    arguments = parser.parse_args()
    if arguments.row:
        precision, _, way = arguments.row.partition("-")
        if arguments.system:
            work(
                arguments.system,
                precision,
                way == "compiled",
                arguments.data,
                arguments.nanogpt,
                arguments.same_malloc and precision == "bf16",  # where trainkit does so
            )
            return
        print(
            json.dumps(
                measure(precision, way == "compiled", arguments.rounds, arguments.nanogpt, arguments.same_malloc)
            )
        )
        return
    rows = []
    for precision, compiled in ROWS:
        row = f"{precision}-{'compiled' if compiled else 'eager'}"
        command = [sys.executable, __file__, "--nanogpt", str(arguments.nanogpt), "--rounds", str(arguments.rounds)]
        command += ["--same-malloc"] if arguments.same_malloc else []
        found = subprocess.run([*command, "--row", row], stdout=subprocess.PIPE, check=True, env=os.environ)
        rows.append(json.loads(found.stdout.splitlines()[-1]))
        show(rows[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


def show(row: dict[str, Any]) -> None:
    speeds = row["tokens_per_s"]
    best = max(speed for system, speed in speeds.items() if system != "trainkit")
    nano = speeds["trainkit"] / speeds["nanoGPT"]
    cells = " | ".join(f"{speed:,.0f}" for speed in speeds.values())
    name = f"{row['precision']} {'compiled' if row['compiled'] else 'eager'}"
    ratio, outside = speeds["trainkit"] / best, row["outside"]
    mfu = f"{row['mfu']:.0%} ({row['mfu_of_upper_quartile']:.0%}) of {row['matmul_gflops']:.0f} GFLOP/s"
    print(f"| {name} | {cells} | {nano:.2f} | {ratio:.2f} | {mfu} | {outside:.2%} |", flush=True)


if __name__ == "__main__":
    main()
