"""Learn to answer: next-token prediction over what an assistant wrote (Ouyang et al. 2022, arXiv:2203.02155)."""

from typing import ClassVar, Literal

from trainkit.config import config
from trainkit.tasks.causal_lm import NextToken


@config
class SFT(NextToken):
    """Supervised fine-tuning. What has a loss, and what stands in a row together, is the data's to say (`data=chat`)."""

    takes: ClassVar[str] = "conversations"
    kind: Literal["sft"] = "sft"
