"""How a conversation is written as text, by the name that `conv_style` gives."""

import dataclasses

from internvl_jax.data.errors import DataError, did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Template:
  """The fixed text around the turns of a conversation.

  Attributes:
    name: the value of `conv_style`.
    system_message: what the system says where the data has no system turn.
    openings: text before a turn's value, by the data's role names.
    closing: text after a turn's value, the same for every role.
  """

  name: str
  system_message: str
  openings: dict[str, str]
  closing: str


# The templates of the published checkpoints (`conversation.py` of the reference names and defines them).
_TEMPLATES: dict[str, Template] = {
  "internvl2_5": Template(
    name="internvl2_5",
    system_message=(
      "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    ),
    openings={
      "system": "<|im_start|>system\n",
      "human": "<|im_start|>user\n",
      "gpt": "<|im_start|>assistant\n",
    },
    closing="<|im_end|>\n",
  ),
}

_NOT_YET = ("Hermes-2", "internlm2-chat", "internvl_zh", "phi3-chat")


def get_template(name: str) -> Template:
  """Returns the template of a `conv_style`.

  Raises:
    DataError: the name is unknown, or its template is not supported yet.
  """
  if name in _TEMPLATES:
    return _TEMPLATES[name]
  supported = ", ".join(sorted(_TEMPLATES))
  if name in _NOT_YET:
    raise DataError(f"data.conv_style: template {name!r} is not supported yet; supported: {supported}")
  raise DataError(f"data.conv_style: unknown template {name!r}{did_you_mean(name, (*_TEMPLATES, *_NOT_YET))}")
