"""The official QVHighlights scores as an `evaluate` module: a thin wrapper of `evaluate_predictions`."""

import json

# One a line: `evaluate` reads these lines itself, to see what must be installed
import datasets
import evaluate

from modeling_diffusionvmr.training.metrics import evaluate_predictions

DESCRIPTION = "Video moment retrieval and highlight detection, scored as the official evaluation of QVHighlights does."
CITATION = """\
@inproceedings{lei2021detecting,
  title = {Detecting Moments and Highlights in Videos via Natural Language Queries},
  author = {Lei, Jie and Berg, Tamara L. and Bansal, Mohit},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2021}
}
"""


def _to_json(row: dict) -> str:
    return json.dumps(row, default=lambda array: array.tolist())


class VideoMomentRetrieval(evaluate.Metric):
    """Predictions and references are dicts, as `evaluate_predictions` takes them, and in any order."""

    def _info(self):
        # Rows travel as JSON, since Arrow would ask every row for the same fields, and every qid for one type
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=evaluate_predictions.__doc__,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def add(self, *, prediction, reference):
        """Adds one of each."""
        super().add(prediction=_to_json(prediction), reference=_to_json(reference))

    def add_batch(self, *, predictions, references):
        """Adds lists of them."""
        super().add_batch(predictions=list(map(_to_json, predictions)), references=list(map(_to_json, references)))

    def _compute(self, predictions, references):
        return evaluate_predictions(list(map(json.loads, predictions)), list(map(json.loads, references)))
