"""The optimizer's states, and its step, on the CPU (Ren et al. 2021, arXiv:2101.06840): `optimizers/offloaded.py`.

Grade: exact, beside the same optimizer on a CPU. Where all is on a CPU it only copies: it is there so that its neutrality is
tested everywhere.
"""

from typing import ClassVar

from trainkit.config import config


@config
class OffloadOptimizer:
    """What the device keeps is weights and gradients; the host keeps a second copy of the weights beside the states."""

    grade: ClassVar[str] = "exact"
