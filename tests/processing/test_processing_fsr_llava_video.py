"""The processor of LLaVA-Video: counts that the model agrees with, videos of every kind, times of frames."""

import json
import math

import numpy as np
import pytest
import torch
from families import FAMILIES, LLAVA_VIDEO_PINPOINTS, SIGLIP_PIXELS, initialize
from PIL import Image
from processing.tiny_tokenizers import qwen_tokenizer
from transformers import (
    AutoProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)
from transformers.video_utils import VideoMetadata

from fsr_hf import FSRLlavaVideoForConditionalGeneration, FSRLlavaVideoProcessor
from fsr_hf.hub.original import CHAT_TEMPLATE
from fsr_hf.processing.processing_fsr_llava_video import sample_frames


PIXELS = {
    "size": {"height": SIGLIP_PIXELS, "width": SIGLIP_PIXELS},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
SPECIAL = {"im_start_token": "<|im_start|>", "image_token": "<image>", "video_token": "<video>"}
SENTENCE = (
    "The video lasts for {} seconds, and {} frames are uniformly sampled from it. These frames are located at {}."
    "Please answer the following questions related to this video."
)


def build(**kwargs):
    return FSRLlavaVideoProcessor(
        LlavaOnevisionImageProcessor(**PIXELS, image_grid_pinpoints=LLAVA_VIDEO_PINPOINTS),
        qwen_tokenizer(extra_special_tokens=SPECIAL),
        LlavaOnevisionVideoProcessor(**PIXELS, num_frames=4),
        **{"num_image_tokens": 25, "chat_template": CHAT_TEMPLATE, "vision_aspect_ratio": "anyres_max_2", **kwargs},
    )


@pytest.fixture(scope="module")
def processor():
    return build()


def clip(num_frames, seed=0, size=(30, 50)):
    """Frames as `(frames, height, width, channels)`; the first pixel of each says which it is."""
    frames = np.random.default_rng(seed).integers(0, 255, (num_frames, *size, 3), dtype=np.uint8)
    frames[:, :, :, 0] = np.arange(num_frames)[:, None, None]
    return frames


def pictures(num_frames, seed=0):
    return [Image.fromarray(frame) for frame in clip(num_frames, seed)]


def taken(inputs, video=0):
    """Which frames of `clip` there are."""
    frames = inputs["pixel_values_videos"][video, : inputs["video_num_frames"][video]]
    return ((frames[:, 0].mean((1, 2)) + 1) * 255 / 2).round().int().tolist()


# ---------------------------------------------------------------------- placeholders


@pytest.mark.parametrize("mode", ["bilinear", "average"])
def test_counts_are_those_of_the_model(mode):
    processor = build(spatial_pool_mode=mode, vision_aspect_ratio="anyres_max_2")
    tokenizer = processor.tokenizer
    text_config = {**FAMILIES["llava_video"].config["text_config"], "vocab_size": len(tokenizer)}
    fields = {"image_token_index": tokenizer.image_token_id, "video_token_index": tokenizer.video_token_id}
    config = FAMILIES["llava_video"].build_config(text_config=text_config, spatial_pool_mode=mode, **fields)
    model = initialize(FSRLlavaVideoForConditionalGeneration(config))
    sizes = [(40, 65), (90, 100), (20, 100), (7, 300)]
    images = [Image.fromarray(clip(1, size=size)[0]) for size in sizes]
    text = ["<video>a<image>b<video>", "<image>", "no", "<image><image>", "<video>"]
    inputs = processor(
        images=[[images[0]], [images[1]], [], images[2:], []],
        text=text,
        videos=[[clip(3), clip(1)], [], [], [], [clip(5)]],
        padding=True,
        return_tensors="pt",
    )
    assert inputs["video_num_frames"].tolist() == [3, 1, 5]
    assert inputs["batch_num_images"].tolist() == [1, 1, 2]
    out = model.generate(
        **inputs, max_new_tokens=2, num_visual_tokens=3, return_dict_in_generate=True, output_visual_selection=True
    )
    assert [(s.modality, s.row) for s in out.visual_selections] == [
        *[("video", 0), ("image", 0), ("video", 0)],
        *[("image", 1), ("image", 3), ("image", 3), ("video", 4)],
    ]
    numbers = processor._get_num_multimodal_tokens(
        image_sizes=sizes[:2], video_sizes=[(3, 30, 50), (1, 30, 50), (5, 30, 50)]
    )
    lengths = [len(selection.grid) for selection in out.visual_selections]
    assert numbers["num_image_tokens"] == [lengths[1], lengths[3]]
    assert numbers["num_video_tokens"] == [lengths[0], lengths[2], lengths[6]]
    alone = model.generate(
        **processor(text=text[4], videos=clip(5), return_tensors="pt"), max_new_tokens=2, num_visual_tokens=3
    )
    assert torch.equal(out.sequences[4, -2:], alone[0, -2:])


@pytest.mark.parametrize("mode, tokens", [("bilinear", 14 * 15), ("average", 13 * 14)])
def test_tokens_of_a_full_size_frame(mode, tokens):
    processor = build(num_image_tokens=729, spatial_pool_mode=mode)
    text = processor.replace_video_token({"video_num_frames": [32]}, 0)
    assert text == "<video>" * (32 * tokens)


def test_videos_of_different_lengths_are_padded(processor):
    inputs = processor(text="<video><video>", videos=[clip(2), clip(4, 1)], return_tensors="pt")
    assert inputs["pixel_values_videos"].shape == (2, 4, 3, SIGLIP_PIXELS, SIGLIP_PIXELS)
    assert inputs["video_num_frames"].tolist() == [2, 4]
    assert (inputs["pixel_values_videos"][0, 2:] == 0).all()
    assert inputs["pixel_values_videos"].dtype == torch.float32
    assert {"pixel_values_videos", "video_num_frames"} < {*processor.model_input_names}


def test_frames_are_resized_whole_and_scaled_to_one(processor):
    """The corners of a wide frame are still there, and white and black are 1 and -1."""
    frame = np.zeros((1, 20, 100, 3), dtype=np.uint8)
    frame[:, :, :50] = 255
    video = processor(text="<video>", videos=frame, return_tensors="pt")["pixel_values_videos"][0, 0]
    torch.testing.assert_close(video[:, :, 0], torch.ones(3, SIGLIP_PIXELS))
    torch.testing.assert_close(video[:, :, -1], -torch.ones(3, SIGLIP_PIXELS))
    assert 0 < (video > 0.9).float().mean() < 0.6


# ---------------------------------------------------------------------- videos


def test_frames_arrays_and_files_of_frames_are_one(processor, tmp_path):
    names = [str(tmp_path / f"{number}.png") for number in range(3)]
    for name, frame in zip(names, pictures(3)):
        frame.save(name)
    array = clip(3)
    videos = [
        array,
        [array],
        list(array),
        pictures(3),
        [pictures(3)],
        torch.from_numpy(array).permute(0, 3, 1, 2),
        array[None],
        [[names]],
    ]
    expected = processor(text="<video>", videos=videos[0], return_tensors="pt")
    assert taken(expected) == [0, 1, 2]
    for video in videos[1:]:
        inputs = processor(text="<video>", videos=video, return_tensors="pt")
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)


@pytest.fixture
def file(monkeypatch):
    """A file of 10 frames, 4 a second, as transformers would decode it."""

    def fetch_videos(self, name, sample_indices_fn=None):
        assert name == "ten.mp4"
        metadata = VideoMetadata(total_num_frames=10, fps=4.0, duration=2.6)
        metadata.frames_indices = sample_indices_fn(metadata=metadata)
        return clip(10)[metadata.frames_indices], metadata

    monkeypatch.setattr(LlavaOnevisionVideoProcessor, "fetch_videos", fetch_videos)
    return "ten.mp4"


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0, 3, 6, 9]),
        ({"num_frames": 3}, [0, 4, 9]),
        ({"num_frames": 1}, [0]),
        ({"num_frames": 64}, [*range(10)]),
        ({"fps": 2}, [0, 2, 4, 6, 8]),
        ({"fps": 2, "num_frames": 3}, [0, 4, 9]),
        ({"fps": 2, "num_frames": 8}, [0, 2, 4, 6, 8]),
        ({"do_sample_frames": False}, [*range(10)]),
        ({"videos_kwargs": {"num_frames": 2}}, [0, 9]),
    ],
    ids=str,
)
def test_frames_of_a_file(processor, file, options, expected):
    for videos in (file, [file], [[file]]):
        inputs = processor(text="<video>", videos=videos, return_tensors="pt", **options)
        assert taken(inputs) == expected


def test_frames_of_an_array(processor):
    assert taken(processor(text="<video>", videos=clip(10), return_tensors="pt")) == [*range(10)]
    assert taken(processor(text="<video>", videos=clip(10), num_frames=3, return_tensors="pt")) == [0, 4, 9]
    known = {"fps": 4.0, "total_num_frames": 10}
    inputs = processor(text="<video>", videos=clip(10), fps=2, video_metadata=known, return_tensors="pt")
    assert taken(inputs) == [0, 2, 4, 6, 8]
    # Every second frame of a video: two of them make a second.
    known |= {"total_num_frames": 20, "frames_indices": [*range(0, 20, 2)]}
    inputs = processor(text="<video>", videos=clip(10), fps=1, video_metadata=[known], return_tensors="pt")
    assert taken(inputs) == [0, 2, 4, 6, 8]


def test_sampling_is_that_of_llava_video():
    for total in (1, 2, 31, 32, 33, 100, 901):
        for number in (1, 2, 32):
            indices = sample_frames(VideoMetadata(total_num_frames=total), number)
            assert indices == [math.floor(i) for i in np.linspace(0, total - 1, min(number, total)).round(6)]


# ---------------------------------------------------------------------- times


def test_time_instruction(processor, file):
    text = "<video>\nWhat is it?"
    inputs = processor(text=text, videos=file, add_time_instruction=True, return_tensors="pt")
    sentence = SENTENCE.format("2.50", 4, "0.00s,0.75s,1.50s,2.25s")
    assert processor.decode(inputs["input_ids"][0]) == "<video>" * (4 * 12) + f"\n{sentence}\nWhat is it?"
    plain = processor(text=text, videos=file, return_tensors="pt")
    assert processor.decode(plain["input_ids"][0]) == "<video>" * (4 * 12) + "\nWhat is it?"
    assert torch.equal(plain["pixel_values_videos"], inputs["pixel_values_videos"])


def test_time_instructions_of_a_batch(processor, file):
    """Each after its own video, whatever else is in a row."""
    known = [{"fps": 2.0, "total_num_frames": 3}, None, {"fps": 1.0, "total_num_frames": 9, "frames_indices": [0, 8]}]
    inputs = processor(
        images=[[pictures(1)[0]], []],
        text=["<video>\nA<image>", "B<video><video>\n"],
        videos=[[clip(3)], [file, clip(2)]],
        video_metadata=known,
        add_time_instruction=True,
        num_frames=2,
    )
    texts = [processor.decode(ids, skip_special_tokens=True) for ids in inputs["input_ids"]]
    first = SENTENCE.format("1.50", 2, "0.00s,1.00s")
    second, third = SENTENCE.format("2.50", 2, "0.00s,2.25s"), SENTENCE.format("9.00", 2, "0.00s,8.00s")
    assert texts == [f"\n{first}\nA", f"B\n{second}\n{third}\n"]


def test_time_instruction_as_a_setting(file, tmp_path):
    build(add_time_instruction=True).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert "lasts for 2.50 seconds" in processor.decode(processor(text="<video>", videos=file)["input_ids"][0])
    inputs = processor(text="<video>", videos=file, add_time_instruction=False)
    assert "lasts" not in processor.decode(inputs["input_ids"][0])


def test_conversation(processor, file):
    content = [{"type": "video", "path": file}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    for options in (
        {"processor_kwargs": {"num_frames": 3, "add_time_instruction": True}},
        {"num_frames": 3, "add_time_instruction": True},
    ):
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
        )
        assert taken(inputs) == [0, 4, 9]
        assert processor.decode(inputs["input_ids"][0]) == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            + "<video>" * 36
            + "\n"
            + SENTENCE.format("2.50", 3, "0.00s,1.00s,2.25s")
            + "\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
        )


def test_template_of_a_longer_conversation(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        {"role": "user", "content": "Two?"},
    ]
    assert processor.apply_chat_template(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nOne?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
    )


# ---------------------------------------------------------------------- refusals and files


@pytest.mark.parametrize(
    "options, message",
    [
        ({"videos": [[]]}, "`videos` is .*holds no frames"),
        ({"videos": clip(0)}, r"`videos` has no frames: its shape is \(0, 30, 50, 3\)"),
        ({"videos": [clip(2), clip(0)], "text": "<video><video>"}, r"`videos\[1\]` has no frames"),
        ({"videos": [pictures(1)[0], pictures(1)[0].resize((9, 9))]}, "`videos` has frames of different sizes"),
        ({"videos": [[*clip(1), clip(1)[0, :7]]]}, r"`videos\[0\]` has frames of different sizes"),
        ({"videos": clip(2), "text": "no"}, "`text` has 0 <video>, but `videos` holds 1"),
        ({"videos": clip(2), "text": "<video><video>"}, "`text` has 2 <video>, but `videos` holds 1"),
        ({"videos": clip(2), "add_time_instruction": True}, "`add_time_instruction=True`.*`video_metadata`"),
        ({"videos": clip(2), "fps": 1}, "`fps=1` needs the frame rate"),
        ({"videos": clip(2), "num_frames": 0}, "`num_frames=0` is not allowed"),
        (
            {"videos": clip(3), "video_metadata": {"fps": 1.0, "total_num_frames": 9, "frames_indices": [0, 8]}},
            "`video_metadata` has 2 `frames_indices` for a video of 3 frames",
        ),
        (
            {"videos": clip(3), "video_metadata": {"total_num_frames": 9, "frames_indices": [0]}, "num_frames": 2},
            "`video_metadata` has 1 `frames_indices` for a video of 3 frames",
        ),
        ({"videos": clip(2), "video_metadata": [{}, {}]}, "`video_metadata` tells of 2 videos.*holds 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_videos_that_cannot_be(processor, options, message):
    with pytest.raises(ValueError, match=message):
        processor(**{"text": "<video>", **options})


def test_empty_lists_are_none(processor):
    for options in ({"text": "a b"}, {"text": "<image>", "images": pictures(1)}):
        expected = processor(**options, return_tensors="pt")
        inputs = processor(**{"images": [], **options}, videos=[], return_tensors="pt")
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], value) for name, value in expected.items())


def test_frames_in_files_of_different_sizes(processor, tmp_path):
    names = [str(tmp_path / f"{size}.png") for size in (8, 9)]
    for name, size in zip(names, (8, 9)):
        Image.new("RGB", (size, 8)).save(name)
    with pytest.raises(ValueError, match="frames of different sizes"):
        processor(text="<video>", videos=[[names]])


@pytest.mark.parametrize("field, value", [("spatial_pool_mode", "max"), ("num_image_tokens", 26)])
def test_settings_that_cannot_be(field, value):
    with pytest.raises(ValueError, match=f"`{field}="):
        build(**{field: value})


def test_images_and_text_alone_are_the_stock_processor(processor):
    stock = LlavaOnevisionProcessor(
        processor.image_processor,
        processor.tokenizer,
        processor.video_processor,
        num_image_tokens=25,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )
    for options in ({"text": "abc"}, {"text": "<image>a", "images": pictures(1)[0]}):
        inputs, expected = (each(**options, return_tensors="pt") for each in (processor, stock))
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_round_trip(tmp_path):
    processor = build(spatial_pool_mode="average", add_time_instruction=True)
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["auto_map"] == {"AutoProcessor": "processing_fsr_llava_video.FSRLlavaVideoProcessor"}
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is FSRLlavaVideoProcessor
    for name in ("spatial_pool_mode", "add_time_instruction", "num_image_tokens", "vision_aspect_ratio"):
        assert getattr(loaded, name) == getattr(processor, name)
    assert loaded.chat_template == CHAT_TEMPLATE
    assert (loaded.image_token, loaded.video_token) == ("<image>", "<video>")
    options = {"text": "<video>", "videos": clip(3), "add_time_instruction": False, "return_tensors": "pt"}
    inputs, expected = loaded(**options), processor(**options)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "processor_config.json").read_text()) == settings
