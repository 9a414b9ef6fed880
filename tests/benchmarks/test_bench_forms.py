"""The measurement of large annotation files runs, at toy size."""

import sys
import tarfile

import pytest

from tests.support.toy import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import bench_forms as bench

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_every_kind(tmp_path, monkeypatch):
  pytest.importorskip("pyarrow")

  class Here:
    """In place of a process of its own, which takes seconds to import."""

    def __enter__(self):
      return self

    def __exit__(self, *_):
      pass

    def apply(self, function, arguments):
      return function(*arguments)

  class Context:
    def Pool(self, _):
      return Here()

  monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: Context())
  found = bench.main(["--records", "80", "--folder", str(tmp_path)])
  assert [(one.kind, one.records, one.start) for one in found] == [
    (kind, records, start) for kind in bench.KINDS for records in (8, 80) for start in ("cold", "warm")
  ]
  assert all(one.seconds > 0 and one.size > 0 for one in found)
  with tarfile.open(tmp_path / "80.tar") as tar:  # as others read it
    assert len(tar.getnames()) == 160
