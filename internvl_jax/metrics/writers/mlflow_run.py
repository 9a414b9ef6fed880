"""MLflow: https://mlflow.org/docs/latest/ml/tracking."""

import time
from collections.abc import Sequence
from typing import Any

import mlflow  # pyright: ignore[reportMissingImports]
from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]
from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]
from PIL import Image

from internvl_jax.eval.shown import Shown
from internvl_jax.metrics.writers import TrackedRun, Writer, scalars
from internvl_jax.metrics.writers.shown_table import shown_table

_PARAMS = 100
"""Most parameters of a request."""

_LONGEST = 500
"""Most characters of a parameter's value that all versions of servers take."""

_BLANK = Image.new("RGB", (1, 1), "white")  # A column of images takes nothing else.


class MLflow(Writer):
  """A run of MLflow, where MLFLOW_TRACKING_URI says; by default mlflow.db in the working directory."""

  def __init__(self, run: TrackedRun):
    """Creates the run in its experiment, or goes on with it by its id."""
    self._client, self._status, self._step = MlflowClient(), "FINISHED", 0
    known = run.ids.get("mlflow")
    self._id = known or self._create(run)
    run.ids.keep("mlflow", self._id)
    if known:
      self._client.update_run(known, status="RUNNING")
    # Parameters of a run cannot change; a file can.
    self._client.log_dict(self._id, dict(run.config), "train_config.json")

  def _create(self, run: TrackedRun) -> str:
    name = run.project("MLFLOW_EXPERIMENT_NAME")
    experiment = self._client.get_experiment_by_name(name)
    within = experiment.experiment_id if experiment else self._client.create_experiment(name)
    tags = dict.fromkeys(run.tags, "true")
    created = self._client.create_run(within, run_name=run.name, tags=tags).info.run_id
    fields = [
      (f"{leaf}.{key}", value) for leaf, values in run.config.items() for key, value in values.items()
    ]
    params = [Param(path, str(value)[:_LONGEST]) for path, value in fields]
    for start in range(0, len(params), _PARAMS):
      self._client.log_batch(created, params=params[start : start + _PARAMS])
    return created

  def add_entry(self, entry: dict[str, Any]) -> None:
    """Logs the values."""
    self._step = entry["step"]
    self._log(scalars(entry))

  def predictions(self, step: int, set_name: str, shown: Sequence[Shown]) -> None:
    """Logs a table, a file for each evaluation."""
    columns, rows = shown_table(shown, mlflow.Image, blank=mlflow.Image(_BLANK))
    table = {column: [row[i] for row in rows] for i, column in enumerate(columns)}
    self._client.log_table(self._id, table, f"predictions/{set_name}-{step}.json")

  def save_results(self, results: dict[str, Any]) -> None:
    """Logs them as metrics of the last step."""
    self._log({name: value for name, value in results.items() if value is not None})

  def _log(self, values: dict[str, float]) -> None:
    now = int(time.time() * 1000)
    metrics = [Metric(name, float(value), now, self._step) for name, value in values.items()]
    self._client.log_batch(self._id, metrics)

  def fail(self, error: BaseException) -> None:
    """The run is shown as failed."""
    del error
    self._status = "FAILED"

  def close(self) -> None:
    """Ends the run."""
    self._client.set_terminated(self._id, self._status)
