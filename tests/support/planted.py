"""Single faults put into a recorder's model, processor or functions: what a recording of a faulty setup looks like.

Each is a function (the recorder's module, its side), which PyTorch and transformers are needed for. `FAULTS` says where the
certificate has to find it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
  """A fault and what the certificate says of it.

  Attributes:
    plant: puts it in.
    stage: the first stage that departs.
    where: a regular expression that is found in the place.
    cause: one that is found in the cause.
  """

  plant: Callable[[Any, Any], None]
  stage: str
  where: str
  cause: str


def changes_samples(change):
  """A fault of the samples: a function of a made sample, in place."""

  def plant(module, side):
    make = side.make

    def changed(line):
      sample = make(line)
      change(sample)
      return sample

    side.make = changed

  return plant


def rope_base(module, side):
  import torch

  rotary = side.model.model.language_model.rotary_emb
  width = 2 * len(rotary.inv_freq)
  rotary.inv_freq = 1e6 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)


def tile_order(sample):
  import torch

  tiles = sample["pixel_values"]
  count = len(tiles) - 1  # The thumbnail stays.
  if count > 1:
    rows = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
    order = torch.arange(count).reshape(rows, -1).T.reshape(-1)
    sample["pixel_values"] = torch.cat([tiles[order], tiles[-1:]])


def thumbnail_first(sample):
  sample["pixel_values"] = sample["pixel_values"].roll(1, dims=0)


def label_shift(sample):
  labels = sample["labels"].roll(-1)
  labels[-1] = -100
  sample["labels"] = labels


def segment_leak(module, side):
  import torch

  mask = module.segment_mask
  module.segment_mask = lambda segments: mask(torch.ones_like(segments))


def pixel_mean(module, side):
  side.processor.image_processor.image_mean = [0.48145466, 0.4578275, 0.40821073]


def system_message(module, side):
  template = side.processor.chat_template
  side.processor.chat_template = re.sub(r"你是书生[^<]+", "You are a helpful assistant.", template)
  assert side.processor.chat_template != template


def tied_head(module, side):
  side.model.lm_head.weight = side.model.model.language_model.embed_tokens.weight


def norm_epsilon(module, side):
  for part in side.model.model.language_model.modules():
    if hasattr(part, "variance_epsilon"):
      part.variance_epsilon = 1e-5


def gelu_kind(module, side):
  import torch

  for layer in side.model.model.vision_tower.encoder.layer:
    layer.mlp.activation_fn = torch.nn.GELU(approximate="tanh")


def decay_of_norms(module, side):
  module.decayed = lambda model: {name for name, _ in model.named_parameters() if "bias" not in name}


def loss_mean(module, side):
  import torch

  def mean_of_means(logits, labels, **options):
    rows = []
    for scores, row in zip(logits, labels, strict=True):
      rows.append(torch.nn.functional.cross_entropy(scores[:-1], row[1:]))
    return torch.stack(rows).mean()

  side.model.loss_function = mean_of_means


FAULTS = {
  "rope base": Fault(
    plant=rope_base,
    stage="language model",
    where=r"layer 0, attention: token [1-9]",
    cause=r"base is 1e\+06 in theirs",
  ),
  "tile order": Fault(
    plant=changes_samples(tile_order),
    stage="pixels",
    where=r"tile 1, channel",
    cause=r"column by column, ours row by row \(2 rows of 4\)",
  ),
  "thumbnail first": Fault(
    plant=changes_samples(thumbnail_first),
    stage="pixels",
    where=r"tile 0, channel",
    cause=r"thumbnail comes first",
  ),
  "label shift": Fault(
    plant=changes_samples(label_shift),
    stage="labels",
    where=r"token \d+",
    cause=r"shifted by one: theirs are those of the next token",
  ),
  "segment leak": Fault(
    plant=segment_leak,
    stage="packed row",
    where=r"segment 2, language model, layer 0, attention: token \d+",
    cause=r"tokens see the segments before their own",
  ),
  "pixel mean": Fault(
    plant=pixel_mean,
    stage="pixels",
    where=r"tile 0",
    cause=r"mean \(0.48\d, 0.45\d, 0.40\d\) of 'clip' and the standard deviation .* of 'imagenet'",
  ),
  "system message": Fault(
    plant=system_message,
    stage="token ids",
    where=r"token \d+",
    cause=r"the system message of the template: theirs .*helpful assistant",
  ),
  "tied head": Fault(
    plant=tied_head,
    stage="output embedding",
    where=r"token 0",
    cause=r"tied to the input embedding in theirs",
  ),
  "norm epsilon": Fault(
    plant=norm_epsilon,
    stage="language model",
    where=r"layer 0, first norm: token \d+",
    cause=r"epsilon: about 1.0e-05 in theirs, 1.0e-06",
  ),
  "GELU kind": Fault(
    plant=gelu_kind,
    stage="vision tower",
    where=r"layer 0, feed-forward: tile 0",
    cause=r"GELU by its tanh approximation in theirs",
  ),
  "decay of norms": Fault(
    plant=decay_of_norms,
    stage="weight decay",
    where=r"norm.* decays in theirs",
    cause=r"norms decay in theirs, by the rule of no release",
  ),
  "loss mean": Fault(
    plant=loss_mean,
    stage="loss of a micro-batch",
    where=r"in theirs",
    cause=r"the mean of the samples' means",
  ),
}


@functools.cache
def recorder():
  """The recorder as a module."""
  from tests.support.scripts import load
  from tests.support.toy import REPOSITORY

  return load(REPOSITORY / "scripts/certify_record.py")


def record(folder, model, meta, fault=None, samples=2):
  """Records with a fault planted."""
  import torch

  module = recorder()
  kept = {name: getattr(module, name) for name in ("segment_mask", "decayed")}
  args = module.arguments(
    [
      f"--model={model}",
      f"--meta={meta}",
      f"--samples={samples}",
      f"--output={folder}",
      "--full_below=64",
      "--device=cpu",
    ]
  )
  torch.manual_seed(0)
  side = module.open_side(args)
  try:
    if fault is not None:
      FAULTS[fault].plant(module, side)
    module.record(side, args)
  finally:
    for name, value in kept.items():
      setattr(module, name, value)
