"""TensorBoard event files in the run's `tensorboard` folder."""

from collections.abc import Mapping
from pathlib import Path

from trainkit.config import config

NAMES = {
    "loss": "Loss/train",
    "val_loss": "Loss/val",
    "val_perplexity": "Perplexity/val",
    "val_bits_per_byte": "BitsPerByte/val",
    "tokens_per_s": "Throughput/tokens_per_sec",
    "mfu": "Throughput/mfu",
    "memory_gb": "Memory/allocated_gb",
    "gpu_power_w": "GPU/power_w",
    "gpu_temperature_c": "GPU/temperature_c",
    "gpu_clock_mhz": "GPU/clock_mhz",
    "gpu_busy": "GPU/busy",
    "lr": "LR",
    "grad_norm": "GradNorm",
    "epoch": "Progress/epoch",
    "tokens": "Progress/tokens",
    "checkpoint_save_s": "Checkpoint/save_s",
    "checkpoint_stall_s": "Checkpoint/stall_s",
}
UNSHOWN = ("time", "eta_s")  # TensorBoard has its own clock


@config
class Tensorboard:
    """Scalars, the composed config and samples as text."""

    def build(self, folder: Path) -> "TensorboardTracker":
        """A tracker that writes when the run starts."""
        return TensorboardTracker(folder / "tensorboard")


class TensorboardTracker:
    """Scalars under the names of `NAMES`; another metric keeps its own, a `val_<metric>` as `<metric>/val`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, header: Mapping[str, str], step: int, steps: int, config: str) -> None:
        """On a restart TensorBoard hides what was logged beyond `step`."""
        self._open(step)
        lines = [f"    {line}" for line in config.splitlines()]  # indented: Markdown shows it as it is
        self._writer.add_text("Config", "\n".join(lines), step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if name not in UNSHOWN:
                own = f"{name.removeprefix('val_')}/val" if name.startswith("val_") else name
                self._writer.add_scalar(NAMES.get(name, own), value, step)
        self._writer.flush()  # a killed run keeps what was logged before its last checkpoint

    def go_back(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1 if step else None)

    def text(self, step: int, tag: str, text: str) -> None:
        self._writer.add_text(f"{tag.capitalize()}s", "\n".join(f"    {line}" for line in text.splitlines()), step)

    def note(self, message: str) -> None:
        """Notes are for the person who watches."""

    def close(self, status: str) -> None:
        self._writer.close()
