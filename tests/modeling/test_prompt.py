"""Prompts without their dropped placeholders, against lists put together token by token."""

import random
from dataclasses import dataclass

import pytest
import torch

from fsr_hf.modeling.prompt import VisualItem, carry_states, place_items, select_columns


IMAGE, VIDEO, PAD = 99, 98, 0
TOKEN_IDS = {"image": IMAGE, "video": VIDEO}


def item(*run_lengths: int, modality: str = "image", row: int = -1, columns=()) -> VisualItem:
    grid = torch.zeros(sum(run_lengths), 3, dtype=torch.long)
    return VisualItem(modality, grid, [], list(run_lengths), row, torch.tensor(columns, dtype=torch.long))


@dataclass
class Made:
    """A prompt put together token by token: each token is `(id, item or None, place in its item)`."""

    rows: list[list[tuple[int, int | None, int]]]
    kept: list[list[int]]
    modalities: list[str]
    run_lengths: list[list[int]]

    def ids(self) -> torch.Tensor:
        return torch.tensor([[token for token, _, _ in row] for row in self.rows])

    def mask(self) -> torch.Tensor:
        return (self.ids() != PAD).long()

    def columns(self, number: int) -> list[int]:
        return [column for row in self.rows for column, (_, owner, _) in enumerate(row) if owner == number]

    def row(self, number: int) -> int:
        return next(n for n, row in enumerate(self.rows) if any(owner == number for _, owner, _ in row))


def make(rng: random.Random, padding_side: str) -> Made:
    """Rows of words and items, which have one run of placeholders or several with words between them."""
    made = Made([], [], [], [])
    for n in range(rng.randint(1, 4)):
        row: list = [(rng.randint(1, 50), None, 0) for _ in range(rng.randint(1, 5))]
        for _ in range(rng.randint(n == 0, 3)):
            modality, number = rng.choice(("image", "video")), len(made.kept)
            runs = [rng.randint(1, 6) for _ in range(rng.choice((1, 1, 3)))]
            for first, length in zip((sum(runs[:k]) for k in range(len(runs))), runs):
                row += [(TOKEN_IDS[modality], number, first + place) for place in range(length)]
                row += [(rng.randint(1, 50), None, 0)] if len(runs) > 1 else []
            row += [(rng.randint(1, 50), None, 0) for _ in range(rng.randint(0, 3))]  # items may touch
            made.kept.append(sorted(rng.sample(range(sum(runs)), rng.randint(1, sum(runs)))))
            made.modalities.append(modality)
            made.run_lengths.append(runs)
        made.rows.append(row)
    length = max(map(len, made.rows)) + rng.choice((0, 0, 4))
    pads = [[(PAD, None, 0)] * (length - len(row)) for row in made.rows]
    made.rows = [pad + row if padding_side == "left" else row + pad for pad, row in zip(pads, made.rows)]
    return made


def by_modality(made: Made) -> list[VisualItem]:
    """The items as a family makes them: each modality in its order, images first."""
    numbers = sorted(range(len(made.kept)), key=lambda number: (made.modalities[number], number))
    return [item(*made.run_lengths[number], modality=made.modalities[number]) for number in numbers]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_items_are_found_where_the_prompt_has_them(padding_side):
    for seed in range(100):
        made = make(random.Random(seed), padding_side)
        placed = place_items(made.ids(), by_modality(made), TOKEN_IDS)
        assert [found.modality for found in placed] == made.modalities
        assert [found.row for found in placed] == [made.row(number) for number in range(len(placed))]
        assert [found.columns.tolist() for found in placed] == [made.columns(n) for n in range(len(placed))]


@pytest.mark.parametrize("with_slack", [False, True])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_columns_are_the_prompt_without_its_dropped_tokens(padding_side, with_slack):
    conversations = 0
    for seed in range(150):
        rng = random.Random(seed)
        made = make(rng, padding_side)
        items = place_items(made.ids(), by_modality(made), TOKEN_IDS)
        # In half of the prompts a cache holds what stands before a column of each row, items among it.
        is_conversation = seed % 2 == 1
        starts = [start_of(rng, row) if is_conversation else 0 for row in made.rows]
        new = [n for n in range(len(items)) if made.columns(n)[0] >= starts[made.row(n)]]
        conversations += is_conversation and len(new) < len(items)
        indices = torch.tensor([place for n in new for place in made.kept[n]], dtype=torch.long)
        columns, is_padded = select_columns(
            made.mask(), [items[n] for n in new], [len(made.kept[n]) for n in new], indices, starts, with_slack
        )

        expected = []
        for row, start in zip(made.rows, starts):
            real = [c for c, (token, _, _) in enumerate(row) if token != PAD and c >= start]
            expected.append(
                [c for c in range(real[0], real[-1] + 1) if row[c][1] is None or row[c][2] in made.kept[row[c][1]]]
            )
        width = max(map(len, expected)) + with_slack
        assert columns.tolist() == [[-1] * (width - len(row)) + row for row in expected]
        assert is_padded == any(len(row) < width for row in expected)
    assert conversations > 10


def start_of(rng: random.Random, row: list) -> int:
    """A word of the row that is not between the runs of an item."""
    owners = [owner for _, owner, _ in row]
    words = [
        column
        for column, (token, owner, _) in enumerate(row)
        if owner is None and token != PAD and not {*owners[:column]} & {*owners[column:]} - {None}
    ]
    return rng.choice(words)


def test_a_row_that_is_all_padding():
    mask = torch.tensor([[0, 0, 0], [0, 1, 1]])
    items = [item(1, row=1, columns=[1])]
    columns, is_padded = select_columns(mask, items, [1], torch.tensor([0]), [0, 0])
    assert columns.tolist() == [[-1, -1], [1, 2]] and is_padded is True
    columns, is_padded = select_columns(mask[:1], [], [], torch.empty(0, dtype=torch.long), [0])
    assert columns.tolist() == [[-1]] and is_padded is True


def test_a_masked_item_stays():
    """Its kept tokens have columns, whose mask is 0 as before; and so have words between padding."""
    mask = torch.tensor([[0, 0, 1, 0, 1, 0]])
    items = [item(2, row=0, columns=[0, 1])]
    columns, is_padded = select_columns(mask, items, [1], torch.tensor([1]), [0])
    assert columns.tolist() == [[1, 2, 3, 4]] and is_padded is True
    mask[0, 3] = 1
    assert select_columns(mask, items, [1], torch.tensor([1]), [0])[1] is False


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
    ids = torch.tensor(rows)
    with pytest.raises(ValueError, match=message):
        place_items(ids, [item(length) for length in lengths], TOKEN_IDS)
    videos, message = [item(length, modality="video") for length in lengths], message.replace("image", "video")
    with pytest.raises(ValueError, match=message.replace("99", "98")):
        place_items(ids.where(ids != IMAGE, VIDEO), videos, TOKEN_IDS)


def test_runs_that_do_not_match():
    ids = torch.tensor([[VIDEO, VIDEO, 1, VIDEO, VIDEO, 2, VIDEO]])
    (found,) = place_items(ids, [item(2, 2, 1, modality="video")], TOKEN_IDS)
    assert found.columns.tolist() == [0, 1, 3, 4, 6]
    for runs in ((5,), (2, 3), (3, 2), (4, 1)):
        with pytest.raises(ValueError, match=f"video 0 needs one run of {max(runs)} placeholders"):
            place_items(ids, [item(*runs, modality="video")], TOKEN_IDS)


def test_items_that_touch():
    ids = torch.tensor([[1, *[IMAGE] * 5], [*[IMAGE] * 3, 1, 2, 3]])
    placed = place_items(ids, [item(2), item(3), item(3)], TOKEN_IDS)
    assert [(found.row, found.columns.tolist()) for found in placed] == [
        (0, [1, 2]),
        (0, [3, 4, 5]),
        (1, [0, 1, 2]),
    ]


def test_counts_of_an_item():
    pools = [torch.tensor([0, 1, 2]), torch.tensor([4, 5])]
    found = VisualItem("image", torch.zeros(7, 3, dtype=torch.long), pools)
    assert (found.length, found.num_candidates, found.run_lengths) == (7, 5, [7])


# --- The way back ---

COLUMNS = torch.tensor([[-1, -1, 0, 2, 3, 7], [0, 1, 4, 5, 6, 7], [-1, -1, -1, 3, 4, 6]])


def test_states_at_the_positions_of_the_caller():
    """A dropped position has the state of the last kept one before it; what stands before all of them, the first."""
    states = torch.arange(1.0, 55).view(3, 6, 3)
    expected = torch.zeros(3, 8, 3)
    for row, columns in enumerate(COLUMNS.tolist()):
        for position in range(8):
            before = [place for place, column in enumerate(columns) if 0 <= column <= position]
            first = next(place for place, column in enumerate(columns) if column >= 0)
            expected[row, position] = states[row, before[-1] if before else first]
    assert torch.equal(carry_states(states, COLUMNS, 8), expected)
    assert expected.ne(0).all()


def test_states_of_a_row_of_slack():
    states = torch.randn(2, 2, 3)
    carried = carry_states(states, torch.tensor([[-1, -1], [0, 2]]), 3)
    assert carried.shape == (2, 3, 3) and torch.equal(carried[1], states[1, [0, 0, 1]])


def test_gradients_of_carried_states():
    """A state counts as often as it is read, and slack never."""
    states = torch.randn(3, 6, 4, requires_grad=True)
    carry_states(states, COLUMNS, 8).sum().backward()
    times = torch.tensor([[0, 0, 2, 1, 4, 1], [1, 3, 1, 1, 1, 1], [0, 0, 0, 4, 2, 2]])
    assert torch.equal(states.grad, times[..., None].expand(-1, -1, 4).float())
