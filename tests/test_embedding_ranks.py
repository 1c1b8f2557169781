"""The embedding task on real ranks: the same gradients, and the same bits where these are promised."""

import pytest
import torch

from tests.ranks import in_ranks
from tests.test_embedding import LOSSES, N, batch, learned, model, same
from trainkit.parallel import Parallel
from trainkit.tasks import Embedding


def same_gradients(kind: str) -> None:
    """Each rank has a part of the rows, and the gradient of all of them, in float64 and float32."""
    ranks = Parallel(kind=kind, device="cpu").join(torch.device("cpu"))  # type: ignore[arg-type]
    each = N // ranks.size
    for words in LOSSES:
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            task, data = Embedding(**words), batch()
            loss, grads = learned(task, model(task, dtype), data, N)
            mine = {name: tensor[ranks.rank * each : (ranks.rank + 1) * each] for name, tensor in data.items()}
            for rows in (1, each):
                it = ranks.apply(model(task, dtype))
                torch.manual_seed(5)
                found = task.backward(it, mine, microbatch=rows, ranks=ranks)
                own = [torch.zeros_like(p) if p.grad is None else ranks.whole(p.grad) for p in it.parameters()]
                own = [ranks.whole(g) for g in own]
                torch.testing.assert_close(found["loss"], loss, rtol=tolerance, atol=0)
                same(own, grads, tolerance)
    ranks.leave()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_make_the_gradient_of_the_whole_batch(kind: str) -> None:
    in_ranks(2, same_gradients, kind)
