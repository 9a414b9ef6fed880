"""A checkpoint's generation_config.json: what ends an answer, how long it may be, and what greedy decoding leaves out."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_jax.errors import UserError
from internvl_jax.hf import model_config as config_io

FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """A checkpoint's own settings of generation.

  Attributes:
    stop_ids: ids that end an answer, beside the template's.
    max_new_tokens: longest answer in tokens; None where nothing is said.
    notes: what is said and not followed, a line each.
  """

  stop_ids: tuple[int, ...] = ()
  max_new_tokens: int | None = None
  notes: tuple[str, ...] = ()


# Settings that change greedy answers, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  "do_sample": (False,),
  "num_beams": (1,),
  "num_beam_groups": (1,),
  "penalty_alpha": (0.0,),
  "repetition_penalty": (1.0,),
  "encoder_repetition_penalty": (1.0,),
  "no_repeat_ngram_size": (0,),
  "encoder_no_repeat_ngram_size": (0,),
  "min_length": (0,),
  "min_new_tokens": (0,),
  "guidance_scale": (1.0,),
  "bad_words_ids": ([],),
  "suppress_tokens": ([],),
  "begin_suppress_tokens": ([],),
  "force_words_ids": ([],),
  "constraints": ([],),
  "forced_bos_token_id": (),
  "forced_eos_token_id": (),
  "exponential_decay_length_penalty": (),
  "sequence_bias": ({}, []),
  "stop_strings": ([], ""),
  "max_time": (),
  "dola_layers": (),
  "watermarking_config": (),
}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def read_generation(folder: Path, raw: Mapping[str, Any], vocab_size: int) -> Generation:
  """Reads generation_config.json; without an entry, the ids that end an answer are those of config.json.

  transformers looks in the same order. Of config.json, the entry of the whole model comes before the language model's.

  Args:
    folder: the checkpoint.
    raw: its config.json.
    vocab_size: ids that the model gives.

  Raises:
    UserError: the file is no JSON object, or an entry is no id or number of tokens.
  """
  path = folder / FILE
  said = config_io.read_json(path) if path.is_file() else {}
  text = config_io.layout_of(raw).text
  places = ((str(path), said), (f"{folder}/config.json", raw), (f"{folder}/config.json: {text}", raw[text]))
  ends = [
    (where, entries["eos_token_id"]) for where, entries in places if entries.get("eos_token_id") is not None
  ]
  longest = said.get("max_new_tokens")
  if longest is not None and not (_is_id(longest) and longest > 0):
    raise UserError(
      f"{path}: max_new_tokens={longest!r} must be a whole number from 1; set it so or take it out"
    )
  stop_ids = _ids(*ends[0]) if ends else ()
  notes = []
  if ignored := _ignored(said):
    notes.append(f"{path}: {', '.join(ignored)} not followed: answers are greedy")
  if unknown := [i for i in stop_ids if not 0 <= i < vocab_size]:
    notes.append(
      f"{ends[0][0]}: eos_token_id names {unknown}, which the model of {vocab_size} ids never gives"
    )
  return Generation(
    stop_ids=tuple(i for i in stop_ids if i not in unknown), max_new_tokens=longest, notes=tuple(notes)
  )


def _is_id(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _ids(where: str, value: Any) -> tuple[int, ...]:
  listed = value if isinstance(value, list) else [value]
  if not all(map(_is_id, listed)):
    raise UserError(f"{where}: eos_token_id={str(value)[:80]} must be a token's id or a list of ids")
  return tuple(dict.fromkeys(listed))


def _ignored(said: Mapping[str, Any]) -> list[str]:
  names = [
    name
    for name, neutral in _NEUTRAL.items()
    if said.get(name) is not None and not any(said[name] == value for value in neutral)
  ]
  if "do_sample" in names:
    names[1:1] = [name for name in _SAMPLING if said.get(name) is not None]
  return [f"{name}={str(said[name])[:40]}" for name in names]
