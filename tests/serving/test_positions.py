"""Positions under a server that counts kept tokens, against positions of the whole prompt, written out by hand."""

import pytest
import torch

from fsr_hf.serving.positions import PlacedItem, pack_positions, prompt_positions, write_kept_positions


# Whole prompt: 2 words, an image of 6 tokens, another one of 5 right behind it, 3 words. Of the images are kept
# 1, 4, 5 and 0, 2: positions 3, 6, 7 and 8, 10. The words behind them begin at 13.
ITEMS = [PlacedItem(2, 3, 6), PlacedItem(5, 2, 5)]
KEPT = [torch.tensor([[1, 4, 5]]), torch.tensor([[0, 2]])]
WHOLE = [0, 1, 3, 6, 7, 8, 10, 13, 14, 15]
IS_VISUAL = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 0, 0]).bool()


@pytest.fixture
def embeds():
    features = torch.arange(20.0).reshape(5, 4).split([3, 2])
    return [pack_positions(part, kept) for part, kept in zip(features, KEPT)]


def test_one_axis(embeds):
    positions, delta = prompt_positions(10, ITEMS, axes=1)
    assert delta == 16 - 10
    features, positions, delta = write_kept_positions(positions, IS_VISUAL, embeds, 0, axes=1)
    assert positions[0].tolist() == WHOLE and delta == 6
    assert torch.equal(torch.cat(features), torch.arange(20.0).reshape(5, 4))


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 6])
def test_a_prompt_in_two_steps(embeds, cut):
    """Whichever visual token a step ends before, and when a step is repeated."""
    positions, _ = prompt_positions(10, ITEMS, axes=1)
    num_first = max(0, cut - 2)
    joined = torch.cat(embeds)
    sizes = [min(3, num_first), max(0, num_first - 3)]
    first = [part[:size] for part, size in zip(embeds, sizes) if size]
    second = [part[size:] for part, size in zip(embeds, sizes) if size < len(part)]
    for _ in range(2):
        _, positions, _ = write_kept_positions(positions, IS_VISUAL, first, 0, axes=1)
        features, positions, delta = write_kept_positions(positions, IS_VISUAL, second, cut, axes=1)
        assert positions[0].tolist() == WHOLE and delta == 6
    assert torch.equal(torch.cat(features), joined[num_first:, :4])


def test_text_after_a_prefix_from_the_cache():
    """The tower does not run for images whose keys and values are in the cache: words behind them stand right."""
    positions, delta = prompt_positions(10, ITEMS, axes=1)
    _, positions, delta = write_kept_positions(positions, IS_VISUAL, [], 7, axes=1)
    assert positions[0, 7:].tolist() == WHOLE[7:] and delta == 6


def test_a_prompt_that_ends_in_an_image(embeds):
    positions, delta = prompt_positions(5, ITEMS[:1], axes=1)
    assert delta == 8 - 5
    for _ in range(2):
        _, positions, delta = write_kept_positions(positions, IS_VISUAL[:5], embeds[:1], 0, axes=1)
        assert positions[0].tolist() == WHOLE[:5] and delta == 3


def test_three_axes():
    """2 words, an image of 2 x 3 of which the corners 0 and 5 are kept, 2 words: time, height, width."""
    kept = torch.tensor([[0, 0], [0, 1], [0, 2]])
    positions, delta = prompt_positions(6, [PlacedItem(2, 2, 3)], axes=3)
    assert delta == 7 - 6
    is_visual = torch.tensor([0, 0, 1, 1, 0, 0]).bool()
    embeds = [pack_positions(torch.zeros(2, 4), kept)]
    for _ in range(2):
        _, positions, delta = write_kept_positions(positions, is_visual, embeds, 0, axes=3)
        assert positions.tolist() == [[0, 1, 2, 2, 5, 6], [0, 1, 2, 3, 5, 6], [0, 1, 2, 4, 5, 6]]
        assert delta == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_pass_through_half_precision(dtype):
    kept = torch.tensor([[0, 1, 255, 256, 257, 575, 2047, 5183, 65535]])
    packed = pack_positions(torch.zeros(9, 2, dtype=dtype), kept)
    assert packed.dtype == dtype
    positions, _ = prompt_positions(9, [PlacedItem(0, 9, 65536)], axes=1)
    _, positions, _ = write_kept_positions(positions, torch.ones(9).bool(), [packed], 0, axes=1)
    assert positions[0].tolist() == kept[0].tolist()
