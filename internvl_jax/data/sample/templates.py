"""How a conversation is written as text, by the name that `conv_style` gives."""

import dataclasses

from internvl_jax.data.where import DataError
from internvl_jax.errors import did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Template:
  """The fixed text around the turns of a conversation, and how that text is tokenized.

  Attributes:
    name: the value of `conv_style`.
    system_message: what the system says where the data has no system turn; None: it then has no turn.
    openings: text before a turn's value, by the data's role names. A space at the end belongs to the value:
      tokenizers write it as part of the first word, so it is supervised with an answer.
    answer_opening: the end of a gpt turn's opening that the model writes itself: supervised with an answer, and
      taken off what is generated.
    closings: text after a turn's value, by the same names.
    last_closing: text after an answer that is the last turn, where that differs.
    stop_token: the token that ends an answer; the last answer's closing begins with it.
    unsupervised_tail: how many tokens at the end of an answer's turn are not supervised.
    whole: the dialogue is tokenized as one text; else each turn on its own.
    alternates: turns must alternate between human and gpt; a first one from gpt is left out.
    strips: white space around values is taken off.
  """

  name: str
  system_message: str | None
  openings: dict[str, str]
  answer_opening: str = ""
  closings: dict[str, str]
  last_closing: str | None = None
  stop_token: str
  unsupervised_tail: int = 0
  whole: bool
  alternates: bool
  strips: bool = False


_CHATML_OPENINGS = {
  "system": "<|im_start|>system\n",
  "human": "<|im_start|>user\n",
  "gpt": "<|im_start|>assistant\n",
}
_OLDER_SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"

# The templates of the published checkpoints (`conversation.py` of the reference names and defines them).
_TEMPLATES: dict[str, Template] = {
  template.name: template
  for template in (
    Template(
      name="internvl2_5",
      system_message=(
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
      ),
      openings=_CHATML_OPENINGS,
      closings=dict.fromkeys(_CHATML_OPENINGS, "<|im_end|>\n"),
      stop_token="<|im_end|>",
      # The line break. One token is what the reference leaves out, also where a tokenizer makes two of it.
      unsupervised_tail=1,
      whole=False,
      alternates=False,
    ),
    Template(
      name="Hermes-2",
      system_message=_OLDER_SYSTEM,
      openings=_CHATML_OPENINGS,
      closings=dict.fromkeys(_CHATML_OPENINGS, "<|im_end|>"),
      stop_token="<|im_end|>",
      whole=True,
      alternates=True,
    ),
    Template(
      name="internlm2-chat",
      system_message=_OLDER_SYSTEM,
      openings=_CHATML_OPENINGS,
      closings=dict.fromkeys(_CHATML_OPENINGS, "<|im_end|>"),
      stop_token="<|im_end|>",
      whole=True,
      alternates=True,
      strips=True,
    ),
    Template(
      name="phi3-chat",
      system_message=_OLDER_SYSTEM,
      openings={"system": "<|system|>\n", "human": "<|user|>\n", "gpt": "<|assistant|>\n"},
      closings=dict.fromkeys(("system", "human", "gpt"), "<|end|>"),
      stop_token="<|end|>",
      whole=True,
      alternates=True,
    ),
    Template(
      name="internvl_zh",
      system_message="",
      openings={"system": "", "human": "<human>: ", "gpt": "<bot>: "},
      closings={"system": " ", "human": " ", "gpt": "</s>"},
      stop_token="</s>",
      whole=True,
      alternates=True,
    ),
    # The format of gpt-oss, with the one channel "final". Answers before the last end by <|end|>, as OpenAI's
    # description of the format and a comment of the reference have it. Its code asks the variable of another loop
    # which answer is the last: it loses lines without an image, and ends the last answer of most others by <|end|>.
    Template(
      name="internvl3_5_gpt_oss",
      system_message=(
        "You are InternVL, a large language model trained by Shanghai AI Laboratory.\nKnowledge cutoff: 2024-06\n"
        "Current date: 2025-08-06\n\nReasoning: low\n\n# Valid channels: final. Channel must be included for every message."
      ),
      openings={
        "system": "<|start|>system<|message|>",
        "human": "<|start|>user<|message|>",
        "gpt": "<|start|>assistant<|channel|>final<|message|>",
      },
      answer_opening="<|channel|>final<|message|>",
      closings=dict.fromkeys(("system", "human", "gpt"), "<|end|>"),
      last_closing="<|return|>",
      stop_token="<|return|>",
      whole=False,
      alternates=False,
    ),
  )
}


NAMES: tuple[str, ...] = tuple(_TEMPLATES)
"""The values that `conv_style` may have."""


def get_template(name: str) -> Template:
  """The template of a `conv_style`.

  Raises:
    DataError: the name is unknown.
  """
  if name not in _TEMPLATES:
    raise DataError(f"data.conv_style: unknown template {name!r}{did_you_mean(name, _TEMPLATES)}")
  return _TEMPLATES[name]
