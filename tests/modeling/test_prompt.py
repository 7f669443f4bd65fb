"""Prompts without their dropped placeholders, against lists put together token by token."""

import random

import pytest
import torch

from fsr_hf.modeling.prompt import VisualItem, find_visual_items, lay_out, restore_logits


IMAGE, PAD = 99, 0


def random_prompt(rng, padding_side):
    """
    Rows as lists of `(id, item or None, place in its run)`, and what each item keeps.
    """
    rows, kept, number = [], [], 0
    for n in range(rng.randint(1, 4)):
        row = [(rng.randint(1, 50), None, 0) for _ in range(rng.randint(1, 5))]
        for _ in range(rng.randint(n == 0, 3)):
            length = rng.randint(1, 6)
            row += [(IMAGE, number, place) for place in range(length)]
            row += [(rng.randint(1, 50), None, 0) for _ in range(rng.randint(0, 3))]  # items may touch
            kept.append(sorted(rng.sample(range(length), rng.randint(1, length))))
            number += 1
        rows.append(row)
    length = max(map(len, rows)) + rng.choice((0, 0, 4))
    padded = []
    for row in rows:
        pads = [(PAD, None, 0)] * (length - len(row))
        padded.append(pads + row if padding_side == "left" else row + pads)
    return padded, kept


def tensors(rows):
    ids = torch.tensor([[token for token, _, _ in row] for row in rows])
    return ids, (ids != PAD).long()


def items_of(rows):
    found = {}
    for number, row in enumerate(rows):
        for column, (_, item, _) in enumerate(row):
            if item is not None:
                start, length = found.get(item, (column, 0))[-2:]
                found[item] = (number, start, length + 1)
    return [VisualItem("image", row, start, length) for _, (row, start, length) in sorted(found.items())]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_layout_is_the_prompt_without_its_dropped_tokens(padding_side):
    for seed in range(150):
        rng = random.Random(seed)
        rows, kept = random_prompt(rng, padding_side)
        ids, mask = tensors(rows)
        items = items_of(rows)
        lengths = [item.length for item in items]
        assert find_visual_items(ids, IMAGE, lengths) == items
        indices = torch.tensor([place for places in kept for place in places], dtype=torch.long)
        layout = lay_out(mask, items, [len(places) for places in kept], indices)

        # Columns in the order of the caller, less what is dropped and the padding at the end; rows end together.
        lists = [[c for c, (_, item, place) in enumerate(row) if item is None or place in kept[item]] for row in rows]
        for row, columns in zip(rows, lists):
            while row[columns[-1]][0] == PAD:
                columns.pop()
        width = max(len(columns) - first_attended(row, columns) for row, columns in zip(rows, lists))
        expected = [[-1] * (width - len(columns)) + columns[-width:] for columns in lists]
        assert layout.columns.tolist() == expected
        for row, columns in zip(rows, expected):  # nothing but padding is lost
            attended = {c for c, (token, _, _) in enumerate(row) if token != PAD}
            dropped = {c for c, (_, item, place) in enumerate(row) if item is not None and place not in kept[item]}
            assert attended - dropped <= {*columns}

        is_visual = [[c >= 0 and row[c][1] is not None for c in columns] for row, columns in zip(rows, expected)]
        assert layout.is_visual.tolist() == is_visual
        expected_mask = [[int(c >= 0 and row[c][0] != PAD) for c in columns] for row, columns in zip(rows, expected)]
        assert layout.attention_mask(mask).tolist() == expected_mask
        # Slack brings no id that its row does not have.
        gathered = [[row[max(c, 0)][0] for c in columns] for row, columns in zip(rows, expected)]
        assert layout.gather(ids).tolist() == gathered
        stacked = torch.stack([ids, ids + 1000, ids + 2000])
        assert torch.equal(layout.gather(stacked)[2], layout.gather(ids) + 2000)

        labels = ids + 100
        expected_labels = [
            [-100 if c <= 0 or row[c][1] is not None else row[c][0] + 100 for c in columns]
            for row, columns in zip(rows, expected)
        ]
        assert layout.labels(labels).tolist() == expected_labels

        embeds = torch.randn(*layout.columns.shape, 3)
        features = torch.randn(len(indices), 3, dtype=torch.float64)
        result = layout.embeds(embeds, features)
        assert result.dtype == embeds.dtype
        order = [(row[c][1], row[c][2]) for row, columns in zip(rows, expected) for c in columns if is_item(row, c)]
        assert order == [(item, place) for item, places in enumerate(kept) for place in places]
        assert torch.equal(result[layout.is_visual], features.float())
        assert torch.equal(result[~layout.is_visual], embeds[~layout.is_visual])


def first_attended(row, columns):
    return next(n for n, column in enumerate(columns) if row[column][0] != PAD)


def is_item(row, column):
    return column >= 0 and row[column][1] is not None


def test_a_row_that_is_all_padding():
    mask = torch.tensor([[0, 0, 0], [0, 1, 1]])
    layout = lay_out(mask, [VisualItem("image", 1, 1, 1)], [1], torch.tensor([0]))
    assert layout.columns.tolist() == [[1, 2], [1, 2]]
    assert layout.attention_mask(mask).tolist() == [[0, 0], [1, 1]]


def test_a_masked_item_stays_masked():
    mask = torch.tensor([[0, 0, 1, 1]])
    layout = lay_out(mask, [VisualItem("image", 0, 0, 2)], [1], torch.tensor([1]))
    assert layout.columns.tolist() == [[1, 2, 3]]
    assert layout.attention_mask(mask).tolist() == [[0, 1, 1]]


@pytest.mark.parametrize(
    ("rows", "lengths", "message"),
    [
        (
            [[1, IMAGE, IMAGE, 2]],
            [3],
            r"has 2 placeholders \(id 99; by row: \[2\]\), but the 1 images need 3 \(each: \[3\]",
        ),
        ([[1, IMAGE, IMAGE, 2]], [2, 2], r"has 2 placeholders .* but the 2 images need 4"),
        ([[1, IMAGE, IMAGE, 2]], [], r"has 2 placeholders .* but the 0 images need 0"),
        ([[1, 2]], [1], "has 0 placeholders"),
        ([[IMAGE, 1], [IMAGE, 1]], [2], "image 0 needs one run of 2 placeholders .* from row 0, column 0 on"),
        ([[1, IMAGE], [IMAGE, 2]], [2], "image 0 needs one run of 2 placeholders .* from row 0, column 1 on"),
        ([[IMAGE, 1, IMAGE]], [2], "image 0 needs one run"),
        ([[IMAGE, 1, IMAGE, IMAGE]], [2, 1], "image 0 needs one run"),
        ([[IMAGE, IMAGE, 1, IMAGE, 5, IMAGE]], [2, 2], "image 1 needs one run of 2 .* row 0, column 3 on"),
    ],
)
def test_placeholders_that_do_not_match(rows, lengths, message):
    with pytest.raises(ValueError, match=message):
        find_visual_items(torch.tensor(rows), IMAGE, lengths)
    with pytest.raises(ValueError, match=message.replace("image", "video")):
        find_visual_items(torch.tensor(rows), IMAGE, lengths, "video")


def test_items_that_touch():
    ids = torch.tensor([[1, *[IMAGE] * 5], [*[IMAGE] * 3, 1, 2, 3]])
    assert find_visual_items(ids, IMAGE, [2, 3, 3], "video") == [
        VisualItem("video", 0, 1, 2),
        VisualItem("video", 0, 3, 3),
        VisualItem("video", 1, 0, 3),
    ]


def test_logits_at_the_positions_of_the_caller():
    columns = torch.tensor([[-1, -1, 0, 2, 3, 7], [0, 1, 4, 5, 6, 7]])
    length, vocab_size = 8, 3
    logits = torch.arange(1.0, 37.0).view(2, 6, 3)
    full = torch.zeros(2, length, vocab_size)
    for row in range(2):
        for column, source in enumerate(columns[row].tolist()):
            if source >= 0:
                full[row, source] = logits[row, column]
    assert full[0, 1].eq(0).all()
    assert torch.equal(restore_logits(logits, columns, length, 0), full)
    for number in (1, 2, 3, 5, 6, 7, 8, 20):
        kept = logits[:, -min(number, 6) :]
        assert torch.equal(restore_logits(kept, columns, length, number), full[:, -number:]), number
    for index in (torch.tensor([7, 0, 3]), torch.tensor([-1]), torch.arange(8) % 2 == 0):
        assert torch.equal(restore_logits(logits, columns, length, index), full[:, index])
    per_row = torch.tensor([[0, 2], [7, 3]])
    expected = torch.stack([full[0, [0, 2]], full[1, [7, 3]]])
    assert torch.equal(restore_logits(logits, columns, length, per_row), expected)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 2] = mask[1, 5] = mask[1, 7] = True
    assert torch.equal(
        restore_logits(logits, columns, length, mask), torch.stack([full[0, 2], full[1, 5], full[1, 7]])
    )


def test_gradients_of_restored_logits():
    columns = torch.tensor([[-1, 0, 2]])
    logits = torch.randn(1, 3, 4, requires_grad=True)
    restore_logits(logits, columns, 4, 0).sum().backward()
    assert torch.equal(logits.grad, torch.tensor([0.0, 1, 1])[None, :, None].expand(1, 3, 4))
