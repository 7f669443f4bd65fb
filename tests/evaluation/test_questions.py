"""Reading questions: what is taken, and that bad lines are named."""

import json

import datasets
import pytest
from PIL import Image
from transformers.image_utils import load_image

from fsr_hf.evaluation.questions import load_questions
from fsr_hf.explain import load_visual


@pytest.fixture
def folder(tmp_path):
    for number, color in enumerate(("red", "blue")):
        Image.new("RGB", (30, 20), color).save(tmp_path / f"{number}.png")
    (tmp_path / "clip.mp4").write_bytes(b"not looked at here")
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:-30])
    return tmp_path


def write(folder, *lines):
    file = folder / "questions.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return file


GOOD = {"image": "0.png", "question": "Which colour?", "answer": "red"}


def test_lines(folder):
    file = write(
        folder,
        {**GOOD, "id": 7},
        "",
        {"images": ["0.png", "1.png"], "question": "Same?", "answers": ["no", 0]},
        {"video": "clip.mp4", "question": "What?", "answer": 3},
        {"image": "1.png", "question": "?", "answers": [{"answer": "blue", "answer_id": 1}]},
    )
    first, second, third, fourth = load_questions(file)
    assert first.place == f"{file}, line 1" and second.place == f"{file}, line 3"
    assert first.text == "Which colour?" and first.answers == ("red",) and first.video is None
    assert first.images[0]().getpixel((0, 0)) == (255, 0, 0)
    assert [image().getpixel((0, 0)) for image in second.images] == [(255, 0, 0), (0, 0, 255)]
    assert second.answers == ("no", "0") and third.answers == ("3",) and fourth.answers == ("blue",)
    assert third.video == folder / "clip.mp4" and third.images == ()
    assert len({question.visual for question in (first, second, third, fourth)}) == 4


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{no json", "is not JSON"),
        ("[1]", "is no JSON object"),
        ({"question": "?", "answer": "x"}, "needs one of `image`, `images` and `video`"),
        ({**GOOD, "video": "clip.mp4"}, "has image and video"),
        ({**GOOD, "image": "none.png"}, "there is no image"),
        ({**GOOD, "image": "words.png"}, "no image that Pillow can read"),
        ({**GOOD, "image": "broken.png"}, "no image that Pillow can read"),
        ({**GOOD, "image": 3}, "has to be the name of a file"),
        ({"images": [], "question": "?", "answer": "x"}, "`images` is empty"),
        ({"video": "none.mp4", "question": "?", "answer": "x"}, "there is no file"),
        ({**GOOD, "question": " "}, "`question` is ' '"),
        ({"image": "0.png", "question": "?"}, "has no answer"),
        ({**GOOD, "answer": True}, "an answer is True"),
        ({**GOOD, "answer": ""}, "an answer is ''"),
        ({"image": "0.png", "question": "?", "answers": []}, "has no answer"),
    ],
)
def test_bad_lines_are_named(folder, line, expected):
    file = write(folder, GOOD, line)
    with pytest.raises(ValueError) as caught:
        load_questions(file)
    assert str(caught.value).startswith(f"{file}, line 2: ") and expected in str(caught.value)


def test_photos_stand_upright(folder):
    """As `transformers` shows them to a model: phones write sideways pixels, and how to turn them."""
    image = Image.new("RGB", (30, 20), "red")
    image.paste("blue", (0, 0, 15, 20))
    turned = image.getexif()
    turned[0x0112] = 6  # to be turned by 90 degrees, clockwise
    image.save(folder / "photo.png", exif=turned)
    (question,) = load_questions(write(folder, {**GOOD, "image": "photo.png"}))
    for found in (question.images[0](), load_visual(folder / "photo.png")):
        assert found.size == (20, 30) and found.getpixel((0, 0)) == (0, 0, 255) != found.getpixel((0, 29))
        assert found.tobytes() == load_image(str(folder / "photo.png")).tobytes()


def test_encodings(folder):
    file = folder / "questions.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())  # as some editors begin a file of UTF-8
    assert len(load_questions(file)) == 1
    file.write_bytes(json.dumps(GOOD).encode() + b"\n" + json.dumps(GOOD).encode().replace(b"red", b"caf\xe9"))
    with pytest.raises(ValueError, match="line 2: is not UTF-8"):
        load_questions(file)


def test_many_bad_lines(folder):
    file = write(folder, *[{**GOOD, "question": None}] * 8)
    with pytest.raises(ValueError, match=r"line 1: .* line 5: .* And 3 more bad lines"):
        load_questions(file)


def test_files_that_are_not_there_or_empty(folder):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_questions(folder / "none.jsonl")
    with pytest.raises(ValueError, match="has no questions"):
        load_questions(write(folder, ""))
    with pytest.raises(ValueError, match="is no dataset"):
        load_questions(write(folder, GOOD), split="test")


def test_datasets(folder):
    rows = {
        "image": [str(folder / "0.png"), str(folder / "1.png")],
        "question": ["Which colour?", "And this?"],
        "answers": [["red"], ["blue", "azure"]],
    }
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(folder / "parts")
    data.to_parquet(folder / "rows.parquet")  # with the bytes of the images
    for name in ("saved", "rows.parquet"):
        first, second = load_questions(folder / name)
        assert first.place == f"{folder / name}, row 1" and second.answers == ("blue", "azure")
        assert first.images[0]().getpixel((0, 0)) == (255, 0, 0)
        assert second.images[0]().getpixel((0, 0)) == (0, 0, 255) and first.visual != second.visual
    (only,) = load_questions(folder / "parts", split="test")
    assert only.text == "And this?"
    with pytest.raises(ValueError, match=r"parts train, test: choose one by --split"):
        load_questions(folder / "parts")
    with pytest.raises(ValueError, match="--split dev"):
        load_questions(folder / "parts", split="dev")
    bad = datasets.Dataset.from_dict({**rows, "answers": [["red"], []]}).cast_column("image", datasets.Image())
    bad.save_to_disk(folder / "bad")
    with pytest.raises(ValueError, match="row 2: has no answer"):
        load_questions(folder / "bad")
