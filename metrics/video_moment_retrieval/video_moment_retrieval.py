"""The official QVHighlights metrics as an `evaluate` module: a thin wrapper around `evaluate_predictions`."""

import json

# One import per line: `evaluate` parses these lines itself to find missing packages, and cannot read `import a, b`
import datasets
import evaluate

from modeling_diffusionvmr.data.benchmarks import QVHIGHLIGHTS
from modeling_diffusionvmr.training.metrics import evaluate_predictions

DESCRIPTION = "Video moment retrieval and highlight detection, scored like the official evaluation of QVHighlights."


def _to_json(row: dict) -> str:
    return json.dumps(row, default=lambda array: array.tolist())


class VideoMomentRetrieval(evaluate.Metric):
    """Takes predictions and references as dicts, in any order, as `evaluate_predictions` does."""

    def _info(self):
        # Rows travel as JSON, since Arrow requires the same fields in every row and one type for all qids
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=QVHIGHLIGHTS.citation,
            inputs_description=evaluate_predictions.__doc__,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def add(self, *, prediction, reference):
        """Add one prediction and one reference."""
        super().add(prediction=_to_json(prediction), reference=_to_json(reference))

    def add_batch(self, *, predictions, references):
        """Add lists of predictions and references."""
        super().add_batch(predictions=list(map(_to_json, predictions)), references=list(map(_to_json, references)))

    def _compute(self, predictions, references):
        return evaluate_predictions(list(map(json.loads, predictions)), list(map(json.loads, references)))
