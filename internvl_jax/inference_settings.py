"""A checkpoint's own settings for inference: template, system message, tiles, pixels, stop tokens."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from transformers import PreTrainedTokenizerBase

from internvl_jax.arguments import DataTrainingArguments
from internvl_jax.data.sample.templates import NAMES, Template, get_template
from internvl_jax.data.where import DataError
from internvl_jax.errors import UserError
from internvl_jax.hf import chat_template
from internvl_jax.hf import model_config as layouts
from internvl_jax.hf.generation import Generation, read_generation
from internvl_jax.hf.model import Source
from internvl_jax.hf.preprocessor import Preprocessor, read_preprocessor, read_statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stated:
  """The settings of prompts and images that a checkpoint's own files state.

  Attributes:
    template: of its conversations, with its system message.
    why: what the template was chosen by.
    data: how images are cut and normalized.
    generation: what ends an answer.
    notes: what is said of questions and not followed, a line each.
  """

  template: Template
  why: str
  data: DataTrainingArguments
  generation: Generation
  notes: tuple[str, ...]

  def log(self) -> None:
    """Logs what was chosen, and warns of entries that are not followed."""
    data, system = self.data, self.template.system_message
    tiles = "one tile"
    if data.dynamic_image_size and data.max_dynamic_patch > 1:
      thumbnail = " and a thumbnail" if data.use_thumbnail else ""
      tiles = f"{data.min_dynamic_patch} to {data.max_dynamic_patch} tiles{thumbnail}"
    logging.info(
      "Template %r, by %s; %s; images of %s, pixels of %r",
      *(self.template.name, self.why),
      "no system message" if system is None else f"system message {_cut(system, 40)!r}",
      *(tiles, data.normalize_type),
    )
    for note in self.notes:
      logging.warning("%s", note)


def read_stated(source: Source, tokenizer: PreTrainedTokenizerBase) -> Stated:
  """Reads config.json, generation_config.json, the preprocessor's files and the chat template of a checkpoint.

  Args:
    source: the checkpoint.
    tokenizer: its tokenizer.

  Raises:
    UserError: a file has a value that cannot be, or one that answers cannot be given by.
  """
  folder, raw = source.folder, source.raw
  template, why, notes = choose_template(source, tokenizer)
  model = layouts.model_config(raw)
  if source.layout is layouts.HF:
    preprocessor = read_preprocessor(folder, model.vision.image_size)
    settings, more = _hf_settings(folder, raw, preprocessor)
    notes += [*preprocessor.notes, *more]
    if preprocessor.num_frames is not None:
      settings |= dict.fromkeys(("min_num_frame", "max_num_frame"), preprocessor.num_frames)
  else:
    preprocessor = Preprocessor(normalize_type=read_statistics(folder))
    settings = {**_INTERNVL_DEFAULTS, **_recorded(raw)}
  data = DataTrainingArguments(
    force_image_size=model.vision.image_size,
    down_sample_ratio=model.downsample_ratio,
    conv_style=template.name,
    normalize_type=preprocessor.normalize_type,  # pyright: ignore[reportArgumentType] (a key of PIXEL_STATISTICS)
    **settings,
  )
  if data.min_dynamic_patch > data.max_dynamic_patch:
    raise UserError(
      f"{folder}: the fewest tiles, {data.min_dynamic_patch}, exceed the most, {data.max_dynamic_patch}; correct "
      "min_dynamic_patch and max_dynamic_patch of config.json, or min_patches and max_patches of the preprocessor"
    )
  return Stated(
    template=template,
    why=why,
    data=data,
    generation=read_generation(folder, raw, model.text.vocab_size),
    notes=tuple(notes),
  )


def differences(stated: Stated, data: DataTrainingArguments) -> list[str]:
  """The settings of a run that differ from those of the checkpoint it starts from, as "name=value (theirs)".

  Args:
    stated: the checkpoint's settings.
    data: the run's settings.
  """
  names = [
    "conv_style",
    "dynamic_image_size",
    "pad2square",
    "normalize_type",
    "force_image_size",
    "down_sample_ratio",
  ]
  if data.dynamic_image_size and stated.data.dynamic_image_size:
    names += ["use_thumbnail", *_COUNTS]
  found = [
    f"data.{name}={ours!r} ({theirs!r})"
    for name in names
    if (ours := getattr(data, name)) != (theirs := getattr(stated.data, name))
  ]
  template = get_template(data.conv_style)
  if template.name == stated.template.name and template.system_message != stated.template.system_message:
    system = stated.template.system_message
    theirs = "none" if system is None else repr(_cut(system, 40))
    found.append(f"the system message of {template.name!r} ({theirs})")
  return found


def recorded_settings(data: DataTrainingArguments, template: Template | None = None) -> dict[str, Any]:
  """The settings of prompts and images that a saved checkpoint's config.json records, for `read_stated`.

  Args:
    data: the settings.
    template: with another system message than that of `conv_style`.
  """
  system = (template or get_template(data.conv_style)).system_message
  settings = {name: getattr(data, name) for name in RECORDED}
  return {"template": data.conv_style, "system_message": system, **settings}


# --- Tiles --------------------------------------------------------------------------------------------------

_FLAGS = ("dynamic_image_size", "use_thumbnail", "pad2square")
_COUNTS = ("min_dynamic_patch", "max_dynamic_patch")
RECORDED = (*_FLAGS, *_COUNTS)
"""The data settings that config.json records, in both layouts."""

# Where config.json is silent: the reference's class for it, and what transformers' processor does.
_INTERNVL_DEFAULTS = {"max_dynamic_patch": 6}
_HF_DEFAULTS = {"dynamic_image_size": True, "use_thumbnail": True}


def _recorded(raw: Mapping[str, Any]) -> dict[str, Any]:
  """The data settings of config.json."""
  return {name: raw[name] for name in RECORDED if raw.get(name) is not None}


def _hf_settings(
  folder: Path, raw: Mapping[str, Any], preprocessor: Preprocessor
) -> tuple[dict[str, Any], list[str]]:
  """The data settings of a checkpoint of the hf layout, and what is to be said of them.

  The preprocessor decides, as in transformers; what it has no entry for is taken from config.json, where this
  program's exports keep what they were trained with. transformers' processor cuts images whatever
  `crop_to_patches` says: a fixed tile is min_patches = max_patches = 1.
  """
  recorded = _recorded(raw)
  settings = {**_HF_DEFAULTS, **recorded}
  fixed = recorded.get("dynamic_image_size") is False
  counts = {"min_dynamic_patch": preprocessor.min_patches, "max_dynamic_patch": preprocessor.max_patches}
  said = {name: value for name, value in counts.items() if value is not None}
  if fixed and (preprocessor.crop_to_patches is False or said.get("max_dynamic_patch", 1) == 1):
    return settings, []
  notes = [
    f"{folder}: config.json records {name}={recorded[name]}, but {preprocessor.path} says {value}, which is followed"
    for name, value in ({"dynamic_image_size": True} if fixed else said).items()
    if name in recorded and recorded[name] != value
  ]
  if preprocessor.crop_to_patches is False:
    notes.append(
      f"{preprocessor.path}: crop_to_patches=false is not followed, as transformers' InternVLProcessor overrides it; "
      "for one tile set max_patches to 1"
    )
  return {**settings, **said, "dynamic_image_size": True}, notes


# --- Templates ----------------------------------------------------------------------------------------------

# Templates that a family's checkpoints were published with; those of other families are ChatML.
_FAMILY_TEMPLATES = {"phi3": "phi3-chat", "gpt_oss": "internvl3_5_gpt_oss"}
_USUAL = "internvl2_5"
_LAST = "internvl_zh"  # Nothing but </s> marks it, which other tokenizers have, too.
_MARKED = re.compile(r"<\|[^|<>]+\|>")

_Turns = Sequence[tuple[str, str]]
_ASKED: _Turns = (("human", "<image>\nwhich?"),)
_ANSWERED: _Turns = (*_ASKED, ("gpt", "this."), ("human", "why?"))
_TOLD: _Turns = (("system", "be brief."), *_ASKED)
_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_IMAGE = re.compile(r"(?:<img>)?(?:<image>|<IMG_CONTEXT>)(?:</img>)?")


def choose_template(source: Source, tokenizer: PreTrainedTokenizerBase) -> tuple[Template, str, list[str]]:
  """The template of a checkpoint with its system message, what it was chosen by, and what is to be said of it.

  `template` of config.json decides. Without it, in the hf layout, the chat template does, if one of ours renders as
  it does; else the language model's family and the tokens that the tokenizer has.

  Raises:
    UserError: an unknown template, or none that the tokenizer has the tokens of.
  """
  folder, raw = source.folder, source.raw
  name, rendered, lines = raw.get("template"), None, []
  found = chat_template.read_chat_template(folder)
  if found is not None:
    try:
      rendered = _render(tokenizer, found[1])
    except chat_template.RenderError as error:
      lines.append(f"{found[0]}: the chat template cannot be compared with ours ({error})")
  if name is not None:
    template, why = _named(folder, name), "config.json"
  elif (
    rendered is not None
    and source.layout is layouts.HF
    and (fitting := _fitting(source, tokenizer, rendered))
  ):
    template, why = fitting, f"{found[0].name}, which renders so" if found else ""
  else:
    template, why = _by_family(source, tokenizer)
  system = raw.get("system_message")
  # null is no system turn; the reference's code would write it out, so there it is as if it were not said.
  if system is not None or ("system_message" in raw and source.layout is layouts.HF):
    if not isinstance(system, str | None):
      raise UserError(f"{folder}/config.json: system_message={str(system)[:80]} must be a text")
    template = dataclasses.replace(template, system_message=system)
  if found is not None and rendered is not None and (difference := _difference(rendered, template)):
    lines.append(
      f"{found[0]}: the chat template differs from {template.name!r}, which is followed: {difference}"
    )
  if source.layout is layouts.HF:
    return template, why, lines
  for line in lines:  # The reference does not look at it, and it is often the bare language model's.
    logging.info("%s", line)
  return template, why, []


def _named(folder: Path, name: Any) -> Template:
  try:
    return get_template(name if isinstance(name, str) else str(name))
  except DataError as error:
    raise UserError(
      f"{folder}/config.json: template: {str(error).removeprefix('data.conv_style: ')}"
    ) from None


def _candidates(source: Source, tokenizer: PreTrainedTokenizerBase) -> list[Template]:
  """The templates of which the tokenizer has the tokens, the family's own first."""
  family = source.raw[source.layout.text].get("model_type")
  first = [_FAMILY_TEMPLATES.get(str(family), _USUAL), _USUAL]
  names = dict.fromkeys([*first, *(name for name in NAMES if name != _LAST), _LAST])
  vocabulary = tokenizer.get_vocab()

  def tokens(template: Template) -> list[str]:
    return [*_MARKED.findall("".join(template.openings.values())), template.stop_token]

  templates = map(get_template, names)
  return [template for template in templates if all(token in vocabulary for token in tokens(template))]


def _by_family(source: Source, tokenizer: PreTrainedTokenizerBase) -> tuple[Template, str]:
  candidates = _candidates(source, tokenizer)
  if not candidates:
    raise UserError(
      f"{source.folder}/config.json: 'template' is missing, and the tokenizer has the tokens of none; set it to one of "
      f"{', '.join(NAMES)}"
    )
  family = source.raw[source.layout.text].get("model_type")
  template = candidates[0]
  return (
    template,
    f"the language model's family {family!r} and the token {template.stop_token} of the tokenizer",
  )


# --- A chat template beside ours ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rendered:
  """What a chat template makes of three conversations, with `<image>` for an image; `told` None: it takes no system."""

  asked: str
  answered: str
  told: str | None


def _render(tokenizer: PreTrainedTokenizerBase, text: str) -> _Rendered:
  def prompt(turns: _Turns, *, parts: bool) -> str:
    found = chat_template.render(tokenizer, text, [_message(*turn, parts=parts) for turn in turns])
    return _IMAGE.sub("<image>", found).rstrip(" ")

  # Templates of language models take a text; what they make of a list is its Python form, or an error.
  parts = True
  try:
    parts = "'type'" not in prompt(_ASKED, parts=True) and "which?" in prompt(_ASKED, parts=True)
  except chat_template.RenderError:
    parts = False
  try:
    told = prompt(_TOLD, parts=parts)
  except chat_template.RenderError:
    told = None
  return _Rendered(asked=prompt(_ASKED, parts=parts), answered=prompt(_ANSWERED, parts=parts), told=told)


def _message(role: str, value: str, *, parts: bool) -> dict[str, Any]:
  text = value.removeprefix("<image>\n")
  image = [{"type": "image"}] if text != value else []
  return {"role": _ROLES[role], "content": [*image, {"type": "text", "text": text}] if parts else value}


def _written(template: Template, turns: _Turns) -> str:
  """The prompt that a template of ours makes, up to where the answer begins."""
  if turns[0][0] != "system" and template.system_message is not None:
    turns = [("system", template.system_message), *turns]
  values = ((role, value.strip() if template.strips else value) for role, value in turns)
  text = "".join(template.openings[role] + value + template.closings[role] for role, value in values)
  return (text + template.openings["gpt"].removesuffix(template.answer_opening)).rstrip(" ")


def _fitting(source: Source, tokenizer: PreTrainedTokenizerBase, rendered: _Rendered) -> Template | None:
  """The template of ours that renders as the chat template does, with the system message that it writes by itself."""
  for template in _candidates(source, tokenizer):
    tail = _written(dataclasses.replace(template, system_message=None), _ASKED)
    if not rendered.asked.endswith(tail):
      continue
    head = rendered.asked[: -len(tail)]
    opening, closing = template.openings["system"], template.closings["system"]
    inner = head.removeprefix(opening).removesuffix(closing)
    if head not in ("", opening + inner + closing):
      continue
    told = dataclasses.replace(template, system_message=inner if head else None)
    if not _difference(rendered, told):
      return told
  return None


def _difference(rendered: _Rendered, template: Template) -> str:
  """Where a chat template's text first differs from ours; empty if it does not."""
  for theirs, turns in ((rendered.asked, _ASKED), (rendered.answered, _ANSWERED), (rendered.told, _TOLD)):
    ours = _written(template, turns)
    if theirs is None or theirs == ours:
      continue
    same = sum(
      1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(theirs, ours, strict=False))
    )
    start = max(0, same - 16)
    return f"it writes {_cut(theirs[start:], 48)!r}, not {_cut(ours[start:], 48)!r}"
  return ""


def _cut(text: str, length: int) -> str:
  return text if len(text) <= length else text[:length] + "..."
