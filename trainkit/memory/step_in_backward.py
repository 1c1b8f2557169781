"""Each parameter's update in the backward, after which its gradient is freed (Lv et al. 2024, arXiv:2306.09782):
`optimizers/in_backward.py`.

Grade: exact.
"""

from typing import Any, ClassVar

from trainkit.config import config


@config
class StepInBackward:
    """Only where an update needs no more than its own gradient: nothing is known of the others yet."""

    grade: ClassVar[str] = "exact"

    def check(
        self,
        *,
        memory: Any,
        clip: float,
        precision: Any,
        guard: Any,
        parallel: Any,
        batch: int,
        deterministic: str,
        **_: Any,
    ) -> None:
        """Raise ValueError where something has to be known of all gradients before an update."""
        rows = memory.microbatch or batch
        rows, told = (1, "auto") if rows == "auto" else (rows, rows)
        for wrong, why in {
            "the gradient's norm is not known yet: set clip=0": clip > 0,
            f"microbatches of {told} rows add their gradients up first: set memory.microbatch=null": rows < batch,
            "precision=fp16 leaves out updates that overflow: use precision=bf16": precision.compute == "float16",
            "guard=skip leaves out single updates: use guard.policy=stop or guard=rewind": guard.policy == "skip",
            "guard.spike looks at the loss of all ranks first: set guard.spike=null": guard.spike is not None,
            "guard.check_every computes a step twice first: set guard.check_every=null": guard.check_every is not None,
            "parallel=ddp sums gradients after it: use parallel=fsdp": parallel.copies,
            "deterministic=elastic sums gradients after it: use deterministic=layout": deterministic == "elastic",
            "memory=offload_optimizer wants many gradients at once: take one of the two": memory.offload_optimizer,
            "memory.grad_dtype is for gradients that are kept: set memory.grad_dtype=null": memory.grad_dtype,
        }.items():
            if why:
                raise ValueError(f"memory=step_in_backward makes updates in the backward, and {wrong}")
