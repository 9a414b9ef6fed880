import json
import pathlib
import pickle
import time

import pytest
import tokenizers
import transformers

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.data.sample.templates import get_template
from internvl_jax.data.sample.tokenize import ChatTokenizer, with_placeholder
from internvl_jax.data.where import DataError
from tests.support.data_toys import ASSETS, WHERE, turns

REFERENCE = pathlib.Path(__file__).parents[4] / "shared" / "reference"
IMAGE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]


def slow_encode(hf, template, conversation, image_tokens):
  """The definition, one tokenizer call a turn and every image token written out as text."""
  template = get_template(template)
  conversation = list(conversation)
  if conversation[0]["from"] != "system":
    conversation.insert(0, {"from": "system", "value": template.system_message})
  sizes = iter(image_tokens)
  opening = len(hf(template.openings["gpt"], add_special_tokens=False).input_ids)
  ids, labels = [], []
  for turn in conversation:
    text = turn["value"]
    while turn["from"] == "human" and "<image>" in text:
      text = text.replace("<image>", "<img>" + "<IMG_CONTEXT>" * next(sizes) + "</img>", 1)
    text = template.openings[turn["from"]] + text + template.closings[turn["from"]]
    piece = hf(text, add_special_tokens=False).input_ids
    ids += piece
    answer = turn["from"] == "gpt"
    labels += [t if answer and opening <= i < len(piece) - 1 else IGNORE_INDEX for i, t in enumerate(piece)]
  return ids, labels


CASES = {
  "one image": (turns("<image>\nwhat shape is it?", "a circle"), [5]),
  "several turns": (turns("<image>\nwhat color?", "red", "sure?", "yes — là", "ok", "\n\nfine\n"), [7]),
  "two images": (turns("a <image> b\n<image>c", "x", "<image>", "y"), [1, 8, 3]),
  "text": (turns("hello 世界", "def f():\n    return 1\n"), []),
  "system": ([{"from": "system", "value": "Be terse."}, *turns("<image>go", "no")], [2]),
  "answer first": ([{"from": "gpt", "value": "hi"}, *turns("<image>", "no")], [4]),
  "<image> said by gpt stays text": (turns("<image>what?", "an <image> tag"), [2]),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_the_definition(hf_tokenizer, tokenizer, name):
  conversation, sizes = CASES[name][0], CASES[name][1]
  before = json.dumps(conversation)
  chat = tokenizer.encode(conversation, sizes, WHERE)
  ids, labels = slow_encode(hf_tokenizer, "internvl2_5", conversation, sizes)
  assert chat.input_ids.tolist() == ids
  assert chat.labels.tolist() == labels
  assert json.dumps(conversation) == before
  assert (chat.input_ids == tokenizer.image_token_id).sum() == sum(sizes)


def test_supervised_text_by_hand(hf_tokenizer, tokenizer):
  conversation = turns("<image>\nwhat color?", "red", "sure?", "yes")
  chat = tokenizer.encode(conversation, [3], WHERE)
  supervised = chat.input_ids[chat.labels != IGNORE_INDEX]
  assert hf_tokenizer.decode(supervised) == "red<|im_end|>yes<|im_end|>"
  assert (chat.labels[chat.labels != IGNORE_INDEX] == supervised).all()
  text = hf_tokenizer.decode(chat.input_ids)
  system = get_template("internvl2_5").system_message
  assert text == (
    f"<|im_start|>system\n{system}<|im_end|>\n"
    "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT></img>\nwhat color?<|im_end|>\n"
    "<|im_start|>assistant\nred<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
  )


def recorded(case):
  """Ids and labels of a case, whose runs are [id, how often, supervised]."""
  ids = [i for i, count, _ in case["runs"] for _ in range(count)]
  labels = [i if taught else IGNORE_INDEX for i, count, taught in case["runs"] for _ in range(count)]
  return ids, labels


def test_some_recorded_tokens_of_the_reference():
  """With the ids of Qwen2.5's tokenizer, of which tokenizer.json has what these conversations need."""
  folder = ASSETS / "recorded_turns"
  hf = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
  cases = json.loads((folder / "cases.json").read_text())
  assert len(cases) == 14
  for case in cases:
    chat = ChatTokenizer(hf, case["template"]).encode(case["conversations"], case["images"], WHERE)
    if case["runs"] is None:  # The reference fails on a system turn in Hermes-2.
      assert (case["template"], case["name"]) == ("Hermes-2", "system")
      text = hf.decode(chat.input_ids)
      assert text.startswith(
        "<|im_start|>system\nYou are a terse assistant.<|im_end|><|im_start|>user\n<img>"
      )
      assert hf.decode(chat.input_ids[chat.labels != IGNORE_INDEX]) == "Dog on grass.<|im_end|>"
      continue
    assert (chat.input_ids.tolist(), chat.labels.tolist()) == recorded(case), (case["template"], case["name"])


@pytest.fixture(scope="module")
def qwen():
  folder = REFERENCE / "tokenizers" / "qwen2_5"
  if not folder.exists():
    pytest.skip(
      f"no {folder}: all recorded tokens need the 7 MB Qwen2.5 tokenizer, which is not in the repository"
    )
  hf = transformers.AutoTokenizer.from_pretrained(folder)
  hf.add_tokens(IMAGE_TOKENS, special_tokens=True)
  return hf


@pytest.mark.parametrize(("template", "kept"), [("internvl2_5", 8), ("Hermes-2", 7)])
def test_recorded_tokens_of_the_reference(qwen, template, kept):
  cases = json.loads((REFERENCE / "preprocess.json").read_text())
  cases = [case for case in cases if case["template"] == template and case["error"] is None]
  assert len(cases) == kept
  tokenizer = ChatTokenizer(qwen, template)
  for case in cases:
    sizes = [] if case["text_only"] else case["num_image_tokens"]
    chat = tokenizer.encode(case["conversations"], sizes, WHERE)
    length = case["max_length"]
    assert chat.input_ids[:length].tolist() == case["input_ids"], case["name"]
    assert chat.labels[:length].tolist() == case["labels"], case["name"]
    assert (len(chat.labels) > length) == (case["name"] == "truncated")


@pytest.mark.parametrize(
  ("conversation", "sizes", "message"),
  [
    (turns("<image><image>", "a"), [4], "2 <image> in the human turns but 1 images"),
    (turns("<image>", "a"), [4, 4], "1 <image> in the human turns but 2 images"),
    (turns("what is <image>?", "a"), [], "1 <image> in the human turns but 0 images"),
    (
      turns("<image>", "an <image> tag"),
      [4, 4],
      "1 <image> in the human turns (1 more in other turns, where it is plain text) but 2 images",
    ),
    (turns("<image> <IMG_CONTEXT>", "a"), [4], "2 <IMG_CONTEXT> tokens for 1 images"),
    (turns("what?", "<IMG_CONTEXT>"), [], "1 <IMG_CONTEXT> tokens for 0 images"),
    ([{"from": "user", "value": "a"}], [], "turn 1 is from 'user'; did you mean 'human'?"),
    ([*turns("a", "b"), {"from": "humn", "value": "a"}], [], "turn 3 is from 'humn'; did you mean 'human'"),
    (
      [*turns("a", "b"), {"from": "system", "value": "a"}],
      [],
      "turn 3 is from 'system', which must be turn 1",
    ),
    ([{"from": "human", "value": 7}], [], "turn 1 must be"),
    ([{"value": "a"}], [], "turn 1 must be"),
    (turns("a", None), [], "turn 2 must be"),
    ([*turns("a"), {"from": "gpt"}], [], "turn 2 must be"),
    ([{"from": ["gpt"], "value": "a"}], [], "turn 1 is from ['gpt']"),
    (["hello"], [], "turn 1 must be"),
    ([], [], "at least one turn, got an empty list"),
    ("hello", [], "at least one turn, got str"),
    ({"from": "gpt", "value": "a"}, [], "at least one turn, got dict"),
    (None, [], "at least one turn, got NoneType"),
    (turns("a", "b\ud83d"), [], "turn 2: character 2 is '\\ud83d', half of a surrogate pair"),
  ],
)
def test_malformed_conversations_are_named(tokenizer, conversation, sizes, message):
  with pytest.raises(DataError) as caught:
    tokenizer.encode(conversation, sizes, WHERE)
  assert message in str(caught.value)
  assert str(caught.value).startswith("toy.jsonl:3 (dataset 'toy'): ")
  assert "\n" not in str(caught.value)


def test_placeholder_goes_before_the_first_human_turn():
  plain = turns("what?", "red")
  assert with_placeholder(plain)[0]["value"] == "<image>\nwhat?"
  assert plain[0]["value"] == "what?"
  system = [{"from": "system", "value": "s"}, *turns("what?", "red")]
  assert [turn["value"] for turn in with_placeholder(system)] == ["s", "<image>\nwhat?", "red"]
  later = turns("hi", "hello", "and <image>?", "red")
  assert with_placeholder(later) == later


def test_bos_token_stands_once_at_the_start(tokenizer):
  hf = transformers.PreTrainedTokenizerFast.from_pretrained(ASSETS / "tokenizer", bos_token="<|endoftext|>")
  hf.add_bos_token = True
  conversation = turns("what?", "red", "and?", "blue")
  chat = ChatTokenizer(hf, "internvl2_5").encode(conversation, [], WHERE)
  plain = tokenizer.encode(conversation, [], WHERE)
  assert chat.input_ids.tolist() == [hf.bos_token_id, *plain.input_ids.tolist()]
  assert chat.labels.tolist() == [IGNORE_INDEX, *plain.labels.tolist()]


def test_padding_switched_on_elsewhere_does_not_reach_it(hf_tokenizer, tokenizer):
  conversation = turns("what?", "red")
  before = tokenizer.encode(conversation, [], WHERE).input_ids.tolist()
  hf_tokenizer(["a", "a much longer text"], padding="max_length", max_length=700, truncation=True)
  try:
    assert tokenizer.encode(conversation, [], WHERE).input_ids.tolist() == before
  finally:
    hf_tokenizer.backend_tokenizer.no_padding()
    hf_tokenizer.backend_tokenizer.no_truncation()


def test_pickles(tokenizer):
  copy = pickle.loads(pickle.dumps(tokenizer))
  conversation = turns("<image>what?", "red")
  again = copy.encode(conversation, [9], WHERE)
  assert again.input_ids.tolist() == tokenizer.encode(conversation, [9], WHERE).input_ids.tolist()


def test_tokenizer_without_image_tokens(hf_tokenizer):
  class NoBackend:
    pass

  with pytest.raises(DataError, match=r"NoBackend has no tokenizers backend"):
    ChatTokenizer(NoBackend(), "internvl2_5")
  spec = json.loads((ASSETS / "tokenizer" / "tokenizer.json").read_text())
  spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != "<IMG_CONTEXT>"]
  del spec["model"]["vocab"]["<IMG_CONTEXT>"]
  bare = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(spec))
  )
  with pytest.raises(DataError, match=r"lacks <IMG_CONTEXT>;"):
    ChatTokenizer(bare, "internvl2_5")


def test_a_tokenizer_without_the_token_that_ends_an_answer(hf_tokenizer):
  wanted = r"template 'phi3-chat' ends answers by '<\|end\|>', which the tokenizer writes as 4 tokens; add it"
  with pytest.raises(DataError, match=wanted):
    ChatTokenizer(hf_tokenizer, "phi3-chat")


def test_time_is_linear_in_the_length_of_an_answer(tokenizer):
  begin = time.perf_counter()
  for unit in ("red circle ", "a", "世", "\n"):
    assert tokenizer.encode(turns("what?", unit * (200_000 // len(unit))), [], WHERE).labels.max() > 0
  # Less than 1 s in all; what is quadratic takes minutes.
  assert time.perf_counter() - begin < 30
