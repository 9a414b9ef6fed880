import itertools
import json
import pathlib

import pytest
import tokenizers
import transformers

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.data.sample.templates import get_template
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.where import DataError
from tests.support.data_toys import ASSETS, WHERE, turns

REFERENCE = pathlib.Path(__file__).parents[4] / "shared" / "reference"
CHATML = ("Hermes-2", "internlm2-chat", "internvl2_5")
OLDER = ("Hermes-2", "internlm2-chat", "internvl_zh", "phi3-chat")
TEMPLATES = (*OLDER, "internvl2_5")
PHI3_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def special(names, **flags):
  return [tokenizers.AddedToken(name, special=True, normalized=False, **flags) for name in names]


def toy_tokenizer():
  """The small tokenizer with the tokens of all templates."""
  hf = transformers.PreTrainedTokenizerFast.from_pretrained(ASSETS / "tokenizer")
  hf.add_tokens(special(("<s>", "</s>", *PHI3_TOKENS)), special_tokens=True)
  return hf


@pytest.fixture(scope="module")
def toy():
  return toy_tokenizer()


@pytest.fixture(scope="module")
def prefixing():
  """Characters only, with a `▁` before every text between special tokens; phi3's take white space after them in.

  Two line breaks merge to one token, as do two spaces.
  """
  characters = ["▁", "\n", *map(chr, range(33, 127))]
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {name: i for i, name in enumerate([*characters, "\n\n", "▁▁"])}, [("\n", "\n"), ("▁", "▁")]
    )
  )
  backend.normalizer = tokenizers.normalizers.Sequence(
    [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
  )
  hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
  plain = ("<s>", "</s>", "<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>")
  hf.add_tokens(special(plain) + special(PHI3_TOKENS, rstrip=True), special_tokens=True)
  return hf


def shown(hf, chat):
  """The tokens' names, with a `*` before those supervised."""
  names = hf.convert_ids_to_tokens(chat.input_ids.tolist())
  taught = (chat.labels != IGNORE_INDEX).tolist()
  assert (chat.labels[taught] == chat.input_ids[taught]).all()
  return " ".join("*" * on + name.replace("\n", "Ċ") for name, on in zip(names, taught, strict=True))


# A system turn, one image of two tokens and two answers in each template; Ċ is a line break, Ġ a space.
CONVERSATION = [{"from": "system", "value": "no"}, *turns("<image>\nwhat", "red circle", "is", "yes\n")]
BY_HAND = {
  "internvl2_5": """
    <|im_start|> system Ċ no <|im_end|> Ċ
    <|im_start|> user Ċ <img> <IMG_CONTEXT> <IMG_CONTEXT> </img> Ċ what <|im_end|> Ċ
    <|im_start|> assistant Ċ *red *Ġcircle *<|im_end|> Ċ
    <|im_start|> user Ċ is <|im_end|> Ċ
    <|im_start|> assistant Ċ *yes *Ċ *<|im_end|> Ċ""",
  "Hermes-2": """
    <|im_start|> system Ċ no <|im_end|>
    <|im_start|> user Ċ <img> <IMG_CONTEXT> <IMG_CONTEXT> </img> Ċ what <|im_end|>
    <|im_start|> assistant Ċ *red *Ġcircle *<|im_end|>
    <|im_start|> user Ċ is <|im_end|>
    <|im_start|> assistant Ċ *yes *Ċ *<|im_end|>""",
  "internlm2-chat": """
    <|im_start|> system Ċ no <|im_end|>
    <|im_start|> user Ċ <img> <IMG_CONTEXT> <IMG_CONTEXT> </img> Ċ what <|im_end|>
    <|im_start|> assistant Ċ *red *Ġcircle *<|im_end|>
    <|im_start|> user Ċ is <|im_end|>
    <|im_start|> assistant Ċ *yes *<|im_end|>""",
  "phi3-chat": """
    <|system|> Ċ no <|end|>
    <|user|> Ċ <img> <IMG_CONTEXT> <IMG_CONTEXT> </img> Ċ what <|end|>
    <|assistant|> Ċ *red *Ġcircle *<|end|>
    <|user|> Ċ is <|end|>
    <|assistant|> Ċ *yes *Ċ *<|end|>""",
  "internvl_zh": """
    no Ġ < h u m an > : Ġ <img> <IMG_CONTEXT> <IMG_CONTEXT> </img> Ċ what
    Ġ < b o t > : *Ġred *Ġcircle *</s>
    < h u m an > : Ġis Ġ < b o t > : *Ġ *yes *Ċ *</s>""",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_by_hand(toy, name):
  chat = ChatTokenizer(toy, name).encode(CONVERSATION, [2], WHERE)
  assert shown(toy, chat).split() == BY_HAND[name].split()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_speaks_where_the_data_has_no_system_turn(toy, name):
  tokenizer = ChatTokenizer(toy, name)
  said = [{"from": "system", "value": get_template(name).system_message}, *CONVERSATION[1:]]
  silent = tokenizer.encode(CONVERSATION[1:], [2], WHERE)
  assert silent.input_ids.tolist() == tokenizer.encode(said, [2], WHERE).input_ids.tolist()


ANSWERS = (
  ["red"],
  ["a red circle.", "no — là", "世界 🦜"],
  ["\n\nfine\n", "  two  spaces "],
  ["", "x"],
  ["<|im_end|> is the end, says <bot>: <|end|> too"],
)


@pytest.mark.parametrize("answers", ANSWERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_supervised_text_is_the_answers(toy, name, answers):
  conversation = [turn for answer in answers for turn in turns("what is <it>?", answer)]
  chat = ChatTokenizer(toy, name).encode(conversation, [], WHERE)
  template = get_template(name)
  space = " " * template.openings["gpt"].endswith(" ")
  wanted = [space + (a.strip() if template.strips else a) + template.stop_token for a in answers]
  assert toy.decode(chat.input_ids[chat.labels != IGNORE_INDEX]) == "".join(wanted)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_piece_is_supervised_where_it_stands(prefixing, name):
  """Tokens that reach over the border of an answer belong to where they begin; none is lost to them."""
  chat = ChatTokenizer(prefixing, name).encode(turns("ab", "cd", "\n", "\n  ef"), [], WHERE)
  wanted = {
    "internvl2_5": "Ċ *c *d *<|im_end|> *▁ ĊĊ *▁▁ *e *f *<|im_end|> *▁",
    "Hermes-2": "Ċ *c *d *<|im_end|> ĊĊ *▁▁ *e *f *<|im_end|>",
    "internlm2-chat": "Ċ *c *d *<|im_end|> Ċ *e *f *<|im_end|>",
    "phi3-chat": "<|assistant|> *▁ *c *d *<|end|> <|assistant|> *▁ *e *f *<|end|>",
    "internvl_zh": ": *▁ *c *d *</s> : *▁ *Ċ *▁▁ *e *f *</s>",
  }
  # The reference leaves out one token at the end of an answer in internvl2_5: here it is the line break alone,
  # not the prefix before it.
  tokens = shown(prefixing, chat).split()
  taught_or_before = [a for a, b in itertools.pairwise([*tokens, ""]) if "*" in a or "*" in b]
  assert taught_or_before == wanted[name].split()


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_of_a_whole_dialogue(prefixing, name):
  """The ids are those of the text written out, each turn on its own only where the template says so."""
  tokenizer = ChatTokenizer(prefixing, name)
  template = get_template(name)
  conversation = [{"from": "system", "value": "be"}, *turns("a <image> b", " c", "<image>d", "e")]
  values = ["be", "a <img><IMG_CONTEXT></img> b", " c", f"<img>{'<IMG_CONTEXT>' * 3}</img>d", "e"]
  texts = [
    template.openings[turn["from"]]
    + (value.strip() if template.strips else value)
    + template.closings[turn["from"]]
    for turn, value in zip(conversation, values, strict=True)
  ]
  ids = [prefixing(text).input_ids for text in (["".join(texts)] if template.whole else texts)]
  assert tokenizer.encode(conversation, [1, 3], WHERE).input_ids.tolist() == list(itertools.chain(*ids))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_first_turn_from_gpt(toy, name):
  tokenizer = ChatTokenizer(toy, name)
  rest = turns("is", "yes")
  first = tokenizer.encode([{"from": "gpt", "value": "red"}, *rest], [], WHERE)
  assert ("*red" in shown(toy, first)) == (name == "internvl2_5")
  if name != "internvl2_5":
    assert first.input_ids.tolist() == tokenizer.encode(rest, [], WHERE).input_ids.tolist()
    alone = tokenizer.encode([CONVERSATION[0], {"from": "gpt", "value": "red"}], [], WHERE)
    assert (alone.labels == IGNORE_INDEX).all()


@pytest.mark.parametrize("name", TEMPLATES)
def test_two_turns_in_a_row_from_one_role(toy, name):
  tokenizer = ChatTokenizer(toy, name)
  conversation = [CONVERSATION[0], *turns("is", "yes"), *turns("a", "b")[1:]]
  if name == "internvl2_5":  # As in the reference.
    assert shown(toy, tokenizer.encode(conversation, [], WHERE)).count("*") == 4
    return
  wanted = f"toy.jsonl:3 (dataset 'toy'): turns 3 and 4 are both from 'gpt', but in template {name!r}"
  with pytest.raises(DataError) as caught:
    tokenizer.encode(conversation, [], WHERE)
  assert str(caught.value).startswith(wanted)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_empty_answer_teaches_to_stop(toy, name):
  chat = ChatTokenizer(toy, name).encode(turns("is", ""), [], WHERE)
  stop = get_template(name).stop_token
  assert [t for t in shown(toy, chat).split() if "*" in t] == ["*Ġ"] * (name == "internvl_zh") + [f"*{stop}"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_question_at_the_end_is_not_supervised(toy, name):
  chat = ChatTokenizer(toy, name).encode(turns("is", "yes", "what"), [], WHERE)
  taught = [t for t in shown(toy, chat).split() if "*" in t]
  assert taught == ["*Ġ"] * (name == "internvl_zh") + ["*yes", f"*{get_template(name).stop_token}"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_bos_stands_once_at_the_start(toy, name):
  plain = ChatTokenizer(toy, name).encode(CONVERSATION, [2], WHERE)
  hf = toy_tokenizer()
  hf.bos_token = "<s>"
  hf.add_bos_token = True
  chat = ChatTokenizer(hf, name).encode(CONVERSATION, [2], WHERE)
  assert chat.input_ids.tolist() == [hf.bos_token_id, *plain.input_ids.tolist()]
  assert chat.labels.tolist() == [IGNORE_INDEX, *plain.labels.tolist()]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("said", [None, False])
def test_bos_of_a_post_processor(toy, name, said):
  """Where the files do not say `add_bos_token`, a whole dialogue gets what the tokenizer puts before any text."""
  backend = tokenizers.Tokenizer.from_str(toy.backend_tokenizer.to_str())
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
  )
  options = {} if said is None else {"add_bos_token": said}
  hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", **options)
  ids = ChatTokenizer(hf, name).encode(CONVERSATION, [2], WHERE).input_ids.tolist()
  assert ids.count(hf.bos_token_id) == (name in OLDER and said is None)
  plain = ChatTokenizer(toy, name).encode(CONVERSATION, [2], WHERE).input_ids.tolist()
  assert ids[-len(plain) :] == plain


def test_stop_tokens(toy):
  stops = {name: toy.convert_ids_to_tokens([ChatTokenizer(toy, name).stop_token_id])[0] for name in TEMPLATES}
  assert stops == dict.fromkeys(CHATML, "<|im_end|>") | {"phi3-chat": "<|end|>", "internvl_zh": "</s>"}


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("internvl2-5", "unknown template 'internvl2-5'; did you mean 'internvl2_5'?"),
    ("internvl3_5_gpt-oss", "unknown template 'internvl3_5_gpt-oss'; did you mean 'internvl3_5_gpt_oss'?"),
    ("xyzzy", "unknown template 'xyzzy'; known: Hermes-2"),
  ],
)
def test_template_names(name, message):
  with pytest.raises(DataError) as caught:
    get_template(name)
  assert message in str(caught.value)


def test_the_templates_of_the_reference():
  path = REFERENCE / "templates.json"
  if not path.exists():
    pytest.skip(f"no {path}: the recorded templates are not in the repository")
  recorded = json.loads(path.read_text())
  assert sorted(recorded) == sorted(TEMPLATES)
  for name, wanted in recorded.items():
    template = get_template(name)
    colon = ": " * (wanted["sep_style"] == "INTERNVL_ZH")
    ends = (wanted["sep"], wanted["sep"]) if wanted["sep2"] is None else (wanted["sep2"], wanted["sep"])
    assert template.system_message == wanted["system_message"]
    assert template.openings == {
      "system": wanted["system_template"].replace("{system_message}", ""),
      "human": wanted["roles"][0] + colon,
      "gpt": wanted["roles"][1] + colon,
    }
    assert template.closings == {"system": ends[0], "human": ends[0], "gpt": ends[1]}
    assert template.stop_token == wanted["sep"].strip()


# --- gpt-oss: a channel that the model names itself, and another end for the last answer -------------------------


@pytest.fixture(scope="module")
def gpt_oss():
  hf = toy_tokenizer()
  hf.add_tokens(special(("<|start|>", "<|message|>", "<|channel|>", "<|return|>")), special_tokens=True)
  return hf


def test_gpt_oss_by_hand(gpt_oss):
  chat = ChatTokenizer(gpt_oss, "internvl3_5_gpt_oss").encode(CONVERSATION, [2], WHERE)
  final = " ".join("*" + token for token in gpt_oss.tokenize("final"))
  wanted = f"""
    <|start|> system <|message|> no <|end|>
    <|start|> user <|message|> <img> <IMG_CONTEXT> <IMG_CONTEXT> </img> Ċ what <|end|>
    <|start|> assistant *<|channel|> {final} *<|message|> *red *Ġcircle *<|end|>
    <|start|> user <|message|> is <|end|>
    <|start|> assistant *<|channel|> {final} *<|message|> *yes *Ċ *<|return|>"""
  assert shown(gpt_oss, chat).split() == wanted.split()


def test_gpt_oss_ends_its_last_answer_alone_by_return(gpt_oss):
  tokenizer = ChatTokenizer(gpt_oss, "internvl3_5_gpt_oss")
  assert tokenizer.stop_token_id == gpt_oss.convert_tokens_to_ids("<|return|>")
  for conversation, ends in (
    (turns("is", "yes"), ["<|return|>"]),
    (turns("is", "yes", "a", "b", "c", "d"), ["<|end|>", "<|end|>", "<|return|>"]),
    (turns("is", "yes", "what"), ["<|end|>"]),
    ([{"from": "gpt", "value": "red"}, *turns("is", "")], ["<|end|>", "<|return|>"]),
  ):
    tokens = shown(gpt_oss, tokenizer.encode(conversation, [], WHERE)).split()
    assert [token[1:] for token in tokens if token in ("*<|end|>", "*<|return|>")] == ends
    assert tokens.count("<|return|>") == 0
  # The reference's system message, which it took from gpt-oss's own.
  text = gpt_oss.decode(tokenizer.encode(turns("is", "yes"), [], WHERE).input_ids)
  assert text.startswith(
    "<|start|>system<|message|>You are InternVL, a large language model trained by Shanghai"
  )
  assert (
    "\n\n# Valid channels: final. Channel must be included for every message.<|end|><|start|>user" in text
  )


def test_gpt_oss_answers_are_read_without_their_channel(gpt_oss):
  tokenizer = ChatTokenizer(gpt_oss, "internvl3_5_gpt_oss")
  final = "<|start|>assistant<|channel|>final<|message|>"
  for text, answer in (
    ("<|channel|>final<|message|>red circle", "red circle"),
    (f"<|channel|>analysis<|message|>hm<|end|>{final}red", "red"),
    ("red", "red"),
    ("<|channel|>final<|message|>", ""),
    ("", ""),
  ):
    assert tokenizer.decode_answer(gpt_oss(text).input_ids) == answer
  plain = ChatTokenizer(gpt_oss, "internvl2_5")
  assert plain.decode_answer(gpt_oss("red circle").input_ids) == "red circle"
