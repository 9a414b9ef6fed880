"""The nearest recipe is that of the fewest other values, among those of the task and of the model's size."""

import pytest

from internvl_jax.config import FIELDS, get
from internvl_jax.nearest_recipe import COMPARED, differing, nearest, published_recipes


def test_every_recipe_is_nearest_to_itself():
  recipes = published_recipes()
  assert len(recipes) == 117
  for recipe in recipes:
    values = {path: get(recipe.config, path) for path in COMPARED}
    assert nearest(values).spec == recipe.spec


@pytest.mark.parametrize(
  ("model", "changed", "spec"),
  [
    ("/data/InternVL2_5-8B", {}, "internvl2_5/finetune:8b"),
    ("checkpoints/my_own", {}, "internvl2_5/finetune:8b"),
    ("OpenGVLab/InternVL2_5-4B/", {}, "internvl2_5/finetune:4b"),
    ("InternVL2_5-26B-MPO", {}, "internvl2_5/finetune:26b"),
    ("Qwen2-VL-7B", {}, "internvl2_5/finetune:8b"),  # There is no recipe of that size.
    ("OpenGVLab/InternVL3_5-241B-A28B", {}, "internvl3_5/sft:241b"),
    ("OpenGVLab/InternVL2_5-8B", {"preference.loss_type": "sigmoid"}, "internvl2_5/mpo:8b"),
    ("my_own", {"model.use_llm_lora": 8, "model.freeze_llm": True}, "internvl2_5/finetune:8b"),
    ("my_own", {"model.use_llm_lora": 8, "model.freeze_llm": True, "model.freeze_mlp": True, "model.drop_path_rate": 0.0,
                "training.output_dir": "mine"}, "internvl2_5/finetune:8b,lora"),
  ],
)  # fmt: skip
def test_a_changed_recipe_is_nearest_to_what_it_was(model, changed, spec):
  (base,) = [recipe for recipe in published_recipes() if recipe.spec == "internvl2_5/finetune:8b"]
  values = {path: get(base.config, path) for path in COMPARED}
  assert nearest({**values, "model.model_name_or_path": model, **changed}).spec == spec


def test_fields_that_are_not_named_have_their_defaults():
  assert "training.seed" not in differing({}, published_recipes()[0].config)
  assert len(differing({}, published_recipes()[0].config)) > 10
  assert set(COMPARED) < set(FIELDS)
