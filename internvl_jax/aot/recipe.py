"""The recipe that is planned for where none is named: all of a published size is fine-tuned in packed rows.

One row a device of 8192 tokens and 40 tiles, as the reference's defaults have it, in bfloat16, with weights,
gradients and optimizer state sharded over all devices. `arg` "lora" trains adapters of rank 16 on the language model
instead; every other variant is that of a way to learn (`tasks.variants`), such as "mpo".
"""

from internvl_jax.config import TrainConfig
from internvl_jax.tasks import variants


def get_config(arg: str = "") -> TrainConfig:
  """The recipe, or its variant "lora", or that of a way to learn."""
  others = variants()
  if arg not in ("", "lora", *others):
    raise ValueError(f"no variant {arg!r}; there are {' and '.join(['lora', *others])}")
  config = TrainConfig()
  config.data.use_packed_ds = True
  config.training.bf16 = True
  config.training.per_device_train_batch_size = 1
  config.mesh.data, config.mesh.fsdp = 1, -1
  if arg == "lora":
    config.model.use_llm_lora = 16
    config.model.freeze_backbone = config.model.freeze_mlp = config.model.freeze_llm = True
  if arg in others:
    others[arg](config)
  return config
