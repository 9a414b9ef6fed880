"""Compiles the training step for slices of 8 to 4,096 TPU chips that need not be there, for benchmarks/scale.py.

  python benchmarks/scale_programs.py [--size 2.5-8b] [--topologies v5p:2x2x2,...] [--level O1] [--results FILE]

What the compiler made of each slice goes to benchmarks/scale_programs.json at once: operations, bytes to and from memory,
exchanges, and memory of a chip. What is there already is not compiled again. A slice takes minutes on two CPU cores. The
extra `plan` has the compiler.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_suffix(".json")
TOPOLOGIES = (
  *("v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8"),
  *("v5p:4x8x8", "v5p:8x8x8", "v5p:8x8x16", "v5p:8x16x16", "v5p:16x16x16"),
)


def main() -> None:
  """Compiles what is missing."""
  asked = arguments()
  path = Path(asked.results)
  compiler = f"libtpu {importlib.metadata.version('libtpu')} at {asked.level}"
  head = {"size": asked.size, "tokens": asked.tokens, "tiles": asked.tiles, "compiler": compiler}
  results = json.loads(path.read_text()) if path.is_file() else {**head, "programs": {}}
  for name, value in head.items():
    if results[name] != value:
      raise SystemExit(
        f"--results={path}: holds those of {name} {results[name]}, not {value}; name another file"
      )
  if "useful" not in results:
    results["useful"] = useful(asked.size)
  for topology in asked.topologies.split(","):
    if topology not in results["programs"]:
      print(f"{topology} ...", flush=True)
      results["programs"][topology] = compiled(asked, topology)
      path.write_text(json.dumps(results, indent=1) + "\n")


def arguments() -> argparse.Namespace:
  """What the command line asks for."""
  parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
  parser.add_argument("--size", default="2.5-8b", help="a published size; all of it trains")
  parser.add_argument("--topologies", default=",".join(TOPOLOGIES), help="slices")
  parser.add_argument("--tokens", type=int, default=8192, help="of a row; each chip has one row")
  parser.add_argument("--tiles", type=int, default=40, help="of a row, at most")
  parser.add_argument("--level", default="O0", help="of the compiler's optimizations")
  parser.add_argument("--results", default=str(RESULTS), help="file to fill")
  return parser.parse_args()


def useful(size: str) -> dict[str, float]:
  """FLOPs that a tile, a token and a pair of tokens need in a step that trains all of the model."""
  # JAX is imported only where there is something to compute.
  from internvl_jax.aot import recipe
  from internvl_jax.hf import published
  from internvl_jax.metrics.mfu import useful_flops
  from internvl_jax.open_model import open_shapes

  config = recipe.get_config()
  config.model.model_name_or_path = published.hub_id(size)
  source = open_shapes(config)
  shapes = source.model.shapes
  found = useful_flops(source.config, shapes, list(shapes))
  assert not found.windowed
  per_tile = found.per_tile + found.per_image_token * found.tokens_per_tile
  return {"per_tile": per_tile, "per_token": found.per_token, "per_pair": found.per_pair}


def compiled(asked: argparse.Namespace, topology: str) -> dict[str, Any]:
  """What `plan` says of a slice."""
  with tempfile.TemporaryDirectory() as folder:
    written = Path(folder) / "plan.json"
    options = [
      f"--size={asked.size}",
      f"--topology={topology}",
      f"--tokens={asked.tokens}",
      f"--tiles={asked.tiles}",
    ]
    options += [f"--optimization_level={asked.level}", f"--json={written}"]
    subprocess.run(
      [sys.executable, "-m", "internvl_jax.plan", *options], check=True, stdout=subprocess.DEVNULL
    )
    return brief(json.loads(written.read_text()))


def brief(report: dict[str, Any]) -> dict[str, Any]:
  """What the simulation needs of a plan's report; numbers are those of one chip and step."""
  memory, parts = report["memory"], report["flops"]
  assert report["execution"]["remat"] == "full"
  # Each layer runs forward twice.
  of_tiles = sum(2 * parts[part]["forward"] + parts[part]["backward"] for part in ("ViT", "projector"))
  return {
    "topology": report["topology"],
    "chips": report["chips"],
    "mesh": {axis: size for axis, size in report["mesh"].items() if size > 1},
    "shards": report["batch"]["shards"],
    "fits": report["fits"],
    "memory": report["total"],
    "limit": report["limit"],
    "state": memory["parameters that train"] + memory["optimizer state"],
    "flops": report["compiled_flops"],
    "flops_of_tile": of_tiles / report["batch"]["tiles"],
    "traffic": report["traffic"],
    "exchanges": [
      {key: row[key] for key in ("kind", "axes", "dtype", "count", "bytes", "seconds")}
      for row in report["exchanges"]
    ],
    "compile_seconds": round(report["lower_seconds"] + report["compile_seconds"], 1),
  }


if __name__ == "__main__":
  main()
