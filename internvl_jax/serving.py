"""Chat templates and checks of an export, so that a served model is prompted as it was trained.

    Template, system message -> chat template (Jinja), which transformers' processor and servers render
    model, data settings     -> refused, logged or written, before anything heavy

The `hf` layout holds less than a run may set. What it holds is written; what it does not is refused with the
layout that does; what only the caller can set is logged.
"""

import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from internvl_jax.arguments import DataTrainingArguments
from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.data.sample import tiling
from internvl_jax.data.sample.templates import Template
from internvl_jax.data.sample.tokenize import (
  IMAGE_CONTEXT,
  IMAGE_END,
  IMAGE_PLACEHOLDER,
  IMAGE_START,
  ChatTokenizer,
)
from internvl_jax.data.where import Where
from internvl_jax.errors import UserError
from internvl_jax.hf import export, hub
from internvl_jax.hf import model_config as layouts
from internvl_jax.hf.export import Serving
from internvl_jax.hf.model import Source
from internvl_jax.hf.model_config import Layout
from internvl_jax.hf.tokenizer import spare_token
from internvl_jax.inference_settings import recorded_settings

_VIDEO_PLACEHOLDER = "<video>"
_FRAME_NAME = "Frame"  # of transformers' processor

# Text is written by expressions alone: how white space around statements is cut differs among those who render it.
_CHAT_TEMPLATE = """\
{%- set openings = @openings -%}
{%- set closings = @closings -%}
{{- @bos -}}
{%- if not messages or messages[0]['role'] != 'system' -%}
  {{- @head -}}
{%- endif -%}
{%- for message in messages -%}
  {%- set role = message['role'] -%}
  {%- if role not in openings -%}
    {{- raise_exception('a message is from system, user or assistant; this one is from ' ~ role) -}}
  {%- endif -%}
  {%- set turn = namespace(text='') -%}
  {%- if message['content'] is string -%}
    {%- set turn.text = message['content'] -%}
    {%- if role == 'user' -%}
      {%- set turn.text = turn.text | replace('<image>', @image) | replace('<video>', @video) -%}
    {%- endif -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] in ['image', 'image_url'] -%}
        {%- set turn.text = turn.text ~ @image ~ '\\n' -%}
      {%- elif part['type'] in ['video', 'video_url'] -%}
        {%- set turn.text = turn.text ~ @video ~ '\\n' -%}
      {%- elif part['type'] == 'text' -%}
        {%- set turn.text = turn.text ~ part['text'] -%}
      {%- else -%}
        {{- raise_exception('content is of type text, image or video; this is of type ' ~ part['type']) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set closing = @last_closing if role == 'assistant' and loop.last else closings[role] -%}
  {{- openings[role] ~ @text ~ closing -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- @prompt -}}
{%- endif -%}
"""


def chat_template(template: Template, *, image: str, video: str, bos: str = "") -> str:
  r"""A template of conversations as a chat template in Jinja, for `apply_chat_template`.

  A message's content is a text, in which `<image>` and `<video>` of a user stand for such, or a list of parts of type
  text, image and video, each image and video on a line of its own:

      [image, "What?"] -> <|im_start|>user\n<IMG_CONTEXT>\nWhat?<|im_end|>\n...<|im_start|>assistant\n

  Args:
    template: how conversations are written in training, and the system message where they have none.
    image: the placeholder of an image.
    video: the placeholder of a video.
    bos: the token that conversations begin with; "" for none.
  """
  roles = {"system": "system", "user": "human", "assistant": "gpt"}
  # A space at the end of an opening belongs to the answer, as does what the model writes itself.
  prompt = template.openings["gpt"].removesuffix(template.answer_opening).rstrip(" ")
  last = template.closings["gpt"] if template.last_closing is None else template.last_closing
  system = template.system_message
  if system is not None and template.strips:
    system = system.strip()
  values: dict[str, Any] = {
    "openings": {role: template.openings[ours] for role, ours in roles.items()},
    "closings": {role: template.closings[ours] for role, ours in roles.items()},
    "last_closing": last,
    "head": "" if system is None else template.openings["system"] + system + template.closings["system"],
    "prompt": prompt,
    "image": image,
    "video": video,
    "bos": bos,
  }
  written = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
  written["text"] = "(turn.text | trim)" if template.strips else "turn.text"
  return re.sub(r"@(\w+)", lambda found: written[found[1]], _CHAT_TEMPLATE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
  """What a user asks of an export.

  Attributes:
    layout: names and config to write.
    code: a checkpoint with the Python files of the internvl layout; None: the source's.
    layout_flag: what the user calls the layout, for messages.
    code_flag: what the user calls the code.
    frame_name: what training writes before the number of a video's frame.
  """

  layout: Layout
  code: str | None = None
  layout_flag: str
  code_flag: str
  frame_name: str = "Frame-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
  """An export that was checked.

  Attributes:
    serving: how the saved model is asked.
    code: the folder of the code that comes along; None: the source's.
    notes: what it lacks, or leaves to the caller; a line each.
  """

  serving: Serving
  code: Path | None
  notes: list[str]


def prepare(
  source: Source,
  data: DataTrainingArguments,
  tokenizer: PreTrainedTokenizerBase,
  chat: ChatTokenizer,
  settings: ExportSettings,
) -> Export:
  """Checks an export before anything is read or computed for it.

  Args:
    source: the model, with or without adapters.
    data: how its images are cut.
    tokenizer: with the image tokens.
    chat: the tokenizer, and how conversations are written.
    settings: what is asked.

  Raises:
    UserError: the layout cannot hold the model, the settings of its data or its template, or there is no code where it
      is said to be.
  """
  layout = settings.layout
  remedy = f"{settings.layout_flag}=internvl"
  asked = _serving(layout, chat, tokenizer)
  check_form(source, data, layout, remedy=remedy)
  if layout is layouts.HF:
    check_prompt(source, data, tokenizer, chat, asked, remedy=remedy)
  code = _code_folder(settings)
  found = notes(data, settings)
  if layout is layouts.INTERNVL and code is None and not export.has_code(source):
    found.append(
      f"{source.folder} has no code (modeling_internvl_chat.py and what auto_map of config.json names), so neither has "
      "the internvl layout that is written: programs that open it with trust_remote_code=True cannot; name a checkpoint "
      f"that has the code by {settings.code_flag}, or write the hf layout ({settings.layout_flag}=hf)"
    )
  return Export(serving=asked, code=code, notes=found)


def _code_folder(settings: ExportSettings) -> Path | None:
  if settings.code is None:
    return None
  if settings.layout is not layouts.INTERNVL:
    raise UserError(
      f"{settings.code_flag}={settings.code!r} has no effect in the hf layout, which needs no code; leave it out"
    )
  folder = hub.local_folder(settings.code, with_weights=False)
  export.auto_map(folder)
  return folder


def _serving(layout: Layout, chat: ChatTokenizer, tokenizer: PreTrainedTokenizerBase) -> Serving:
  """The chat template of an export."""
  template, bos = chat.template, _bos(chat, tokenizer)
  image, video = IMAGE_PLACEHOLDER, _VIDEO_PLACEHOLDER
  if layout is layouts.HF:
    texts = [*template.openings.values(), *template.closings.values(), template.last_closing or "", bos]
    image, video = IMAGE_CONTEXT, spare_token(tokenizer, used="".join(texts))
  written = chat_template(template, image=image, video=video, bos=bos)
  return Serving(chat_template=written, video_token=video, begins_with_bos=bool(bos))


def _bos(chat: ChatTokenizer, tokenizer: PreTrainedTokenizerBase) -> str:
  return str(tokenizer.bos_token) if chat.leading_ids else ""


# --- Checks -------------------------------------------------------------------------------------------------


def check_form(source: Source, data: DataTrainingArguments, layout: Layout, *, remedy: str) -> None:
  """Refuses a model, or the settings of its data, that a layout cannot hold; reads no weights.

  Args:
    source: the model, with or without adapters.
    data: how its images are cut.
    layout: of the export.
    remedy: the setting that gives the layout that holds them.

  Raises:
    UserError: the layout has no form.
  """
  try:
    layout.table(layouts.family_of(source.raw), source.config)
    layouts.written_config(source.raw, source.config, layout, dtype="float32", image_token_id=0)
  except UserError as error:
    raise UserError(f"{error} ({remedy})") from None
  if layout is not layouts.HF:
    return
  if data.dynamic_image_size and not data.use_thumbnail and data.max_dynamic_patch > 1:
    raise UserError(
      f"the hf layout cannot hold data.use_thumbnail=False with data.max_dynamic_patch={data.max_dynamic_patch}: "
      f"transformers' processor adds a thumbnail wherever it cuts an image; write the internvl layout ({remedy})"
    )
  if data.pad2square and not data.dynamic_image_size:
    raise UserError(
      "the hf layout cannot hold data.pad2square=True: transformers' processor stretches an image to a square; write the "
      f"internvl layout ({remedy})"
    )


def check_prompt(
  source: Source,
  data: DataTrainingArguments,
  tokenizer: PreTrainedTokenizerBase,
  chat: ChatTokenizer,
  told: Serving,
  *,
  remedy: str,
) -> None:
  """Compares what transformers makes of a conversation in the `hf` layout with what training makes, token by token.

  The tokenizer and its chat template are written to a temporary folder and opened there as transformers opens them.

  Raises:
    UserError: they differ.
  """
  with tempfile.TemporaryDirectory() as folder:
    export.save_processor(
      Path(folder),
      source.folder,
      source.config,
      tokenizer,
      data.normalize_type,
      recorded_settings(data),
      told,
    )
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # Content as text: what an image's token becomes is the processor's part.
    text = theirs.apply_chat_template(
      [{"role": role, "content": content} for role, content in _PROBE],
      add_generation_prompt=True,
      tokenize=False,
    )
    found = theirs(text.replace(IMAGE_CONTEXT, IMAGE_START + IMAGE_CONTEXT + IMAGE_END)).input_ids
  wanted = prompt_of(chat, [{"from": _ROLES[role], "value": text} for role, text in _PROBE], images=1)
  if list(found) != wanted.tolist():
    at = next((n for n, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), "the end")
    raise UserError(
      f"the hf layout cannot hold template {chat.template.name!r} with the tokenizer of {source.folder}: transformers "
      f"reads a conversation as {len(found)} tokens, training as {len(wanted)} (first other token: {at}); write the "
      f"internvl layout ({remedy})"
    )


_PROBE = (
  ("user", "<image>\nWhat is 3 + 4?\n\n  中文 naïve"),
  ("assistant", "It is 7."),
  ("user", "Why?"),
)
_ROLES = {"user": "human", "assistant": "gpt"}


def prompt_of(chat: ChatTokenizer, turns: Sequence[Mapping[str, str]], images: int = 0) -> np.ndarray:
  """The tokens before the next answer, int32 [n], each image as one token."""
  where = Where("conversation", "an export", 1)
  laid = chat.lay_out([*turns, {"from": "gpt", "value": "?"}], images, where)
  taught = laid.labels != IGNORE_INDEX
  begins = np.flatnonzero(taught & ~np.concatenate([[False], taught[:-1]]))
  return laid.ids[: begins[-1]]


def notes(data: DataTrainingArguments, settings: ExportSettings) -> list[str]:
  """What the `hf` layout leaves to the caller, one line each; empty for the other."""
  found = []
  if settings.layout is not layouts.HF:
    return found
  if settings.frame_name != _FRAME_NAME:
    padded = ", and training pads them to squares (data.pad2square)" if data.pad2square else ""
    found.append(
      f"the hf layout calls a video's frames '{_FRAME_NAME}1: ', training calls them '{settings.frame_name}1: '{padded}; "
      "to ask as in training, give the frames as images (docs/checkpoints.md)"
    )
  if not data.dynamic_image_size:
    return found
  least, most = data.min_dynamic_patch, data.max_dynamic_patch
  if most > 1:
    found.append(
      f"the images of a question share data.max_dynamic_patch={most} tiles in training, in the hf layout each has as many; "
      f"to ask as in training about several, give the processor max_patches={most} // images"
    )
  if ties := tiling.contested(least, most):
    found.append(
      f"under data.min_dynamic_patch={least} the hf layout's processor may cut images with an aspect ratio of "
      f"{' or '.join(map(str, ties))} into another grid"
    )
  return found
