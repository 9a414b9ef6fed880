"""Our side of `benchmarks/decoding.py`: python benchmarks/decoding_ours.py FOLDER ROWS TOKENS REPEATS."""

import sys
from pathlib import Path

from decoding_timing import IMAGE_TOKEN, time_answers

from internvl_jax import environment


def main(folder: Path, rows: int, tokens: int, repeats: int) -> None:
  """Answers prompts as `generate` does, and prints times and tokens."""
  import numpy as np

  from internvl_jax import compiler
  from internvl_jax.eval.greedy import GreedyDecoder, Prompt
  from internvl_jax.hf.model import open_source
  from internvl_jax.inference import by_layer, execution, load_params

  compiler.use_full_precision()
  source = open_source(folder / "model", by_layer())
  how = execution(source.config, bf16=False)
  params = load_params(source, how)
  batch = np.load(folder / "batch.npz")
  tiles = np.split(batch["tiles"], len(batch["ids"]))
  prompts = [Prompt(ids.astype(np.int32), own) for ids, own in zip(batch["ids"], tiles, strict=True)]
  options = {"how": how, "normalize_type": "imagenet", "image_token_id": IMAGE_TOKEN, "stop_ids": (-1,)}

  def answer(new: int) -> list[list[int]]:
    decoder = GreedyDecoder(model=source.model, max_new_tokens=new, batch_size=rows, **options)
    return [found.tolist() for found in decoder(params, prompts[:rows])]

  time_answers(answer, tokens, repeats)


if __name__ == "__main__":
  environment.restart_with_huge_pages()
  main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
