"""Draw docs/schedules.svg: every schedule as `scale` computes it.

python scripts/plot_schedules.py
"""

from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from trainkit.schedules import Schedule

STEPS, WARMUP, FLOOR = 1000, 100, 0.1
KINDS = ("cosine", "linear", "one_cycle", "wsd", "constant", "inverse_sqrt")


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "trainkit"  # the same bytes every time
    figure, every_axes = plt.subplots(2, 3, figsize=(9, 4.2), sharex=True, sharey=True, layout="constrained")
    for axes, kind in zip(every_axes.flat, KINDS, strict=True):
        schedule = Schedule(kind=kind, warmup=WARMUP, floor=FLOOR)  # type: ignore[arg-type]  # one of the literals
        axes.plot([schedule.scale(step, STEPS) for step in range(STEPS)], color="tab:cyan", linewidth=2)
        axes.set_title(kind, fontsize=10)
        axes.grid(alpha=0.3)
        axes.set_ylim(0, 1.05)
    figure.supxlabel(f"step, warmup={WARMUP}, floor={FLOOR}", fontsize=9)
    figure.supylabel("factor on the peak learning rate", fontsize=9)
    docs = Path(__file__).parents[1] / "docs"
    figure.savefig(docs / "schedules.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
