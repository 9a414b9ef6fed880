"""Records what an InternVL in PyTorch computes on samples of your data, for `python -m internvl_jax.certify` to compare with.

This one file runs in the environment that you train in, and needs nothing of internvl_jax: torch (2.0 or later), and either
the reference's `internvl_chat` on PYTHONPATH (checkpoints with `"model_type": "internvl_chat"`) or a transformers with
InternVL (checkpoints with `"model_type": "internvl"`, the hf layout):

  python certify_record.py --model DIR --meta meta.json --samples 8 --output record/

Samples are made by the reference's own `LazySupervisedDataset`, or by transformers' own processor and chat template; the
model is theirs, in float32 without dropout and augmentation. Settings of the data that your run states are given by their
names: --conv_style, --max_dynamic_patch, ... Lines with a video are passed over.

What is written:

  manifest.json        versions, settings, which lines; loss of the micro-batch; which parameters weight decay applies to
  sample-N.npz         input_ids, labels [S]; pixel_values [T, 3, H, W]; loss; and of the positions [n] that predict a label,
                       label_logits, logsumexp, the 8 largest logits; all logits of the first few
  activations-N.npz    (the first --deep samples) of every part of the model, "norm:PART" of every token, and "rows:PART", the
                       numbers of a few tokens, whose places are "picks:vision", "picks:projector", "picks:text"
  gradients.npz        of the loss of the deep samples as one micro-batch: of each parameter the norm and eight projections
                       ("sketch"), and "full:NAME" of small ones
  packed.npz           the deep samples as one row of segments that do not see each other, where the model takes such a mask
  update.npz           norm and sketch of one AdamW update of each parameter for gradients equal to the parameters

A sketch of x: x is cut into rows of 65521 numbers (zeros at the end), the rows are added up in float64, and the sum is
multiplied by eight vectors of +1 and -1, `2 * numpy.random.RandomState(0).randint(0, 2, (8, 65521)) - 1`.
"""
# Runs on the Pythons that the reference runs on.
# ruff: noqa: B905, UP

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

FORMAT = 1
IGNORE = -100
TOP, FULL_LOGITS = 8, 4
SKETCHES, BLOCK = 8, 65521
LEARNING_RATE, WEIGHT_DECAY = 0.01, 0.05

SETTINGS = {
  "conv_style": str,
  "force_image_size": int,
  "dynamic_image_size": "bool",
  "use_thumbnail": "bool",
  "pad2square": "bool",
  "min_dynamic_patch": int,
  "max_dynamic_patch": int,
  "normalize_type": str,
}
"""Data settings of the reference by name."""

# What the reference's config class and arguments say where neither the command line nor the checkpoint does.
DEFAULTS = {
  "dynamic_image_size": False,
  "use_thumbnail": False,
  "pad2square": False,
  "min_dynamic_patch": 1,
  "max_dynamic_patch": 6,
  "normalize_type": "imagenet",
}


# --- Lines ----------------------------------------------------------------------------------------------------


def read_lines(meta_path, count):
  """`count` lines, as many of each dataset and evenly over it: dicts of dataset, line (from 0), root, record, max_tiles."""
  meta = json.loads(Path(meta_path).read_text(encoding="utf-8-sig"))
  beside = Path(meta_path).resolve().parent
  share = -(-count // len(meta))
  found = []
  for name, entry in meta.items():
    path = Path(entry["annotation"])
    path = path if path.exists() else beside / path
    text = path.read_text(encoding="utf-8-sig")
    records = (
      json.loads(text)
      if path.suffix == ".json"
      else [json.loads(line) for line in text.splitlines() if line.strip()]
    )
    usable = [n for n, record in enumerate(records) if "video" not in record]
    wanted = sorted({usable[i * len(usable) // share] for i in range(min(share, len(usable)))})
    for number in wanted:
      root = _root(entry.get("root", ""), beside, records[number])
      tiles = entry.get("max_dynamic_patch")
      found.append(
        {"dataset": name, "line": number, "root": root, "record": records[number], "max_tiles": tiles}
      )
  return found[:count]


def _root(root, beside, record):
  """The folder of a record's images: as written, or from the meta file's folder."""
  images = record.get("image")
  first = images[0] if isinstance(images, list) else images
  if first and not os.path.exists(os.path.join(root, first)):
    return str(beside / root)
  return root


def turns_of(record):
  """The conversation of a record, and the paths of its images; one image without a placeholder gets one."""
  turns = [dict(turn) for turn in record["conversations"]]
  images = record.get("image") or []
  images = images if isinstance(images, list) else [images]
  first = next(turn for turn in turns if turn["from"] == "human")
  if len(images) == 1 and "<image>" not in "".join(turn["value"] for turn in turns):
    first["value"] = "<image>\n" + first["value"]
  return turns, images


# --- Samples by the reference's code ----------------------------------------------------------------------------


class Reference:
  """Samples by `internvl_chat`'s own dataset class, and its model."""

  name = "internvl_chat"

  def __init__(self, args):
    from internvl.model.internvl_chat import InternVLChatModel
    from internvl.train.internvl_chat_finetune import LazySupervisedDataset

    self.dataset_class = LazySupervisedDataset
    self.tokenizer = transformers.AutoTokenizer.from_pretrained(
      args.model, add_eos_token=False, trust_remote_code=True, use_fast=args.use_fast_tokenizer
    )
    self.tokenizer.model_max_length = args.max_seq_length
    # Flash attention has no float32.
    self.model = InternVLChatModel.from_pretrained(
      args.model, torch_dtype=torch.float32, low_cpu_mem_usage=True, use_flash_attn=False
    )
    self.image_token_id = self.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    self.model.img_context_token_id = self.image_token_id
    config = self.model.config
    stated = {
      "conv_style": config.template,
      "force_image_size": config.force_image_size or config.vision_config.image_size,
      **{name: getattr(config, name, value) for name, value in DEFAULTS.items()},
    }
    self.settings = {**stated, **given_settings(args)}

  def make(self, line):
    settings = dict(self.settings)
    template, size = settings.pop("conv_style"), settings.pop("force_image_size")
    if line["max_tiles"]:
      settings["max_dynamic_patch"] = line["max_tiles"]
    with tempfile.TemporaryDirectory() as folder:
      path = os.path.join(folder, "line.jsonl")
      Path(path).write_text(json.dumps(line["record"]) + "\n", encoding="utf-8")
      dataset = self.dataset_class(
        template,
        {"root": line["root"], "annotation": path},
        self.tokenizer,
        None,
        ds_name=line["dataset"],
        num_image_token=self.model.num_image_token,
        image_size=size,
        is_train=False,
        group_by_length=True,  # Samples are not padded.
        **settings,
      )
      sample = dataset[0]
    return {name: sample[name].cpu() for name in ("input_ids", "labels", "pixel_values", "image_flags")}

  def forward(self, rows, **more):
    mask = rows["attention_mask"]
    positions = rows.get("position_ids")
    if positions is None:
      positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)
    return self.model(
      pixel_values=rows["pixel_values"],
      image_flags=rows["image_flags"],
      input_ids=rows["input_ids"],
      attention_mask=rows.get("mask4d", mask),
      position_ids=positions,
      labels=rows["labels"],
      use_cache=False,
      return_dict=True,
      **more,
    )


# --- Samples by transformers' code ------------------------------------------------------------------------------


class Transformers:
  """Samples by transformers' processor of the checkpoint, and its model."""

  name = "transformers"

  def __init__(self, args):
    self.processor = transformers.AutoProcessor.from_pretrained(args.model)
    self.tokenizer = self.processor.tokenizer
    kind = transformers.InternVLForConditionalGeneration
    newer = int(transformers.__version__.split(".")[0]) >= 5
    dtype = {"dtype" if newer else "torch_dtype": torch.float32}
    self.model = kind.from_pretrained(args.model, attn_implementation="eager", **dtype)
    self.image_token_id = self.model.config.image_token_id
    self.settings = given_settings(args)

  def make(self, line):
    turns, paths = turns_of(line["record"])
    images = [Image.open(os.path.join(line["root"], path)).convert("RGB") for path in paths]
    messages = [message_of(turn) for turn in turns]
    text = self.processor.apply_chat_template(messages, tokenize=False)
    batch = self.processor(text=[text], return_tensors="pt", **self._images(images, line))
    ids = batch["input_ids"][0]
    pixels = batch["pixel_values"] if images else torch.zeros(0)
    labels = self.labels(messages, text, ids)
    return {
      "input_ids": ids,
      "labels": labels,
      "pixel_values": pixels.float(),
      "image_flags": torch.ones(len(pixels), dtype=torch.long),
    }

  def _images(self, images, line):
    """Arguments of the processor: one of several images has its share of the tiles, as in training."""
    if not images:
      return {}
    settings = {**self.settings}
    if line["max_tiles"]:
      settings["max_dynamic_patch"] = line["max_tiles"]
    of = getattr(self.processor, "image_processor", None)
    most = settings.get("max_dynamic_patch", getattr(of, "max_patches", 12))
    counts = {"max_patches": max(1, most // len(images))}
    if "min_dynamic_patch" in settings:
      counts["min_patches"] = settings["min_dynamic_patch"]
    return {"images": images, **counts}

  def labels(self, messages, text, ids):
    """Labels of the answers and the tokens that end them, as the reference supervises."""
    plain = self.tokenizer(text)["input_ids"]  # Every image is one token.
    learned = np.zeros(len(plain), bool)
    for number, message in enumerate(messages):
      if message["role"] != "assistant":
        continue
      before = self.processor.apply_chat_template(
        messages[:number], tokenize=False, add_generation_prompt=True
      )
      after = self.processor.apply_chat_template(messages[: number + 1], tokenize=False)
      if not (after.startswith(before) and text.startswith(before)):
        raise SystemExit(
          "the chat template does not write an answer behind its prompt: no labels can be made"
        )
      start, stop = (len(self.tokenizer(part)["input_ids"]) for part in (before, after))
      while stop > start and not self.tokenizer.decode(plain[stop - 1 : stop]).strip():
        stop -= 1
      learned[start:stop] = True
    return self._expanded(plain, learned, ids)

  def _expanded(self, plain, learned, ids):
    """The labels of `ids`, in which every image token of `plain` is `<img>`, tokens of the image and `</img>`."""
    labels, place = torch.full_like(ids, IGNORE), 0
    for token, is_learned in zip(plain, learned):
      if token == self.image_token_id:
        while ids[place] != self.image_token_id:
          place += 1
        while ids[place] == self.image_token_id:
          place += 1
        place += 1
        continue
      if ids[place] != token:
        raise SystemExit(
          f"token {place} of the processor's ids is not its tokenizer's: no labels can be made"
        )
      if is_learned:
        labels[place] = token
      place += 1
    return labels

  def forward(self, rows, **more):
    pixels = rows["pixel_values"] if len(rows["pixel_values"]) else None
    positions = {"position_ids": rows["position_ids"]} if "position_ids" in rows else {}
    return self.model(
      input_ids=rows["input_ids"],
      pixel_values=pixels,
      attention_mask=rows.get("mask4d", rows["attention_mask"]),
      labels=rows["labels"],
      use_cache=False,
      **positions,
      **more,
    )


def message_of(turn):
  """A turn as transformers' templates take it: images where `<image>` and its line break stand."""
  role = {"human": "user", "gpt": "assistant"}.get(turn["from"], turn["from"])
  if role != "user":
    return {"role": role, "content": [{"type": "text", "text": turn["value"]}]}
  content = []
  for number, part in enumerate(re.split(r"<image>\n?", turn["value"])):
    content += [{"type": "image"}] if number else []
    content += [{"type": "text", "text": part}] if part else []
  return {"role": role, "content": content}


def given_settings(args):
  """The data settings that the command line gives."""
  return {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}


# --- Rows of a batch ----------------------------------------------------------------------------------------------


def rows_of(samples, device):
  """Samples as rows, padded at their ends."""
  length = max(len(sample["input_ids"]) for sample in samples)

  def padded(name, value):
    rows = [torch.nn.functional.pad(s[name], (0, length - len(s[name])), value=value) for s in samples]
    return torch.stack(rows).to(device)

  lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
  pixels = [sample["pixel_values"] for sample in samples if len(sample["pixel_values"])]
  return {
    "input_ids": padded("input_ids", 0),
    "labels": padded("labels", IGNORE),
    "attention_mask": (torch.arange(length)[None] < lengths[:, None]).long().to(device),
    "pixel_values": (torch.cat(pixels) if pixels else torch.zeros(0)).to(device),
    "image_flags": torch.cat([sample["image_flags"] for sample in samples]).to(device),
  }


def packed_row(samples, device):
  """Samples as the segments of one row: positions count within each, and the mask hides each from the others."""
  rows = rows_of(samples, device)
  lengths = [len(sample["input_ids"]) for sample in samples]
  ids = torch.cat([sample["input_ids"] for sample in samples])[None]
  labels = torch.cat([sample["labels"] for sample in samples])[None].clone()
  labels[0, np.cumsum([0, *lengths[:-1]])] = IGNORE  # Nothing of its own segment predicts a first token.
  segments = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)])
  rows.update(
    input_ids=ids.to(device),
    labels=labels.to(device),
    attention_mask=torch.ones_like(ids).to(device),
    position_ids=torch.cat([torch.arange(n) for n in lengths])[None].to(device),
    mask4d=segment_mask(segments).to(device),
  )
  return rows, segments


def segment_mask(segments):
  """What is added to scores [1, 1, S, S]: 0 where a token sees another, the least number where it does not."""
  places = torch.arange(len(segments))
  seen = (segments[:, None] == segments[None]) & (places[:, None] >= places[None])
  return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


# --- Activations --------------------------------------------------------------------------------------------------

_VISION_PARTS = {
  "norm1": ("norm1", "layernorm_before"),
  "attn": ("attn", "attention"),
  "norm2": ("norm2", "layernorm_after"),
  "mlp": ("mlp",),
}
_TEXT_PARTS = {
  "input_layernorm": ("input_layernorm", "attention_norm"),
  "self_attn": ("self_attn", "attention"),
  "post_attention_layernorm": ("post_attention_layernorm", "ffn_norm"),
  "mlp": ("mlp", "feed_forward"),
}


def parts_of(model):
  """The model's parts by names that do not depend on its layout, e.g. "text.3.self_attn"."""
  modules = dict(model.named_modules())

  def find(pattern):
    return next((module for name, module in modules.items() if re.search(pattern, name)), None)

  found = {"vision.embeddings": find(r"(vision_model|vision_tower)\.embeddings$")}
  stacks = (
    ("vision", find(r"(vision_model|vision_tower)\.(.*\.)?encoder\.layers?$"), _VISION_PARTS),
    ("text", find(r"language_model\.(.*\.)?layers$"), _TEXT_PARTS),
  )
  for part, layers, children in stacks:
    for number, layer in enumerate(layers):
      for child, names in children.items():
        found[f"{part}.{number}.{child}"] = next(getattr(layer, n) for n in names if hasattr(layer, n))
      found[f"{part}.{number}"] = layer
  for name, pattern in {
    "projector.layer_norm": r"(^|\.)mlp1\.0$|multi_modal_projector\.layer_norm$",
    "projector.linear_1": r"(^|\.)mlp1\.1$|multi_modal_projector\.linear_1$",
    "projector": r"(^|\.)mlp1$|multi_modal_projector$",
    "text.norm": r"language_model\.(model\.)*norm$",
    "logits": r"(^|\.)(lm_head|language_model\.output)$",
  }.items():
    found[name] = find(pattern)
  return {name: module for name, module in found.items() if module is not None}


def tensor_of(output):
  """The first tensor of what a module returns."""
  while isinstance(output, (tuple, list)):
    output = output[0]
  return output if torch.is_tensor(output) else output.last_hidden_state


@contextlib.contextmanager
def activations(model, text_picks):
  """Within it, the returned dict takes the norms of all tokens and the rows of a few, of every part."""
  found, parts, hooks = {"picks:text": np.array(text_picks)}, parts_of(model), []

  def keep(name, x):
    x = x.detach().float()
    kind = name.split(".")[0]
    kind = "text" if kind == "logits" else kind
    if f"picks:{kind}" not in found:
      tiles, tokens = x.shape[:2]
      places = sorted({0, 1, tokens // 2, tokens - 1})
      found[f"picks:{kind}"] = np.array([t * tokens + p for t in sorted({0, tiles - 1}) for p in places])
    found[f"norm:{name}"] = x.norm(dim=-1).cpu().numpy()
    flat = x.reshape(-1, x.shape[-1])
    found[f"rows:{name}"] = flat[torch.as_tensor(found[f"picks:{kind}"], device=x.device)].cpu().numpy()

  def before(module, args, kwargs):
    keep("text.embeddings", args[0] if args else kwargs["hidden_states"])

  hooks.append(parts["text.0"].register_forward_pre_hook(before, with_kwargs=True))
  for name, module in parts.items():
    hooks.append(module.register_forward_hook(lambda m, i, o, name=name: keep(name, tensor_of(o))))
  try:
    yield found
  finally:
    for hook in hooks:
      hook.remove()


# --- What is recorded ---------------------------------------------------------------------------------------------


@functools.cache
def signs():
  """The vectors that sketches are taken by."""
  return 2.0 * np.random.RandomState(0).randint(0, 2, (SKETCHES, BLOCK)) - 1


def sketch(x):
  """Norm and eight projections of a tensor; see the top of this file."""
  flat = x.detach().reshape(-1).double()
  rows = flat
  if len(flat) > BLOCK:
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK).sum(0)
  rows = rows.cpu().numpy()
  return float(flat.norm()), signs()[:, : len(rows)] @ rows


def predictions(logits, labels):
  """Of logits [S, V] and labels [S]: what is kept of the positions that predict a label."""
  places = torch.nonzero(labels[1:] != IGNORE)[:, 0]
  chosen = logits[places].float()
  top = chosen.topk(min(TOP, chosen.shape[-1]), dim=-1)
  kept = {
    "places": places,
    "label_logits": chosen.gather(1, labels[1:][places][:, None])[:, 0],
    "logsumexp": chosen.logsumexp(-1),
    "top_ids": top.indices,
    "top_logits": top.values,
    "full_logits": chosen[:FULL_LOGITS],
  }
  return {name: value.cpu().numpy() for name, value in kept.items()}


def record_sample(side, sample, deep, device):
  """Arrays of a sample, and its activations, or None."""
  rows = rows_of([sample], device)
  learned = np.flatnonzero(sample["labels"].numpy()[1:] != IGNORE)
  images = np.flatnonzero(sample["input_ids"].numpy() == side.image_token_id)
  picks = sorted({0, *images[:1], *images[-1:], *learned[:4], len(sample["input_ids"]) - 1})
  with torch.no_grad(), activations(side.model, picks) if deep else contextlib.nullcontext() as taps:
    out = side.forward(rows)
  used = sample["image_flags"] == 1
  arrays = {
    "input_ids": sample["input_ids"].numpy(),
    "labels": sample["labels"].numpy(),
    "pixel_values": sample["pixel_values"][used].numpy(),
    "loss": np.float64(out.loss.item()),
    **predictions(out.logits[0], rows["labels"][0]),
  }
  return arrays, taps


def record_gradients(side, samples, device, full_below):
  """The loss of samples as one micro-batch by the model's own code, and what is kept of its gradients."""
  side.model.zero_grad()
  loss = side.forward(rows_of(samples, device)).loss
  loss.backward()
  names, norms, sketches, kept = [], [], [], {}
  for name, parameter in side.model.named_parameters():
    if parameter.grad is None:
      continue
    norm, projections = sketch(parameter.grad)
    names.append(name), norms.append(norm), sketches.append(projections)
    if parameter.numel() <= full_below:
      kept[f"full:{name}"] = parameter.grad.float().cpu().numpy()
  side.model.zero_grad()
  return loss.item(), {
    "names": np.array(names),
    "norm": np.array(norms),
    "sketch": np.array(sketches),
    **kept,
  }


def record_packed(side, samples, device):
  """The samples as segments of one row."""
  rows, segments = packed_row(samples, device)
  last = np.flatnonzero(np.diff(segments.numpy())) + 1
  picks = sorted({0, *last, *(last + 1), len(segments) - 1})
  with torch.no_grad(), activations(side.model, picks) as taps:
    out = side.forward(rows)
  arrays = {name: rows[name][0].cpu().numpy() for name in ("input_ids", "labels", "position_ids")}
  taps = {name: value for name, value in taps.items() if "vision" not in name and "projector" not in name}
  return {
    **arrays,
    **taps,
    "segments": segments.numpy(),
    "loss": np.float64(out.loss.item()),
    **predictions(out.logits[0], rows["labels"][0]),
  }


def decayed(model):
  """Names of the parameters that weight decay applies to, by the Trainer of the installed transformers."""
  return set(transformers.Trainer.get_decay_parameter_names(None, model))


def record_update(model):
  """One AdamW update of every parameter for a gradient equal to it; so no noise of gradients is in it."""
  applies, names, norms, sketches = decayed(model), [], [], []
  for name, parameter in model.named_parameters():
    before = parameter.detach().float().clone()
    updated = torch.nn.Parameter(before.clone())
    updated.grad = before.clone()
    decay = WEIGHT_DECAY if name in applies else 0.0
    torch.optim.AdamW([updated], lr=LEARNING_RATE, weight_decay=decay).step()
    norm, projections = sketch(updated.detach().double() - before.double())
    names.append(name), norms.append(norm), sketches.append(projections)
  applied = np.array([name in applies for name in names])
  return {
    "names": np.array(names),
    "decayed": applied,
    "norm": np.array(norms),
    "sketch": np.array(sketches),
    "learning_rate": np.float64(LEARNING_RATE),
    "weight_decay": np.float64(WEIGHT_DECAY),
  }


def versions(device):
  """What computed."""
  import PIL

  names = {"torch": torch, "transformers": transformers, "numpy": np, "pillow": PIL}
  name = torch.cuda.get_device_name() if str(device).startswith("cuda") else platform.processor() or "cpu"
  found = {key: module.__version__ for key, module in names.items()}
  return {"python": platform.python_version(), **found, "device": name}


def rope_frequencies(model):
  """The frequencies of the language model's rotary embedding, as it holds them."""
  for name, buffer in model.named_buffers():
    if name.endswith("inv_freq") and "vision" not in name:
      return buffer.double().cpu().numpy().tolist()
  return None


def record(side, args):
  """Records all, and writes it to the output folder."""
  output, device = Path(args.output), torch.device(args.device)
  output.mkdir(parents=True, exist_ok=True)
  side.model.to(device).eval()
  lines = read_lines(args.meta, args.samples)
  samples, entries = [], []
  for number, line in enumerate(lines):
    sample, deep = side.make(line), number < args.deep
    arrays, taps = record_sample(side, sample, deep, device)
    np.savez_compressed(output / f"sample-{number}.npz", **arrays)
    if taps:
      np.savez_compressed(output / f"activations-{number}.npz", **taps)
    samples += [sample] if deep else []
    entries.append({"dataset": line["dataset"], "line": line["line"], "deep": deep})
    print(f"sample {number}: {line['dataset']} line {line['line'] + 1}, loss {float(arrays['loss']):.6f}")
  manifest = {
    "format": FORMAT,
    "versions": versions(device),
    "model": str(args.model),
    "class": type(side.model).__name__,
    "pipeline": side.name,
    "settings": side.settings,
    "image_token_id": int(side.image_token_id),
    "rope_frequencies": rope_frequencies(side.model),
    "samples": entries,
    "skipped": {},
  }
  if args.gradients:
    loss, gradients = record_gradients(side, samples, device, args.full_below)
    manifest["batch_loss"] = loss
    np.savez_compressed(output / "gradients.npz", **gradients)
  else:
    manifest["skipped"]["gradients"] = "--no-gradients"
  if len(samples) < 2:
    manifest["skipped"]["packed"] = "one sample is no row of segments"
  else:
    try:
      np.savez_compressed(output / "packed.npz", **record_packed(side, samples, device))
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
      reason = str(error).strip().splitlines()[0][:200]
      manifest["skipped"]["packed"] = f"the model does not take a mask of segments ({reason})"
  np.savez_compressed(output / "update.npz", **record_update(side.model))
  (output / "manifest.json").write_text(json.dumps(manifest, indent=1))
  for what, why in manifest["skipped"].items():
    print(f"not recorded: {what}: {why}")
  print(
    f"{output}: recorded; now: python -m internvl_jax.certify --record {output} --model DIR --meta {args.meta}"
  )


def open_side(args):
  """The side that a checkpoint is for, by the model_type of its config.json."""
  kind = json.loads((Path(args.model) / "config.json").read_text())["model_type"]
  if kind == "internvl":
    return Transformers(args)
  try:
    return Reference(args)
  except ImportError as error:
    raise SystemExit(
      f"{args.model} is a checkpoint of the reference ({kind}), whose internvl_chat cannot be imported ({error}): put "
      "its folder on PYTHONPATH, in the environment that it trains in"
    ) from error


def arguments(argv=None):
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", required=True, help="folder of the checkpoint")
  parser.add_argument("--meta", required=True, help="meta file of your mixture")
  parser.add_argument("--samples", type=int, default=8, help="how many lines are recorded")
  parser.add_argument(
    "--deep", type=int, default=2, help="of how many activations and gradients are recorded"
  )
  parser.add_argument("--output", default="record", help="folder to write")
  parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
  parser.add_argument("--no-gradients", dest="gradients", action="store_false", help="saves their memory")
  parser.add_argument(
    "--full_below", type=int, default=8192, help="gradients of so many numbers are kept whole"
  )
  parser.add_argument("--max_seq_length", type=int, default=8192)
  parser.add_argument("--use_fast_tokenizer", action="store_true")
  for name, kind in SETTINGS.items():
    convert = (lambda text: text.lower() in ("true", "1", "yes")) if kind == "bool" else kind
    parser.add_argument(f"--{name}", type=convert)
  return parser.parse_args(argv)


def main(argv=None):
  """Records; TensorFloat-32 is off, so that float32 means it."""
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
  args = arguments(argv)
  record(open_side(args), args)


if __name__ == "__main__":
  main()
