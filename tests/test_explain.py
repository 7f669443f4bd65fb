"""
Drawing: what the vision tower saw, for every way of packing pixels, and pictures of several views; tiles and video
files from end to end.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clips import STEP, write_clip
from PIL import Image
from transformers import CLIPImageProcessor, LlavaNextImageProcessor, Qwen2VLImageProcessor

from fsr_hf import VisualSelection
from fsr_hf.explain import Explanation, _pixels_seen, explain, load_fsr_model, load_visual
from fsr_hf.testing.small_families import export_small_model


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_clip_pixels_are_the_centre_of_the_image():
    image = noise(56, 84)
    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    inputs = processor(Image.fromarray(image), return_tensors="pt")
    seen = _pixels_seen(inputs, SimpleNamespace(image_processor=processor))
    assert seen.shape == (1, 56, 56, 3)
    assert (seen[0] == image[:, 14:70]).all()


def test_llava_next_pixels_are_views():
    image = noise(56, 56)
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=[[56, 56]]
    )
    inputs = processor(Image.fromarray(image), return_tensors="pt")
    seen = _pixels_seen(inputs, SimpleNamespace(image_processor=processor))
    assert seen.shape == (5, 28, 28, 3)
    tiles = [image[row : row + 28, column : column + 28] for row in (0, 28) for column in (0, 28)]
    assert (seen[1:] == np.stack(tiles)).all()


def test_qwen_patches_become_the_image_again():
    image = noise(84, 112)
    processor = Qwen2VLImageProcessor(
        patch_size=14, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 28 * 28, "longest_edge": 280 * 280}
    )
    inputs = processor([Image.fromarray(image), Image.fromarray(image[:56])], return_tensors="pt")
    seen = _pixels_seen(inputs, SimpleNamespace(image_processor=processor))
    assert seen.shape == (1, 84, 112, 3)
    assert (seen[0] == image).all()


def selection(grid, indices, num_focus, merged=None):
    merged_into = torch.full((len(grid),), -1)
    for token, anchor in (merged or {}).items():
        merged_into[token] = anchor
    return VisualSelection(
        indices=torch.tensor(indices),
        is_focus=torch.arange(len(indices)) < num_focus,
        features=torch.zeros(len(indices), 4),
        priority=torch.zeros(len(grid)),
        merged_into=merged_into,
        grid=torch.tensor(grid),
    )


def test_frames_stand_side_by_side_and_newlines_have_no_place():
    grid = [[frame, row, column] for frame in range(4) for row in range(3) for column in range(5)] + [[-1, -1, -1]]
    views = [Image.new("RGB", (50, 30), (60 * frame, 100, 100)) for frame in range(4)]
    explanation = Explanation("Why?", "Because.", views, selection(grid, [0, 21, 60], 1, {40: 21}), "org/model")
    assert explanation.counts == {"tokens": 60, "kept": 2, "focus": 1, "scan": 1, "merged": 1, "dropped": 57}
    picture = explanation.draw()
    assert picture.image.width == 1000 and picture.boxes[60] is None
    boxes = np.array(picture.boxes[:60])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 1000).all() and (boxes[:, 3] <= picture.image.height).all()
    assert len({tuple(box) for box in boxes.tolist()}) == 60
    for frame in range(4):
        left, top, right, bottom = boxes[15 * frame + 2]  # a dropped token
        inside = np.asarray(picture.image.crop((left + 4, top + 4, right - 4, bottom - 4)))
        assert abs(np.median(inside[..., 0]) - (14 + 0.36 * (60 * frame - 14))) < 2


def test_newlines_of_frames_are_no_tokens():
    grid = [[frame, row, column] for frame in range(2) for row in range(2) for column in (0, 1, 2, -1)]
    views = [Image.new("RGB", (30, 20), "white") for _ in range(2)]
    explanation = Explanation("Q", "A", views, selection(grid, [2, 3], 1))
    assert explanation.counts == {"tokens": 12, "kept": 1, "focus": 1, "scan": 0, "merged": 0, "dropped": 11}
    picture = explanation.draw()
    assert [box is None for box in picture.boxes] == [False, False, False, True] * 4
    left, top, right, bottom = picture.boxes[2]  # the last of its row, and kept
    assert picture.image.getpixel(((left + right) // 2, (top + bottom) // 2)) > (200, 200, 180)


def test_a_view_without_tokens_takes_no_room():
    grid = [[view, row, column] for view in (0, 2) for row in range(2) for column in range(2)]
    views = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    picture = Explanation("Q", "", views, selection(grid, [0, 7], 2)).draw()
    boxes = np.array(picture.boxes)
    assert boxes[4:, 0].min() - boxes[:4, 2].max() < 20 or boxes[4:, 1].min() - boxes[:4, 3].max() < 20
    pixels = np.asarray(picture.image).reshape(-1, 3)
    assert not ((pixels[:, 1] > 40) & (pixels[:, 0] < 20) & (pixels[:, 2] < 30)).any()  # nothing of the green view


def test_no_grid_is_refused():
    unplaced = selection([[0, 0, 0]], [0], 1)
    unplaced.grid = None
    with pytest.raises(ValueError, match="grid"):
        Explanation("Q", "A", [Image.new("RGB", (4, 4))], unplaced).draw()


# ---------------------------------------------------------------------- from a file


def test_the_tiles_of_a_picture_are_joined(tmp_path):
    """448 x 672 pixels in 2 x 2 tiles of 336: nothing is resized, and a third of each tile is padding."""
    folder = export_small_model("fsr_llava_next", tmp_path)
    Image.fromarray(noise(448, 672)).save(tmp_path / "noise.png")
    visual = load_visual(tmp_path / "noise.png")
    explanation = explain(*load_fsr_model(str(folder), "cpu"), visual, "What is it?", max_new_tokens=1)
    base, joined = explanation.views
    assert base.size == (336, 336) and (np.asarray(joined) == noise(448, 672)).all()
    assert explanation.counts["tokens"] == 24 * 24 + 32 * 48
    grid = explanation.selection.grid
    places = grid[grid[:, 0] == 1, 1:].tolist()
    assert places == [[row, column] for row in range(32) for column in range(48)]
    picture = explanation.draw()
    token = 24 * 24 + 49 * 20 + 30  # of row 20, which ends with a newline as all do
    left, _, right, _ = picture.boxes[token]
    assert grid[token].tolist() == [1, 20, 30] and picture.boxes[24 * 24 + 48] is None
    below = [box[1] for box in picture.boxes[24 * 24 :] if box]
    assert sorted(set(np.diff(sorted(set(below))).tolist())) == [right - left]


@pytest.mark.parametrize(
    "model_type, greys, num_tokens",
    [
        ("fsr_qwen2_5_vl", [0, 6], 2 * 10 * 14),
        ("fsr_qwen3_vl", [0, 6], 2 * 5 * 7),
        ("fsr_llava_video", [0, 3, 6, 9], 4 * 14 * 14),
    ],
)
def test_a_video_file(tmp_path, model_type, greys, num_tokens):
    """Four frames are taken; in Qwen-VL, two share a token, and the first of them is drawn."""
    folder = export_small_model(model_type, tmp_path)
    clip = load_visual(write_clip(tmp_path / "grey.mp4"))
    model, processor = load_fsr_model(str(folder), "cpu")
    explanation = explain(model, processor, clip, "What is it?", max_new_tokens=2, num_frames=4, retention_ratio=0.25)
    assert [round(np.asarray(view).mean() / STEP) for view in explanation.views] == greys
    assert explanation.counts["tokens"] == num_tokens and explanation.counts["kept"] == round(num_tokens / 4)
    assert len(explanation.answer.split()) == 2
    picture = explanation.draw()
    assert len({box for box in picture.boxes if box}) == num_tokens
    assert len(explain(model, processor, clip, "?", max_new_tokens=1, num_frames=99).views) == (10, 5)[len(greys) == 2]


def test_a_video_for_a_model_of_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"grey\.mp4 is a video, and SimpleNamespace takes images alone"):
        explain(SimpleNamespace(), SimpleNamespace(), load_visual(tmp_path / "grey.mp4"), "What is it?")
