"""InternVL's multimodal training framework, on JAX.

    import internvl_jax

    config = internvl_jax.load_config("internvl2_5/finetune:8b,lora", {"data.meta_path": "my_meta.json"})
    internvl_jax.train(config)
    model = internvl_jax.open_model(config.training.output_dir)
    model.answer("What is on the mat?", images=["cat.jpg"])

`internvl_jax.api` documents what is public. It is imported when it is first used, so that this import takes no time.
"""

import importlib
import os
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from internvl_jax.answering.model import Chat, Model, Settings
  from internvl_jax.answering.prompts import Question
  from internvl_jax.api import Trained, Verification, convert, load_config, open_model, plan, train, verify
  from internvl_jax.config import TrainConfig
  from internvl_jax.errors import UserError

__all__ = [
  "Chat",
  "Model",
  "Question",
  "Settings",
  "TrainConfig",
  "Trained",
  "UserError",
  "Verification",
  "convert",
  "load_config",
  "open_model",
  "plan",
  "train",
  "verify",
]

# Of transformers only tokenizers are used. It advises on every import to install PyTorch, and warns of model types that it
# does not know, as InternVL's is.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

__version__ = "0.2.0"

_HOMES = {
  "internvl_jax.answering.model": ("Chat", "Model", "Settings"),
  "internvl_jax.answering.prompts": ("Question",),
  "internvl_jax.config": ("TrainConfig",),
  "internvl_jax.errors": ("UserError",),
}
"""Where public names are that `api` does not have."""


class _Package(types.ModuleType):
  """This package, whose public names are imported when they are first used.

  Some commands have the names of functions: `internvl_jax.train` is the function, also once the command of that name is
  imported, which Python would put in its place.
  """

  def __getattr__(self, name: str) -> Any:
    if name not in __all__:
      raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), f"{__name__}.api")
    return getattr(importlib.import_module(home), name)

  def __setattr__(self, name: str, value: Any) -> None:
    if not (name in __all__ and isinstance(value, types.ModuleType)):
      super().__setattr__(name, value)

  def __dir__(self) -> list[str]:
    return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package

# Python's name for a module that it is about to run (`python -m`). What a command imports takes seconds, in which it can
# be interrupted, too; and all its threads have to inherit which signals are blocked.
if sys.argv[:1] == ["-m"]:
  from internvl_jax import environment, signals

  if f"{__name__}.train" in sys.orig_argv:
    environment.restart_with_huge_pages()
    signals.set_last_line(signals.GOES_ON)
  signals.watch()
