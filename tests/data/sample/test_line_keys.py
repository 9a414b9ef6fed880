"""Keys of lines and turns: read, honoured as other trainers mean them, refused, or noted by the doctor."""

import json

import numpy as np
import pytest
from PIL import Image

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.data.load.inspection import examine, note_lines
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.sample import keys
from internvl_jax.data.sample.conversations import CONVERSATION_LINES
from internvl_jax.data.sample.fitting import Limits
from internvl_jax.data.sample.sample import SampleMaker
from internvl_jax.data.source import files
from internvl_jax.data.source.meta import DatasetSpec
from internvl_jax.data.where import DataError
from internvl_jax.tasks.preference.lines import PairLines
from tests.support.data_toys import WHERE, arguments, turns, write_jsonl

TURNS = turns("hi", "yes")
PAIR = {"question": "hi", "chosen": "yes", "rejected": "no"}


def line(**entries):
  return {"conversations": TURNS, **entries}


def answer(**entries):
  return {"conversations": [TURNS[0], {**TURNS[1], **entries}]}


def question(**entries):
  return {"conversations": [{**TURNS[0], **entries}, TURNS[1]]}


HONOURED = {
  "images": (line(images=["a.png", "b.png"]), {"image": ["a.png", "b.png"]}),
  "images_text": (line(images="a.png"), {"image": ["a.png"]}),
  "images_dicts": (line(images=[{"path": "a.png", "bytes": None}]), {"image": ["a.png"]}),
  "images_none": (line(images=[], image="a.png"), {"image": "a.png"}),
  "image_none": (line(images=["a.png"], image=""), {"image": ["a.png"]}),
  "videos": (line(videos=["a.mp4"]), {"video": "a.mp4"}),
  "video_frames": (line(videos=[["1.jpg", "2.jpg"]]), {"video": ["1.jpg", "2.jpg"]}),
  "system": (line(system="Be brief."), {"conversations": [{"from": "system", "value": "Be brief."}, *TURNS]}),
  "system_prompt": (line(system_prompt="x"), {"conversations": [{"from": "system", "value": "x"}, *TURNS]}),
  "system_none": (line(system=None), {}),
  "system_twice_the_same": (
    {"system": "x", "conversations": [{"from": "system", "value": "x"}, *TURNS]},
    {"conversations": [{"from": "system", "value": "x"}, *TURNS]},
  ),
  **{
    f"{flag}_{value}": (answer(**{flag: value}), answer(loss=False))
    for flag in ("loss", "loss_mask", "weight", "loss_weight", "train")
    for value in (False, 0, 0.0)
  },
  "learned": (answer(loss=True, weight=1.0), {}),
  "unset": (answer(loss=None), {}),
  "unlearned_question": (question(loss=False), question(loss=False)),
  "same_role": (answer(role="assistant", content="yes"), {}),
  "unlearned_and_empty": (answer(loss=False, value=""), answer(loss=False, value="")),
}


@pytest.mark.parametrize("name", HONOURED)
def test_what_others_mean_plainly_is_honoured(name):
  record, changed = HONOURED[name]
  before = json.dumps(record)
  assert CONVERSATION_LINES.plain(record, WHERE) == {"conversations": TURNS, **changed}
  assert json.dumps(record) == before


REFUSED = {
  "image_path": (
    line(image_path="a.png"),
    "key 'image_path' 'a.png' is not read, and would change what is seen",
  ),
  "camel_case": (line(imagePath="a.png"), "key 'imagePath'"),
  "misspelt": (line(imgaes=["a"]), "did you mean 'images'?"),
  "capital": (line(Image="a.png"), "did you mean 'image'?"),
  "second_image": (line(image="a.png", image2="b.png"), "key 'image2'"),
  "image_of_answer": (line(image="a.png", answer_image="b.png"), "key 'answer_image'"),
  "url": (line(url="https://host/a.jpg?size=3"), "key 'url'"),
  "nested": (line(content={"parts": ["x.webp"]}), "key 'content'"),
  "by_value": (line(file="x/a.MP4"), "key 'file' 'x/a.MP4' is not read, and would change what is seen"),
  "audio": (line(audios=["a"]), "key 'audios'"),
  "frames": (line(frames=["1.jpg", "2.jpg"]), "key 'frames'"),
  "both": (line(image="a.png", images=["b.png"]), "both 'image' and 'images'; keep one"),
  "bytes": (line(images=[{"bytes": "x"}]), "image of 'images' is broken base64"),
  "bytes_and_path": (line(images=[{"bytes": "x", "path": "a.png"}]), "image of 'images' is broken base64"),
  "two_videos": (line(videos=["a.mp4", "b.mp4"]), "'videos' has 2 videos, and a line may have one"),
  "cut": (line(video="a.mp4", start=3, end=5), "write 'clip': [start, end] in seconds"),
  "clip": (line(clip=[0, 3]), "cuts a video, but the line has none"),
  "two_systems": (line(system="a", system_prompt="b"), "both 'system', 'system_prompt'"),
  "system_number": (line(system=3), "'system' must be a text"),
  "other_system": (
    {"system": "a", "conversations": [{"from": "system", "value": "b"}, *TURNS]},
    "a system message beside the turns, 'a', and another as turn 1, 'b'; keep one",
  ),
  "misspelt_system": (line(sytem="x"), "did you mean 'system'?"),
  "tools": (line(tools='[{"name": "f"}]'), "key 'tools'"),
  "history": (line(history=[["a", "b"]]), "key 'history'"),
  "messages": (line(messages=[{"role": "user"}]), "would change what is said"),
  "query": (line(query="x", response="y"), "key 'query'"),
  "rejected": (line(rejected_response="x"), "key 'rejected_response'"),
  "kto": (line(kto_tag=False), "key 'kto_tag'"),
  "label": (line(label=False), "key 'label' is false"),
  "objects": (
    {"objects": {"ref": ["cat"]}, "conversations": turns("<ref-object>?", "yes")},
    "<ref-object> in the texts stands for what 'objects' says",
  ),
  "mask": (line(mask=[0, 1]), "would change what is learned"),
  "line_loss": (line(loss=False), "key 'loss' 'False'"),
  "line_weight": (line(weight=0.5), "key 'weight' '0.5'"),
  "camel_mask": (line(lossMask=0), "did you mean 'loss_mask'?"),
  "fraction": (answer(weight=0.5), "turn 2: 'weight' must be true, false, 1 or 0, got '0.5'"),
  "flag_text": (answer(loss="false"), "turn 2: 'loss' must be true, false, 1 or 0, got 'false'"),
  "flag_nan": (answer(weight=float("nan")), "turn 2: 'weight' must be true"),
  "contradiction": (answer(loss=True, weight=0), "turn 2: 'loss', 'weight' contradict each other"),
  "learned_question": (question(loss=True), "turn 1: 'loss' asks to learn a turn from 'human'"),
  "masked_turn": (answer(mask=0), "turn 2: key 'mask'"),
  "misspelt_flag": (answer(weigth=0), "did you mean 'weight'?"),
  "image_of_turn": (question(image="a.png"), "turn 1: key 'image' 'a.png' is not read"),
  "other_content": (answer(content="no"), "turn 2: key 'content'"),
  "reasoning": (answer(reasoning_content="hm"), "turn 2: key 'reasoning_content'"),
  "empty_answer": (answer(value=" \n"), "turn 2 is an answer without text"),
  "openai": ({"messages": []}, "it has 'messages', and the dataset's first lines have no such form"),
  "swift": ({"query": "a", "response": "b"}, "it has 'query' and 'response', and the dataset"),
  "alpaca": ({"instruction": "a", "output": "b"}, "as Alpaca"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused(name):
  record, cause = REFUSED[name]
  with pytest.raises(DataError) as caught:
    CONVERSATION_LINES.plain(record, WHERE)
  assert str(caught.value).startswith("toy.jsonl:3 (dataset 'toy'): ") and cause in str(caught.value)


NOTES = {
  "id": "x.png",
  "source": "a/b.jpg",
  "dataset": "vqa",
  "task": ["x"],
  "category": {"a": 1},
  "width": 3,
  "length": 7,
  "objects": {"bbox": [[1, 2, 3, 4]]},
  "num_images": 2,
  "image_size": [3, 4],
  "image_id": "000123",
  "image_caption": "a cat",
  "metadata": {"file": "x.png"},
  "weight": 1.0,
  "train": True,
  "label": 3,
  "tools": "[]",
  "history": [],
  "audio": None,
  "start": 3,
  "score": 0.3,
  "clip": 0.31,
  "foo": "bar",
}


def test_notes_beside_the_data_pass():
  for key, value in NOTES.items():
    assert CONVERSATION_LINES.plain(line(**{key: value}), WHERE)["conversations"] is TURNS, key
  # What the line shows anyway may be named again, and where it came from.
  shown = line(image="coco/7.jpg", image_file="7.jpg", file_name="7.jpg", image_url="https://host/9.jpg")
  assert CONVERSATION_LINES.plain(shown, WHERE)["image"] == "coco/7.jpg"


@pytest.mark.parametrize(
  ("entries", "cause"),
  [
    ({"image_path": "a.png"}, "key 'image_path'"),
    ({"conversations": TURNS[:1], "question": None}, "'question' must be a text"),
    ({"history": [["a", "b"]]}, "texts are read from 'question', 'chosen', 'rejected' and 'system'"),
    ({"weight": 0}, "both answers of a pair are judged in full"),
    ({"margin": 0.5}, "key 'margin'"),
    ({"rejected_images": ["b.png"]}, "key 'rejected_images'"),
    ({"image": "a.png", "images": ["b.png"]}, "both 'image' and 'images'"),
    ({"question": "<video>\nhi"}, "1 <video> in the human turns but no video"),
  ],
)
def test_pairs_are_as_strict(tokenizer, entries, cause):
  maker = make_maker(tokenizer, lines=PairLines())
  with pytest.raises(DataError) as caught:
    maker.measure({**PAIR, **entries}, WHERE, 4)
  assert cause in str(caught.value)


def make_maker(tokenizer, root="", **options):
  spec = DatasetSpec(name="toy", root=str(root), annotation="toy.jsonl")
  data = arguments("meta.json")
  return SampleMaker(
    spec=spec, data=data, tokenizer=tokenizer, tokens_per_tile=4, limits=Limits(512), **options
  )


def test_images_and_systems_of_pairs_and_lines_are_seen(tmp_path, tokenizer):
  Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
  for record, lines in ((PAIR, PairLines()), (line(), CONVERSATION_LINES)):
    sample = make_maker(tokenizer, tmp_path, lines=lines).make(
      {**record, "images": ["a.png"], "system": "Be brief."}, WHERE
    )
    assert len(sample.tiles) == 1 and "Be brief." in tokenizer.decode(sample.input_ids)


def test_a_turn_that_is_not_learned(tokenizer):
  said = turns("a", "red", "c", "circle")
  maker = make_maker(tokenizer)
  whole = maker.make({"conversations": said}, WHERE)
  masked = maker.make({"conversations": [said[0], {**said[1], "loss_mask": 0}, *said[2:]]}, WHERE)
  np.testing.assert_array_equal(whole.input_ids, masked.input_ids)
  assert tokenizer.decode(whole.labels[whole.labels != IGNORE_INDEX]) == "redcircle"
  assert tokenizer.decode(masked.labels[masked.labels != IGNORE_INDEX]) == "circle"


@pytest.mark.parametrize("extra", [{}, {"image": "a.png"}, {"images": ["a.png"]}])
def test_a_place_for_a_video_without_one(tmp_path, tokenizer, extra):
  Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
  with pytest.raises(DataError, match="1 <video> in the human turns but no video"):
    make_maker(tokenizer, tmp_path).measure(
      {"conversations": turns("<video>\nwho?", "he"), **extra}, WHERE, 4
    )
  # In an answer it is plain text.
  assert make_maker(tokenizer).measure({"conversations": turns("tag?", "<video>")}, WHERE, 4).tokens


def test_the_doctor_tells_what_is_not_read(tmp_path, tokenizer):
  records = [line(id=i, **({"widht": 3} if i > 1 else {})) for i in range(4)]
  records.append({"conversations": [{**turn, "name": "x"} for turn in TURNS], "clip": "a\ud800"})
  write_jsonl(tmp_path / "toy.jsonl", records)
  meta = tmp_path / "meta.json"
  meta.write_text(json.dumps({"toy": {"root": "", "annotation": "toy.jsonl", "length": 9}}))
  mixture = Mixture(arguments(meta), tokenizer, tokens_per_tile=4, seed=0, cache=tmp_path / "cache")
  mixture.index_sizes(tmp_path / "cache", workers=0, quiet=True)
  (report,) = examine(mixture)
  assert report.lost == 1 and "'clip'" in report.examples[0]
  (note,) = note_lines(mixture, workers=0)
  assert note == (
    f"toy: not read: 'id' in 4 lines, 'widht' in 2 lines (did you mean 'width'? first {tmp_path}/toy.jsonl:3 (dataset "
    "'toy')); the meta file says 9 lines, there are 5"
  )
  mixture.close()


def test_strange_names_are_looked_at_once():
  keys.kind_of.cache_clear()
  for _ in range(3):
    assert keys.kind_of("x" * 100_000, "line") is None
  assert keys.kind_of.cache_info().misses == 1
  assert keys.kind_of("图片", "line") is None and keys.kind_of("", "line") is None


def test_caches_know_a_signed_url_by_its_file():
  signed = [f"https://host/a.jsonl?X-Amz-Signature={n}&X-Amz-Date=1" for n in (1, 2)]
  assert files.identity(signed[0]) == files.identity(signed[1]) and "host/a.jsonl" in files.identity(
    signed[0]
  )
