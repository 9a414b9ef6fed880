"""The model `InternVLJax` of VLMEvalKit, with the prompts and numbers of tiles that the kit has for InternVL.

python -m internvl_jax.integrations.vlmevalkit VLMEvalKit/run.py --config my_config.json

runs the kit's own program with the model in its list, where a config names it:

{"model": {"mine": {"class": "InternVLJax", "model_path": "OUTPUT_DIR"}},
 "data": {"MMBench_DEV_EN": {"class": "ImageMCQDataset", "dataset": "MMBench_DEV_EN"}}}
"""

import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

import vlmeval.vlm  # pyright: ignore[reportMissingImports]
from PIL import Image
from vlmeval.dataset import DATASET_MODALITY  # pyright: ignore[reportMissingImports]
from vlmeval.vlm.internvl import internvl_chat, utils  # pyright: ignore[reportMissingImports]

import internvl_jax


class InternVLJax(internvl_chat.InternVLChat):
  """A checkpoint of ours in the place of the kit's InternVL, whose methods build prompts and choose numbers of tiles."""

  def __init__(
    self,
    model_path: str,
    *,
    bf16: bool = True,
    devices: int = 1,
    max_new_tokens: int = 4096,
    use_custom_prompt: bool = True,
    use_mpo_prompt: bool = False,
  ):
    """Opens a checkpoint.

    Args:
      model_path: the checkpoint: a folder, a hub id or a URL.
      bf16: whether to compute in bfloat16.
      devices: how many share the weights.
      max_new_tokens: longest answer.
      use_custom_prompt: whether prompts are those that the kit has for InternVL, not those of a dataset.
      use_mpo_prompt: whether answers are reasoned out, as the kit asks models that were trained by MPO.
    """
    # Not the kit's __init__, which opens the checkpoint by PyTorch.
    self.dump_image_func = None
    self._use_custom_prompt, self.use_mpo_prompt = use_custom_prompt, use_mpo_prompt
    self.use_cot, self.cot_prompt = os.getenv("USE_COT") == "1", None
    self.kwargs = {"max_new_tokens": max_new_tokens}
    self.model = internvl_jax.open_model(model_path, bf16=bf16, devices=devices)

  def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
    """The greedy answer to a message of texts and paths of pictures."""
    self.set_max_num(dataset)
    paths = [part["value"] for part in message if part["type"] == "image"]
    prompt = utils.reorganize_prompt(message, len(paths), dataset=dataset)
    if dataset is not None and DATASET_MODALITY(dataset) == "VIDEO":
      prompt = utils.build_video_prompt(prompt, dataset)
    settings: dict[str, Any] = dict(self.kwargs)
    if paths:
      settings["max_tiles"] = max(1, min(self.max_num, self.total_max_num // len(paths)))
    images: list[Any] = list(paths)
    if paths and dataset is not None and "MMMU" in dataset:
      images[0] = doubled(paths[0])
    answer = self.model.answer(internvl_jax.Question(prompt, images=images), **settings)
    reasoned = self.use_mpo_prompt and (self.use_cot or dataset in ("MMStar", "HallusionBench", "OCRBench"))
    return utils.mpo_post_processing(answer, dataset) if reasoned and dataset is not None else answer


def doubled(path: str) -> Image.Image:
  """A picture of twice its width and height: the kit asks so about the first one of MMMU."""
  with Image.open(path) as image:
    return image.convert("RGB").resize((image.width * 2, image.height * 2), Image.Resampling.BILINEAR)


def main(argv: Sequence[str]) -> None:
  """Runs the kit's program with the model in its list."""
  if not argv:
    raise SystemExit("name VLMEvalKit's run.py, and its arguments")
  vlmeval.vlm.InternVLJax = InternVLJax
  sys.argv = list(argv)
  runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
  main(sys.argv[1:])
