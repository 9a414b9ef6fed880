"""The model `internvl_jax` of lmms-eval, which finds it by the entry point `lmms_eval.models` of this package.

python -m lmms_eval --model internvl_jax --model_args pretrained=OUTPUT_DIR,bf16=True --batch_size 8 --tasks mme
"""

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

import internvl_jax

MANIFEST = ModelManifest(model_id="internvl_jax", chat_class_path=f"{__name__}.InternVLJax")
"""What lmms-eval reads of the entry point."""


class InternVLJax(lmms):
  """A checkpoint of ours, as a model that is given messages with pictures in their places."""

  is_simple = False

  def __init__(
    self,
    pretrained: str,
    *,
    batch_size: int | str = 1,
    bf16: bool = True,
    devices: int = 1,
    max_tiles: int | None = None,
    frames: int | None = None,
    **others: Any,
  ):
    """Opens a checkpoint.

    Args:
      pretrained: the checkpoint: a folder, a hub id or a URL.
      batch_size: questions at once; "auto" is 8.
      bf16: whether to compute in bfloat16.
      devices: how many share the weights.
      max_tiles: of each picture; as in training if unset.
      frames: of each video; as in training if unset.
      **others: lmms-eval's own, which have no meaning here: `device` and `max_batch_size`.

    Raises:
      UserError: there is another argument, or the checkpoint cannot be run.
    """
    super().__init__()
    if unknown := others.keys() - {"device", "max_batch_size"}:
      raise internvl_jax.UserError(
        f"--model_args: the model internvl_jax has no {', '.join(sorted(unknown))}"
      )
    self.batch_size = 8 if batch_size == "auto" else int(batch_size)
    self.media = {"max_tiles": max_tiles, "frames": frames}
    self.model = internvl_jax.open_model(pretrained, bf16=bf16, devices=devices)

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """The answers to requests, in their order; those with the same settings are asked in batches."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, request in enumerate(requests):
      groups.setdefault(tuple(settings_of(request.args[2]).items()), []).append(number)
    answers = [""] * len(requests)
    for settings, numbers in groups.items():
      asked = [self._question(requests[number]) for number in numbers]
      known: dict[str, Any] = dict(settings)
      known |= {name: value for name, value in self.media.items() if value is not None}
      found = self.model.answers(asked, batch_size=self.batch_size, **known)
      for number, answer in zip(numbers, found, strict=True):
        answers[number] = answer
        context, _, kwargs, *_ = requests[number].args
        self.cache_hook.add_partial("generate_until", (context, kwargs), answer)
    return answers

  def _question(self, request: Any) -> internvl_jax.Question:
    _, doc_to_messages, _, doc_id, task, split = request.args
    return question_of(doc_to_messages(self.task_dict[task][split][doc_id]))

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """Not there: tasks that compare likelihoods cannot be run."""
    raise NotImplementedError(
      "internvl_jax answers questions; it does not score given answers (loglikelihood)"
    )

  def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
    """Not there: tasks of several rounds cannot be run."""
    raise NotImplementedError("internvl_jax runs no tasks of several rounds (generate_until_multi_round)")


def settings_of(kwargs: dict[str, Any]) -> dict[str, Any]:
  """The settings of answers, by those of a task; without sampling, all but the length is left out."""
  settings: dict[str, Any] = {"max_new_tokens": int(kwargs.get("max_new_tokens") or 1024)}
  temperature = kwargs.get("temperature") or 0
  if temperature > 0 and kwargs.get("do_sample", True):
    settings["temperature"] = float(temperature)
    settings |= {name: kwargs[name] for name in ("top_p", "top_k") if kwargs.get(name)}
  return settings


def question_of(messages: Sequence[dict[str, Any]]) -> internvl_jax.Question:
  """A conversation of lmms-eval, whose last message is the question."""
  system, history, said = None, [], []
  for message in messages:
    question = content_of(message["content"])
    if message["role"] == "system":
      system = question.text
    elif message["role"] == "assistant":
      history.append((said.pop(), question.text))
    else:
      said.append(question)
  (last,) = said
  return internvl_jax.Question(
    last.text, images=last.images, videos=last.videos, history=history, system=system
  )


def content_of(content: Sequence[dict[str, Any]]) -> internvl_jax.Question:
  """The content of a message, pictures in their places; if they come first, as the reference's `chat` writes them."""
  media: dict[str, list[Any]] = {"image": [], "video": []}
  texts = []
  for part in content:
    if part["type"] == "text":
      texts.append(part["text"])
    else:
      media[part["type"]].append(part["url"])
      texts.append(f"<{part['type']}>\n")
  count = sum(map(len, media.values()))
  leading = all(part["type"] != "text" for part in content[:count])
  text = "".join(texts[count:] if leading else texts)
  return internvl_jax.Question(text, images=media["image"], videos=media["video"])
