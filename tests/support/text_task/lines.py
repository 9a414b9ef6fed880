"""Lines of text: {"text": "A cat sat."}. No JAX: worker processes import this."""

import dataclasses

from internvl_jax.data.sample import line_keys
from internvl_jax.data.sample.conversations import ConversationLines
from internvl_jax.data.sample.line_keys import LineKeys

_KEYS = LineKeys(texts=("text",), mask_remedy="take it out", roles_remedy="move it to 'text'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextLines(ConversationLines):
  """A text is an answer to nothing."""

  kind = "text"

  @property
  def facts(self):
    return {"text": True}

  def plain(self, record, where):
    plain = line_keys.plain_record(record, where, _KEYS)
    line_keys.checked_text(plain, "text", where)
    return plain

  def unread(self, record, plain, template):
    return line_keys.unread_keys(record, _KEYS)

  def conversations(self, record, where):
    return [[{"from": "human", "value": "Write."}, {"from": "gpt", "value": record["text"]}]]
