"""Scores a checkpoint on held-out sets: its greedy answers by the metrics of benchmarks, and the loss.

  python -m internvl_jax.evaluate --model DIR --annotation test.jsonl [--root images] [--metrics anls,loss] [--output DIR]
  python -m internvl_jax.evaluate --model DIR --annotation sets.json
  python -m internvl_jax.evaluate --model SWEEP --annotation sets.json

The lines have the training format; of each, the last answer is what is asked for, and each is asked alone. sets.json names
several sets and the metrics of each: {"vqa": {"annotation": "vqa.jsonl", "root": "images", "metrics": ["vqa_accuracy"]}}.
Writes eval_results.json (the metrics, also by the lines' field --group_field) and predictions.jsonl. Of a folder of models, such
as `convert --interpolate` writes, each is scored, and a table is printed; sweep_results.json has them all.
"""

import json
import os
from collections.abc import Sequence

from absl import flags, logging

from internvl_jax import cli
from internvl_jax.arguments import EvalConfig
from internvl_jax.errors import UserError
from internvl_jax.storage.paths import AnyPath, filled, is_bucket, output_path, path_of

_MODEL = flags.DEFINE_string(
  "model", None, "Checkpoint folder, or one of several; hub id or a bucket's URL.", required=True
)
_ANNOTATION = flags.DEFINE_string(
  "annotation", None, "The jsonl of questions, or JSON that names several sets.", required=True
)
_METRICS = flags.DEFINE_list(
  "metrics", ["accuracy"], "Metrics of sets that name none; see docs/evaluation.md."
)
_ROOT = flags.DEFINE_string("root", "", "Prefix of the image paths.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the results; the model's folder if unset.")
_GROUP_FIELD = flags.DEFINE_string("group_field", None, "Field of the lines to report by.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Questions answered at once.", lower_bound=1)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Longest answer in tokens.", lower_bound=1)
_LIMIT = flags.DEFINE_integer("limit", None, "Score the first so many questions only.", lower_bound=1)
_COMPRESS = flags.DEFINE_string(
  "compress",
  "auto",
  "Tiles that an InternVL3.5-Flash compresses: auto (by its config.json), all, none, or its two thresholds (0.3,0.5).",
)
_BF16 = flags.DEFINE_bool("bf16", False, "Compute in bfloat16.")
_DEVICES = flags.DEFINE_integer(
  "devices", 1, "Devices that share the weights, heads and the key-value cache.", lower_bound=1
)


def main(argv: Sequence[str]) -> None:
  """Answers, scores and writes."""
  del argv
  cli.set_up_logging()
  output = output_folder()
  from internvl_jax import sweep

  config = EvalConfig(
    annotation=_ANNOTATION.value,
    root=_ROOT.value,
    metrics=tuple(_METRICS.value),
    group_field=_GROUP_FIELD.value,
    batch_size=_BATCH_SIZE.value,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    limit=_LIMIT.value,
    compress=_COMPRESS.value,
  )
  if models := sweep.models_in(path_of(_MODEL.value)):
    found = sweep.score_models(models, config, output, bf16=_BF16.value, devices=_DEVICES.value)
    print(sweep.table_of(found))
  else:
    score_model(config, output)


def score_model(config: EvalConfig, output: AnyPath) -> None:
  """Scores the one model."""
  from internvl_jax.eval.scoring import make_evaluation, summary
  from internvl_jax.inference import open_for_inference

  opened = open_for_inference(_MODEL.value, bf16=_BF16.value, devices=_DEVICES.value)
  if (opened.max_new_tokens or 0) > _MAX_NEW_TOKENS.value:
    logging.warning(
      "generation_config.json says max_new_tokens=%d; --max_new_tokens=%d is followed",
      *(opened.max_new_tokens, _MAX_NEW_TOKENS.value),
    )
  evaluation = make_evaluation(
    config, opened.data, opened.source, opened.tokenizer, opened.how, stop_ids=opened.stop_ids
  )
  assert evaluation is not None
  evaluation.check()
  scores = evaluation.run(opened.params)
  with filled(output) as folder:
    evaluation.write(scores, folder)
  print(json.dumps(summary(scores), indent=2))


def output_folder() -> AnyPath:
  """Where the results go, which is made; before anything is computed.

  Raises:
    UserError: it cannot be told, or is no folder.
  """
  if _OUTPUT.value is None and not (is_bucket(_MODEL.value) or os.path.isdir(_MODEL.value)):
    raise UserError(
      f"--output is missing: --model={_MODEL.value} is no folder here to write into; name a folder for the results"
    )
  output = output_path(_OUTPUT.value or _MODEL.value, "--output")
  if output.exists() and not output.is_dir():
    raise UserError(f"--output={output}: is a file; name a folder")
  output.mkdir(parents=True, exist_ok=True)
  return output


if __name__ == "__main__":
  cli.run_app(main)
