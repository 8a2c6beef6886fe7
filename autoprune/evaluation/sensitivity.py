"""Sensitivity: the drop of the score when one layer alone is pruned, at anchor sparsities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autoprune.errors import FileError
from autoprune.evaluation.evaluator import Evaluator
from autoprune.files import read_json, write_json
from autoprune.plan import LayerPlan, Plan
from autoprune.progress import SILENT, Progress
from autoprune.registry import Choice

ANCHORS = (0.5, 0.7, 0.8, 0.9, 0.95)

Drops = dict[str, tuple[float, ...]]


def probe_sensitivity(
    evaluator: Evaluator,
    names: Sequence[str],
    dense_score: float,
    pattern: Choice,
    criterion: Choice,
    *,
    path: Path | None = None,
    progress: Progress = SILENT,
) -> Drops:
    """Prunes each layer alone to each anchor and scores it: layer -> drop of the score at ANCHORS, >= 0.

    Args:
        evaluator: masks, recovers and scores.
        names: the layers.
        dense_score: what nothing pruned scores.
        pattern: of the probes; likewise `criterion`.
        criterion: scores the weights.
        path: a JSON file that keeps finished layers, so that an interrupted probe goes on where it stopped.
        progress: shows a bar over the layers.
    """
    drops = _read(path, pattern, criterion)
    with progress.bar("sensitivity", len(names)) as bar:
        for name in names:
            if name not in drops:
                scores = [_score(evaluator, name, LayerPlan(anchor, pattern, criterion)) for anchor in ANCHORS]
                drops[name] = tuple(max(0.0, dense_score - score) for score in scores)
                if path is not None:
                    about = {"anchors": ANCHORS, "pattern": str(pattern), "criterion": str(criterion)}
                    write_json(path, {**about, "drops": drops})
            bar.advance()
    return {name: drops[name] for name in names}


def _score(evaluator: Evaluator, name: str, layer: LayerPlan) -> float:
    plan = Plan({name: layer})
    return evaluator.score(evaluator.repacked(evaluator.masked_model(plan), plan))


def _read(path: Path | None, pattern: Choice, criterion: Choice) -> Drops:
    if path is None or not path.exists():
        return {}
    data = read_json(path, "the sensitivity curves")
    try:
        if (data["anchors"], data["pattern"], data["criterion"]) != (list(ANCHORS), str(pattern), str(criterion)):
            return {}
        drops = {str(name): tuple(float(value) for value in values) for name, values in data["drops"].items()}
        if any(len(values) != len(ANCHORS) for values in drops.values()):
            raise ValueError("a curve is short")
        return drops
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"the sensitivity curves are corrupt: {path} ({error}). Delete the file.") from None
