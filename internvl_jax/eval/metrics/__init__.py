"""Metrics of answers by name; docs/evaluation.md has their definitions.

A metric is a function of all answers of a set, which gives a score for each; the set's score is their mean. To add one, write
the function and a line of `METRICS`.
"""

from collections.abc import Callable, Sequence

from internvl_jax.eval.metrics.answered import Answered
from internvl_jax.eval.metrics.boxes import iou, iou_accuracy
from internvl_jax.eval.metrics.captions import cider, rouge_l
from internvl_jax.eval.metrics.choices import choice, mmmu
from internvl_jax.eval.metrics.edit_distance import anls
from internvl_jax.eval.metrics.exact import accuracy, contains, exact_match
from internvl_jax.eval.metrics.relaxed import relaxed_accuracy
from internvl_jax.eval.metrics.vqa import vqa_accuracy

Metric = Callable[[Sequence[Answered]], list[float]]
"""Gives a score for each answer of a set."""

METRICS: dict[str, Metric] = {
  "accuracy": accuracy,
  "exact_match": exact_match,
  "contains": contains,
  "vqa_accuracy": vqa_accuracy,
  "anls": anls,
  "relaxed_accuracy": relaxed_accuracy,
  "choice": choice,
  "mmmu": mmmu,
  "iou": iou,
  "iou_accuracy": iou_accuracy,
  "cider": cider,
  "rouge_l": rouge_l,
}
"""The metrics of answers by name."""

LOSS = "loss"
"""The metric that needs no answer: the cross-entropy of what training would learn of a set."""
