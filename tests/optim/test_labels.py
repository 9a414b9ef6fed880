"""What trains, and what decays, by the recorded names of the reference."""

import json

import pytest

from internvl_jax.arguments import ModelArguments
from internvl_jax.hf.model import open_source
from internvl_jax.hf.weights import names_of
from internvl_jax.optim.labels import decays, labels_of, trained
from internvl_jax.trees import first_match
from tests.support.toy import CURVE, CURVE_INTERNLM2


@pytest.mark.parametrize("curve", [CURVE, CURVE_INTERNLM2], ids=lambda curve: curve.name)
def test_weight_decay_falls_on_the_recorded_names(curve):
  """By their names: InternLM2's norms decay, Qwen2's do not."""
  source = open_source(curve / "init")
  recorded = json.loads((curve / "expected.json").read_text())
  decayed, trainable = set(), set()
  for path, does in decays(source.reference_names, source.undecayed).items():
    keys = names_of(path, source.model.shapes[path].shape, source.table).keys.reshape(-1)
    trainable |= set(keys)
    decayed |= set(keys) if does else set()
  assert trainable == set(recorded["trainable"])
  assert decayed == set(recorded["decay"])


def test_labels_say_what_trains():
  linear = "language_model.model.layers.0:2.q_proj"
  paths = ["vision_model.a", "mlp1.b", "language_model.lm_head.c", f"{linear}.kernel"]
  frozen = dict.fromkeys(paths, "frozen")
  flags = {"freeze_backbone": True, "freeze_mlp": True, "freeze_llm": True}
  assert labels_of(ModelArguments(**flags), paths) == frozen and trained(frozen) == {}
  thawed = labels_of(ModelArguments(**flags, unfreeze_lm_head=True), paths)
  assert trained(thawed) == {"language_model.lm_head.c": "language_model"}
  adapted = labels_of(ModelArguments(use_llm_lora=2, freeze_mlp=True), [*paths, f"{linear}.adapter.a"])
  assert trained(adapted) == {"vision_model.a": "vision_model", f"{linear}.adapter.a": "adapters"}


def test_patterns_cover_all_paths_and_match_something():
  assert first_match([("a.*", 1), (".*", 2)], ["ab", "b"]) == {"ab": 1, "b": 2}
  with pytest.raises(ValueError, match="'b'"):
    first_match([("a.*", 1)], ["ab", "b"])
  with pytest.raises(ValueError, match=r"'c\.\*' matches no parameter"):
    first_match([("c.*", 1), (".*", 2)], ["ab", "b"])
