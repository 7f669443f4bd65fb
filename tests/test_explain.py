"""Drawing: what the vision tower saw, for every way of packing pixels, and pictures of several views."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaNextImageProcessor, Qwen2VLImageProcessor

from fsr_hf import VisualSelection
from fsr_hf.explain import Explanation, _pixels_seen


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
