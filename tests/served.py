"""What transformers makes of an export beside what training makes: folders, conversations, and the comparison.

One tiny model, and one tokenizer with the tokens of all templates, serve all combinations; folders have the form of
published ones. `scripts/served_table.py` writes the table of docs/checkpoints.md.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from PIL import Image

import families
from internvl_jax.arguments import DataTrainingArguments
from internvl_jax.batch import PIXEL_STATISTICS
from internvl_jax.convert import convert
from internvl_jax.data.errors import Where
from internvl_jax.data.fitting import Limits
from internvl_jax.data.meta import DatasetSpec
from internvl_jax.data.sample import SampleMaker
from internvl_jax.data.tokenize import ChatTokenizer
from internvl_jax.eval.scoring import prompt_ids
from internvl_jax.hf import weights
from internvl_jax.hf.config import HF, INTERNVL
from internvl_jax.hf.model import Source, open_source
from internvl_jax.hf.tokenizer import load_tokenizer
from internvl_jax.inference import data_settings

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
  weights.save(start, ((key, families._tensor(key, shape)) for key, shape in shapes.items()))
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
  """A prompt, int [n], and tiles from 0 to 1, float [t, 3, H, W]."""

  ids: np.ndarray
  tiles: np.ndarray


def trained(folder: Path, case: Case, scratch: Path) -> tuple[Made, Source, np.ndarray]:
  """What training makes of a conversation, as `generate` does; also its tiles in uint8."""
  source = open_source(folder)
  data: DataTrainingArguments = data_settings(source)
  roles = {"system": "system", "user": "human", "assistant": "gpt"}
  turns = [{"from": roles[role], "value": text} for role, text in case.turns]
  paths = []
  for number, size in enumerate(case.pictures):
    paths.append(str(scratch / f"{number}.png"))
    picture(size).save(paths[-1])
  if "Frame-" in case.turns[-1][1]:
    data = dataclasses.replace(data, dynamic_image_size=False)  # A frame is one tile.
  maker = SampleMaker(
    spec=DatasetSpec(name="question", root="", annotation="a test"),
    data=data,
    tokenizer=ChatTokenizer(load_tokenizer(folder), data.conv_style),
    tokens_per_tile=source.config.tokens_per_tile,
    limits=Limits(data.max_seq_length, policy="error"),
  )
  record = {"conversations": [*turns, {"from": "gpt", "value": "?"}], "image": paths}
  sample = maker.make(record, Where("question", "a test", 1))
  tiles = sample.tiles.transpose(0, 3, 1, 2) / 255
  return Made(ids=prompt_ids(sample), tiles=tiles), source, sample.tiles


def asked(folder: Path, case: Case) -> tuple[Made, dict[str, Any]]:
  """What transformers' own processor makes of it, by both of its ways; also the batch for its model."""
  processor = _processor(folder)
  pictures = iter([picture(size) for size in case.pictures])
  messages = []
  for role, text in case.turns:
    content = []
    for number, part in enumerate(text.split("<image>\n") if role == "user" else [text]):
      if number:
        content.append({"type": "image", "image": next(pictures)})
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
  given = {"images": [picture(size) for size in case.pictures]} if case.pictures else {}
  again = processor(text=[text], return_tensors="pt", **given, **case.call)
  assert again["input_ids"].tolist() == batch["input_ids"].tolist()
  ids = batch["input_ids"][0].numpy()
  if "pixel_values" not in batch:
    return Made(ids=ids, tiles=np.zeros((0, 3, SIDE, SIDE))), batch
  mean, std = (np.array(x)[:, None, None] for x in PIXEL_STATISTICS[case.statistics])
  return Made(ids=ids, tiles=batch["pixel_values"].numpy() * std + mean), batch


@functools.cache
def _processor(folder: Path) -> Any:
  return transformers.AutoProcessor.from_pretrained(folder)


def export(start: Path, template: str, case: Case, target: Path) -> tuple[Path, Path]:
  """A published folder of that template and those settings, and its export in the hf layout."""
  before = target / "before"
  shutil.copytree(start, before)
  edit(before / "config.json", template=template, **case.settings)
  statistics = PIXEL_STATISTICS[case.statistics]
  mean, std = map(list, statistics)
  edit(before / "preprocessor_config.json", image_mean=mean, image_std=std)
  convert(str(before), target / "hf", HF, lora="merge")
  return before, target / "hf"
