"""What transformers makes of an export beside what training makes: folders, conversations, and the comparison.

One tiny model, and one tokenizer with the tokens of all templates, serve all combinations; folders have the form of
published ones. `scripts/served_table.py` writes the table of docs/checkpoints.md.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from PIL import Image

from internvl_jax import serving, verification
from internvl_jax.batch import PIXEL_STATISTICS
from internvl_jax.conversion import convert
from internvl_jax.data.sample.fitting import Limits
from internvl_jax.data.sample.sample import SampleMaker
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.source.meta import DatasetSpec
from internvl_jax.data.where import Where
from internvl_jax.errors import UserError
from internvl_jax.eval.greedy import GreedyDecoder, Prompt
from internvl_jax.eval.scoring import prompt_ids
from internvl_jax.hf import export, saving
from internvl_jax.hf.model import open_source
from internvl_jax.hf.model_config import HF, INTERNVL
from internvl_jax.hf.tokenizer import load_tokenizer
from internvl_jax.inference_settings import read_stated, recorded_settings
from internvl_jax.models.internvl import Execution
from tests.support import families

TEMPLATES = ("internvl2_5", "Hermes-2", "internlm2-chat", "phi3-chat", "internvl_zh", "internvl3_5_gpt_oss")
_TOKENS = (
  *("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
  *("<|start|>", "<|message|>", "<|channel|>", "<|return|>"),
)
SIDE = 28

# As published: a system message of its own, and <image> for an image.
_PUBLISHED = (
  "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['content'] is string %}{{ m['content'] }}"
  "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}"
  "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
)


def tokenizer_folder(folder: Path) -> Path:
  """Writes a tokenizer with the tokens of all templates, as published folders have it."""
  folder.mkdir(parents=True)
  hf = transformers.PreTrainedTokenizerFast.from_pretrained(families.TOKENIZER)
  hf.add_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in _TOKENS])
  hf.chat_template = _PUBLISHED
  hf.save_pretrained(folder, save_jinja_files=False)
  return folder


def published(folder: Path) -> Path:
  """Writes a tiny checkpoint of the internvl layout with all that published folders have."""
  tokenizer = tokenizer_folder(folder / "tokenizer")
  config = families.config_of("qwen2")
  size = len(load_tokenizer(tokenizer))
  config["text_config"]["vocab_size"] = size
  start = folder / "hf"
  start.mkdir()
  families.write_config(start, config)
  for file in tokenizer.iterdir():
    shutil.copyfile(file, start / file.name)
  shapes = families.tensor_shapes(open_source(start, with_weights=False))
  saving.save(start, ((key, families.tensor(key, shape)) for key, shape in shapes.items()))
  convert(str(start), folder / "internvl", INTERNVL, lora="merge")
  made = folder / "internvl"
  for file in tokenizer.iterdir():
    shutil.copyfile(file, made / file.name)
  for name in ("configuration", "modeling"):
    (made / f"{name}_internvl_chat.py").write_text("raise AssertionError('executed')")
  auto_map = {
    "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
    "AutoModel": "modeling_internvl_chat.InternVLChatModel",
  }
  config = json.loads((made / "config.json").read_text())
  del config["system_message"]  # Each template has its own.
  (made / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
  (made / "chat_template.jinja").unlink(missing_ok=True)
  return made


def edit(path: Path, **entries: Any) -> None:
  path.write_text(json.dumps({**json.loads(path.read_text()), **entries}, ensure_ascii=False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A setting of training, and a conversation.

  Attributes:
    settings: entries of config.json.
    statistics: of the pixels.
    pictures: sizes (width, height) of the pictures.
    turns: (role, text); `<image>` in a text stands for a picture.
    call: what the caller gives the processor.
  """

  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  statistics: str = "imagenet"
  pictures: tuple[tuple[int, int], ...] = ((200, 90),)
  turns: tuple[tuple[str, str], ...] = (("user", "<image>\nWhat shape is  here?"),)
  call: dict[str, Any] = dataclasses.field(default_factory=dict)


_FRAMES = ((64, 48),) * 3
_FRAME_TEXT = "".join(f"Frame-{n}: <image>\n" for n in (1, 2, 3))

CASES = {
  "one picture": Case(),
  "no picture": Case(pictures=(), turns=(("user", "  Who are you? 你好 "),)),
  "system message": Case(turns=(("system", " Be brief. "), ("user", "<image>\nWhat?"))),
  "three turns": Case(
    turns=(("user", "<image>\nWhat?"), ("assistant", "A red circle."), ("user", "Sure?\n"))
  ),
  "several pictures": Case(
    pictures=((200, 90), (50, 170), (30, 30)),
    turns=(("user", "<image>\n<image>\nand\n<image>\nWhich is red?"),),
    call={"max_patches": 12 // 3},
  ),
  "6 to 9 tiles": Case(settings={"min_dynamic_patch": 6, "max_dynamic_patch": 9}),
  "fixed tile": Case(settings={"dynamic_image_size": False}),
  "no thumbnail, fixed tile": Case(settings={"use_thumbnail": False, "dynamic_image_size": False}),
  "no thumbnail": Case(settings={"use_thumbnail": False}),
  "pad2square": Case(settings={"pad2square": True}),
  "pad2square, fixed tile": Case(settings={"pad2square": True, "dynamic_image_size": False}),
  "siglip's pixels": Case(statistics="siglip"),
  "video": Case(pictures=_FRAMES, turns=(("user", _FRAME_TEXT + "Who?"),), call={"max_patches": 1}),
}


def picture(size: tuple[int, int]) -> Image.Image:
  """A picture with edges and slopes, which the size fixes."""
  width, height = size
  y, x = np.mgrid[:height, :width]
  waves = [np.sin(x / 7 + y / 3), np.cos(x * y / 500), (x + y) % 23 > 11]
  return Image.fromarray((np.stack(waves, -1) * 120 + 128).clip(0, 255).astype(np.uint8))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
  """A prompt of n tokens.

  Attributes:
    ids: int [n].
    tiles: from 0 to 1, float [t, 3, H, W].
    given: what the model is given: uint8 tiles for ours, a batch for transformers'.
  """

  ids: np.ndarray
  tiles: np.ndarray
  given: Any


def folder_of(start: Path, template: str, case: Case, folder: Path) -> Path:
  """Makes a published folder of that template and those settings."""
  shutil.copytree(start, folder)
  edit(folder / "config.json", template=template, **case.settings)
  mean, std = map(list, PIXEL_STATISTICS[case.statistics])
  edit(folder / "preprocessor_config.json", image_mean=mean, image_std=std)
  return folder


def export_processor(folder: Path, target: Path) -> Path:
  """Writes what an export in the hf layout has beside config.json and weights, as `convert` does."""
  source, tokenizer = open_source(folder), load_tokenizer(folder)
  stated = read_stated(source, tokenizer)
  data, chat = stated.data, ChatTokenizer(tokenizer, stated.template)
  settings = serving.ExportSettings(layout=HF, layout_flag="--layout", code_flag="--code")
  prepared = serving.prepare(source, data, tokenizer, chat, settings)
  target.mkdir()
  recorded = recorded_settings(data, chat.template)
  export.save_processor(
    target, folder, source.config, tokenizer, data.normalize_type, recorded, prepared.serving
  )
  return target


def trained(folder: Path, case: Case, scratch: Path) -> Made:
  """What training makes of a conversation, as `generate` does."""
  source, tokenizer = open_source(folder), load_tokenizer(folder)
  stated = read_stated(source, tokenizer)
  data = stated.data
  roles = {"system": "system", "user": "human", "assistant": "gpt"}
  turns = [{"from": roles[role], "value": text} for role, text in case.turns]
  paths = [str(scratch / f"{width}x{height}.png") for width, height in case.pictures]
  for path, size in zip(paths, case.pictures, strict=True):
    picture(size).save(path)
  if "Frame-" in case.turns[-1][1]:
    data = dataclasses.replace(data, dynamic_image_size=False)  # A frame is one tile.
  maker = SampleMaker(
    spec=DatasetSpec(name="question", root="", annotation="a test"),
    data=data,
    tokenizer=ChatTokenizer(tokenizer, stated.template),
    tokens_per_tile=source.config.tokens_per_tile,
    limits=Limits(data.max_seq_length, policy="error"),
  )
  record = {"conversations": [*turns, {"from": "gpt", "value": "?"}], "image": paths}
  sample = maker.make(record, Where("question", "a test", 1))
  return Made(ids=prompt_ids(sample), tiles=sample.tiles.transpose(0, 3, 1, 2) / 255, given=sample.tiles)


def asked(processor: Any, case: Case) -> Made:
  """What transformers' own processor makes of it, the same by both of its ways."""
  pictures = [picture(size) for size in case.pictures]
  rest = iter(pictures)
  messages = []
  for role, text in case.turns:
    content = []
    for number, part in enumerate(text.split("<image>\n") if role == "user" else [text]):
      if number:
        content.append({"type": "image", "image": next(rest)})
      if part:
        content.append({"type": "text", "text": part})
    messages.append({"role": role, "content": content})
  batch = processor.apply_chat_template(
    messages,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    processor_kwargs={"return_tensors": "pt", **case.call},
  )
  # The other way: the text first, with content as text.
  plain = [{"role": role, "content": text} for role, text in case.turns]
  text = processor.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
  images = {"images": pictures} if pictures else {}
  again = processor(text=[text], return_tensors="pt", **images, **case.call)
  assert again["input_ids"].tolist() == batch["input_ids"].tolist()
  mean, std = (np.array(x)[:, None, None] for x in PIXEL_STATISTICS[case.statistics])
  tiles = (
    batch["pixel_values"].numpy() * std + mean if "pixel_values" in batch else np.zeros((0, 3, SIDE, SIDE))
  )
  return Made(ids=batch["input_ids"][0].numpy(), tiles=tiles, given=batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
  """A conversation as training and as transformers has it; `refused` says why there is none of transformers."""

  ours: Made | None = None
  theirs: Made | None = None
  refused: str = ""
  answers: tuple[list[int], list[int]] | None = None

  def cell(self) -> str:
    """The entry of the table: tokens, tiles and tokens of the answer, where they agree."""
    if self.ours is None or self.theirs is None:
      return "refused"
    if self.ours.ids.tolist() != self.theirs.ids.tolist():
      return "other ids"
    if self.ours.tiles.shape != self.theirs.tiles.shape:
      return f"{len(self.theirs.tiles)} tiles, not {len(self.ours.tiles)}"
    if self.ours.tiles.size and np.abs(self.ours.tiles - self.theirs.tiles).max() > 1.01 / 255:
      return "other pixels"
    if self.answers is not None and self.answers[0] != self.answers[1]:
      return "another answer"
    counts = [len(self.ours.ids), len(self.ours.tiles)]
    return " · ".join(map(str, counts if self.answers is None else [*counts, len(self.answers[0])]))


ANSWERED = ("one picture", "several pictures", "video")
NEW_TOKENS = 8


def compare(root: Path) -> dict[tuple[str, str], Compared]:
  """All combinations of settings and templates, by their names."""
  start = published(root / "published")
  usual, found, exported = Case(), {}, {}
  for template in TEMPLATES:
    folder = folder_of(start, template, usual, root / template)
    convert(str(folder), root / f"{template}-hf", HF, lora="merge")
    exported[template] = root / f"{template}-hf"
    processor = transformers.AutoProcessor.from_pretrained(exported[template])
    for name, case in CASES.items():
      before, asks = folder, processor
      if case.settings or case.statistics != usual.statistics:
        before = folder_of(start, template, case, root / f"{template}-{name}")
        try:
          asks = transformers.AutoProcessor.from_pretrained(
            export_processor(before, root / f"{template}-{name}-hf")
          )
        except UserError as error:
          found[name, template] = Compared(refused=str(error))
          continue
      found[name, template] = Compared(ours=trained(before, case, root), theirs=asked(asks, case))
  return {**found, **_answered({key: found[key] for key in found if key[0] in ANSWERED}, exported)}


def _answered(
  compared: dict[tuple[str, str], Compared], exported: dict[str, Path]
) -> dict[tuple[str, str], Compared]:
  """The same with the greedy answers to both prompts, by our decoder and by transformers' model of each export."""
  import torch

  source = open_source(next(iter(exported.values())))
  decoder = GreedyDecoder(
    model=source.model,
    how=Execution(),
    normalize_type="imagenet",
    image_token_id=families.IMAGE_TOKEN,
    stop_ids=(-1,),  # Nothing: each folder has its own.
    max_new_tokens=NEW_TOKENS,
    batch_size=len(compared),
  )
  prompts = [Prompt(pair.ours.ids, pair.ours.given) for pair in compared.values()]
  ours = decoder(verification.load(source), prompts)
  models = {}
  found = {}
  for (name, template), answer in zip(compared, ours, strict=True):
    if template not in models:
      models[template] = transformers.InternVLForConditionalGeneration.from_pretrained(
        exported[template], dtype=torch.float32, attn_implementation="eager"
      ).eval()
    model, pair = models[template], compared[name, template]
    # What ends an answer is the folder's to say.
    stop = model.generation_config.eos_token_id
    out = model.generate(**pair.theirs.given, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    theirs = out[0, len(pair.theirs.ids) :].tolist()
    ends = [n for n, token in enumerate(answer) if token in np.atleast_1d(stop)]
    wanted = answer[: ends[0] + 1].tolist() if ends else answer.tolist()
    found[name, template] = dataclasses.replace(pair, answers=(wanted, theirs))
  return found


def table(found: dict[tuple[str, str], Compared]) -> list[str]:
  """The lines of the table in docs/checkpoints.md."""
  lines = [
    "| | " + " | ".join(f"`{template}`" for template in TEMPLATES) + " |",
    "|---|" + "---|" * len(TEMPLATES),
  ]
  return lines + [
    f"| {name} | " + " | ".join(found[name, template].cell() for template in TEMPLATES) + " |"
    for name in CASES
  ]
