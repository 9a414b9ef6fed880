"""Plans a run without its devices: compiles the whole training step and reports its memory and FLOPs for each chip.

  python -m internvl_jax.plan --config configs/quickstart.py --topology v5e:4x4
  python -m internvl_jax.plan --size 2.5-8b --topology v5p [--search]

Topologies: a slice of TPUs (v4:2x2x1, v5e:4x4, v5p:2x2x1, v6e:2x4, v7x:2x2x1; libtpu from the extra `plan` compiles for
it), NVIDIA's cards (h100:8, or hosts x cards, h100:4x8; also a100-40g, a100-80g, a800, h800, h20, h200, l40s, rtx4090,
rtx5090, b200; compiled for by the extra `plan-gpu`), or local devices (cpu, cpu:8, gpu, local). With --search, a kind
(v5e, h100) of which the fewest devices that fit are looked for, or the most to look at (v5e:8x8, h100:8).

Without a recipe, everything is fine-tuned in packed rows (aot/recipe.py); fields are overridden as everywhere.
Nothing is read but the checkpoint's config.json, and of a published size not even that: `--size`, or the size's hub
id in the recipe. The batch is the largest that the data may make (max_packed_tokens and num_images_expected, or
max_seq_length and max_dynamic_patch), or --tokens and --tiles a row. docs/scale.md explains the report.
"""

from collections.abc import Sequence

from absl import flags

from internvl_jax import cli
from internvl_jax.aot import recipe
from internvl_jax.config import TrainConfig
from internvl_jax.config_checks import validate
from internvl_jax.errors import UserError
from internvl_jax.hf import published
from internvl_jax.outputs import write_json
from internvl_jax.storage import remote
from internvl_jax.storage.paths import filled_file, output_path

_CONFIG = cli.define_config_flag(default=recipe.__file__)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Devices to plan for, e.g. v5e:4x4.", required=True)
_SIZE = flags.DEFINE_enum(
  "size", None, published.SIZES, "Published size, in place of model.model_name_or_path."
)
_SEARCH = flags.DEFINE_bool("search", False, "Look for the fewest devices that fit.")
_TOKENS = flags.DEFINE_integer("tokens", None, "Tokens of a row.", lower_bound=1)
_TILES = flags.DEFINE_integer("tiles", None, "Tiles of a row.", lower_bound=0)
_HBM = flags.DEFINE_float("hbm", None, "GiB that a program may use of each device.", lower_bound=0)
_LEVEL = flags.DEFINE_enum(
  "optimization_level",
  "O0",
  ("default", "O0", "O1", "O2", "O3"),
  "How hard the compiler for a slice of TPUs tries.",
)
_COST = flags.DEFINE_float("cost", None, "Price of an hour of one device.", lower_bound=0)
_UTILISATION = flags.DEFINE_float(
  "utilisation",
  0.4,
  "With --cost: share of the peak that goes to the model (MFU).",
  lower_bound=0.01,
  upper_bound=1,
)
_SUPERVISED = flags.DEFINE_float(
  "supervised",
  None,
  "With --cost: share of the rows' tokens that the loss counts.",
  lower_bound=1e-3,
  upper_bound=1,
)
_JSON = flags.DEFINE_string("json", None, "File to write the whole report to.")
_DUMP = flags.DEFINE_string(
  "dump", None, "Folder for the files that the compiler writes, of devices that are not there."
)


def main(argv: Sequence[str]) -> None:
  """Plans or searches, and writes what was found."""
  del argv
  if _DUMP.value is not None and remote.scheme(_DUMP.value):
    raise UserError(f"--dump={_DUMP.value}: compilers write to folders of this machine only; name one")
  written = None if _JSON.value is None else output_path(_JSON.value, "--json")
  config = configuration()
  from internvl_jax.aot.planning import Pricing, Request, compile_once, search_fewest

  request = Request(
    topology=_TOPOLOGY.value,
    tokens=_TOKENS.value,
    tiles=_TILES.value,
    hbm=_HBM.value,
    optimization_level=_LEVEL.value,
    dump=_DUMP.value,
    pricing=None
    if _COST.value is None
    else Pricing(hour=_COST.value, utilisation=_UTILISATION.value, supervised=_SUPERVISED.value),
  )
  found = (search_fewest if _SEARCH.value else compile_once)(config, request)
  if written is not None:
    with filled_file(written) as path:
      write_json(path, found)


def configuration() -> TrainConfig:
  """The configuration, of the size that is asked for.

  Raises:
    UserError: it cannot work.
  """
  config = _CONFIG.value
  if _SIZE.value is not None:
    config.model.model_name_or_path = published.hub_id(_SIZE.value)
    config.model.vision_path = config.model.llm_path = None
  validate(config, "plan")
  cli.warn_idle(config)
  return config


if __name__ == "__main__":
  cli.run_app(main)
