"""What of a run is left when a save goes wrong: trainkit and its peers under the same faults.

    python -m benchmarks.reliability [--systems nanogpt hf-trainer ...] [--flips 300] [--json FILE]

Linux, a C compiler and trainkit's own environment are enough for the systems that torch alone makes up. The others need
`pip install transformers accelerate lightning`; a row whose package is missing is left out, and said to be.

Every system saves steps 1 and 2 as its own documentation says. A fault is then injected at each call in the save of step
3 that changes a disk (they are counted first), and the system's own automatic resume is asked for the newest checkpoint:

    OK     it gives all of step 3, or all of step 2 where step 3 was not acknowledged
    STUCK  it raises or dies although a whole checkpoint is on the disk: a person must find it and name it
    MIXED  it gives, without a word, what is not the state of any one step
    LOST   no whole checkpoint of an acknowledged step is left, or it starts from an older step or zero without a word

The faults: `kill` (SIGKILL instead of the call), `torn` (half of a write, then SIGKILL), `full` (that call and all that
come after fail with ENOSPC, removals too). A power cut is not among them: whatever was written is still there. A call
that reaches the kernel past the C library goes unseen: the rename inside safetensors does.
"""

import shutil
import sys
from dataclasses import dataclass
from importlib import metadata, util


@dataclass(frozen=True)
class Listed:
    """A system by its title, the packages it is made of (the first one's version is told) and where its code is.

    With `elsewhere`, temporary files lie on another filesystem than the checkpoints, as on most clusters.
    """

    title: str
    packages: tuple[str, ...]
    module: str
    name: str
    elsewhere: bool = False

    @property
    def missing(self) -> list[str]:
        return [package for package in self.packages if util.find_spec(package) is None]

    @property
    def titled(self) -> str:
        return f"{self.title} ({self.packages[0]} {metadata.version(self.packages[0])})"


SYSTEMS = {
    "nanogpt": Listed("`torch.save` in place, as nanoGPT does", ("torch",), "by_hand", "InPlace"),
    "replace": Listed("`torch.save` and `os.replace`", ("torch",), "by_hand", "Replaced"),
    "safetensors": Listed("`safetensors.torch.save_file`, one file", ("safetensors",), "by_hand", "Safetensors"),
    "dcp": Listed("torch DCP, one folder", ("torch",), "by_hand", "DcpInPlace"),
    "dcp-2-ranks": Listed("torch DCP, one folder, two ranks, the fault in one", ("torch",), "two_ranks", "DcpTwoRanks"),
    "dcp-steps": Listed("torch DCP, a folder a step, two kept", ("torch",), "by_hand", "DcpSteps"),
    "hf-trainer": Listed(
        "Hugging Face Trainer, save_total_limit=2", ("transformers", "accelerate"), "hugging_face", "HfTrainer"
    ),
    "accelerate-2": Listed("Accelerate save_state, total_limit=2", ("accelerate",), "hugging_face", "AccelerateTwo"),
    "accelerate-1": Listed("Accelerate save_state, total_limit=1", ("accelerate",), "hugging_face", "AccelerateOne"),
    "lightning": Listed("Lightning ModelCheckpoint, save_last", ("lightning",), "with_lightning", "Lightning"),
    "lightning-tmp": Listed(
        "Lightning, the same, TMPDIR on another filesystem",
        ("lightning",),
        "with_lightning",
        "Lightning",
        elsewhere=True,
    ),
    "trainkit": Listed("trainkit, checkpoint.keep=2", ("trainkit",), "by_hand", "Trainkit"),
}
FLIPPED = {"nanogpt": "torch.save", "safetensors": "safetensors", "dcp-steps": "torch DCP", "trainkit": "trainkit"}


def compiler() -> str | None:
    """What compiles the shim; None where the benchmark cannot run."""
    return (shutil.which("cc") or shutil.which("gcc")) if sys.platform == "linux" else None
