"""The measurement of the host's memory runs, at toy size."""

import pickle
import sys

import numpy as np
import pytest

from internvl_jax.data.load import row_count
from internvl_jax.data.source.sizes import MeasureLines
from internvl_jax.hf import published, weights
from internvl_jax.hf.model import open_source, source_of_config
from tests.support.toy import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import bench_host_memory as bench

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_memory_of_a_stage():
  """Of two arrays that are there one after another, the larger counts, and what was there before does not."""
  found, before = [], np.ones(5 * bench.MIB)
  with bench.measured("two arrays", 64 * bench.MIB, found):
    for mib in (64, 24):
      array = np.ones(mib * bench.MIB // 8)
      bench.time.sleep(0.05)  # As long as some looks at it.
      del array
  (stage,) = found
  assert 63 < stage.own < 80 and stage.expected == 64 and stage.resident > stage.before + 63
  assert stage.seconds >= 0.1 and before.size
  assert bench.table(found)[1].split()[:2] == ["two", "arrays"]


def test_mixture(tmp_path, monkeypatch):
  # Put back afterwards: in the benchmark, each process draws sizes to its end.
  monkeypatch.setattr(MeasureLines, "__call__", MeasureLines.__call__)
  monkeypatch.setattr(row_count.packing, "count_rows", row_count.packing.count_rows)
  bench.write_mixture(tmp_path, 3000, 3)
  found = bench.first_start(tmp_path, 3000, 3) + bench.later_start(tmp_path, 3000)
  mixture, rows = pickle.loads((tmp_path / "sent").read_bytes())
  found += bench.worker(tmp_path, 3000)
  assert [stage.name for stage in found] == [
    *("index of lines", "index of sizes", "start", "first rows", "each worker"),
  ]
  assert mixture.num_samples == 3000 and all(len(places.indices) for places in rows[0])
  sizes = mixture.size_of(np.arange(3000))
  assert sizes[:, 0].min() >= 300 and sizes[:, 1].max() == 12
  assert len((tmp_path / "sent").read_bytes()) < 1 << 20  # Files are mapped again, not sent.


def test_sparse_checkpoint(tmp_path):
  config = published.config_of("2.5-1b")
  total = bench.write_sparse(
    tmp_path, config, bench.tensors_of(source_of_config(config)), shard=500 * bench.MIB
  )
  files = list(tmp_path.glob("*.safetensors"))
  assert len(files) > 2 and total > 1.8e9
  assert sum(file.stat().st_blocks * 512 for file in files) < bench.MIB < total
  source = open_source(tmp_path)
  path = "language_model.model.norm.scale"
  leaf = source.model.shapes[path]
  names = weights.names_of(path, leaf.shape, source.table)
  assert source.checkpoint is not None
  assert not weights.read_shard(source.checkpoint, names, leaf, (slice(None),)).any()
