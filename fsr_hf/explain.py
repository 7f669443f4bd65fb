"""
What `fsr-hf explain` and the web demo do: ask about an image, and draw which of its visual tokens were kept.
"""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from .machine import default_device
from .modeling.fsr import VisualSelection
from .processing.processing_fsr_llava_video import sample_frames
from .processing.video_files import read_video


__all__ = [
    "Explanation",
    "Picture",
    "check_fsr_model",
    "explain",
    "explain_output",
    "load_fsr_model",
    "load_visual",
]

FOCUS, SCAN = (250, 130, 16), (40, 135, 240)  # outlines and tints
TINT = 0.25  # share of the colour in the cell of a kept token
DROPPED, MERGED = 0.36, 0.6  # share of the image, the rest dark, in the cell of a token that is gone
_DARK, _LINE = (14, 18, 26), (215, 230, 255)
_INK, _GREY, _PAPER = (28, 32, 38), (110, 117, 127), (255, 255, 255)
_WIDTH, _MARGIN, _GAP = 1000, 44, 12
_SCALE = 3  # drawn larger and then reduced, lines come out smooth
_VIDEOS = {".avi", ".mkv", ".mov", ".mp4", ".webm"}


def check_fsr_model(model: str, trust_remote_code: bool | None = None) -> None:
    """
    Raises:
        `OSError`: if there is no checkpoint `model`, a folder or a Hub id.
        `ValueError`: if it is one without FSR.
    """
    if not os.path.isdir(model):
        try:
            validate_repo_id(model)
        except HFValidationError as error:
            raise OSError(f"{model} is neither a folder nor the id of a Hub repository.") from error
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    if getattr(config, "fsr_config", None) is None:
        raise ValueError(
            f"{model} is a checkpoint without FSR, of `model_type` {config.model_type!r}: `fsr-hf export` adds it."
        )


def load_fsr_model(model: str, device: str | None = None, trust_remote_code: bool | None = None) -> tuple[Any, Any]:
    """
    The model and the processor of an FSR checkpoint, by the Auto classes, on a GPU if there is one and no `device` is
    named. A family that this package has is loaded with the package's code; for any other one, `trust_remote_code`
    runs the code in the checkpoint.
    """
    check_fsr_model(model, trust_remote_code)
    device = device or default_device()
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
    return AutoModel.from_pretrained(model, trust_remote_code=trust_remote_code).to(device), processor


@dataclass
class Picture:
    """
    A drawing of an [`Explanation`].

    Args:
        image (`Image.Image`):
            The drawing.
        boxes (`list[tuple[int, int, int, int] | None]`):
            Left, top, right and bottom of every visual token in it; `None` for a newline, which has no place.
    """

    image: Image.Image
    boxes: list[tuple[int, int, int, int] | None]


@dataclass
class Explanation:
    """
    An answer, and the visual tokens behind it.

    Args:
        question (`str`):
            What was asked.
        answer (`str`):
            What the model said.
        views (`list[Image.Image]`):
            What the vision tower saw: the image as the processor cropped it, or its base view and its tiles joined, or
            the frames of a video.
        selection (`VisualSelection`):
            Which tokens were kept.
        model (`str`, *optional*, defaults to `""`):
            The name of the checkpoint.
    """

    question: str
    answer: str
    views: list[Image.Image]
    selection: VisualSelection
    model: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """`dict[str, int]`: how many visual tokens there are, are kept, and so on; newlines do not count."""
        selection = self.selection
        num_tokens = len(selection.priority)
        is_token = [True] * num_tokens if selection.grid is None else (selection.grid.amin(1) >= 0).tolist()
        kept = [
            is_focus
            for token, is_focus in zip(selection.indices.tolist(), selection.is_focus.tolist())
            if is_token[token]
        ]
        merged = int((selection.merged_into >= 0).sum())
        return {
            "tokens": sum(is_token),
            "kept": len(kept),
            "focus": sum(kept),
            "scan": len(kept) - sum(kept),
            "merged": merged,
            "dropped": sum(is_token) - len(kept) - merged,
        }

    def draw(self) -> Picture:
        """
        The views with Focus tokens in orange, Scan anchors in blue, dropped tokens dimmed, and a line from each merged
        token to its anchor; question, answer and counts around them.
        """
        return _Canvas(self).draw()


def load_visual(file: str | os.PathLike) -> Image.Image | Path:
    """
    An image, or the path of a video.

    Raises:
        `OSError`: if the file is neither.
    """
    if Path(file).suffix.lower() in _VIDEOS:
        return Path(file)
    try:
        return ImageOps.exif_transpose(Image.open(file)).convert("RGB")  # upright, as transformers opens files
    except UnidentifiedImageError as error:
        raise OSError(f"{file} is not an image that Pillow can read, nor a video.") from error


def explain(
    model: Any,
    processor: Any,
    visual: Image.Image | Path,
    question: str,
    *,
    max_new_tokens: int = 64,
    num_frames: int = 16,
    **options: Any,
) -> Explanation:
    """
    Ask an FSR model about an image or a video.

    Args:
        model, processor:
            From [`load_fsr_model`] or the Auto classes.
        visual (`Image.Image` or `Path`):
            From [`load_visual`].
        question (`str`):
            What to ask.
        max_new_tokens (`int`, *optional*, defaults to 64):
            Length of the answer.
        num_frames (`int`, *optional*, defaults to 16):
            Frames taken of a video, evenly from the first to the last; all of a shorter one.
        options:
            More arguments of `generate`, such as `num_visual_tokens`.

    Raises:
        `ImportError`: if nothing decodes videos.
        `ValueError`: if the model takes no videos, and `visual` is one.
    """
    settings: dict[str, Any] = {}
    if isinstance(visual, Path):
        if getattr(processor, "video_processor", None) is None:
            raise ValueError(f"{visual} is a video, and {type(model).__name__} takes images alone.")
        choose = partial(sample_frames, num_frames=num_frames)
        frames, metadata = read_video(processor.video_processor, str(visual), choose)
        part = {"type": "video", "video": frames}
        settings = {"video_metadata": [metadata], "do_sample_frames": False}
    else:
        part = {"type": "image", "image": visual}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [part, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=settings,
    ).to(model.device, model.dtype)
    outputs = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_visual_selection=True,
        **options,
    )
    return explain_output(model, processor, inputs, outputs, question)


def explain_output(model: Any, processor: Any, inputs: Any, outputs: Any, question: str) -> Explanation:
    """
    What a call of `generate` answered about its first image or video, and the visual tokens behind the answer.

    Args:
        model, processor:
            From [`load_fsr_model`] or the Auto classes.
        inputs (`BatchFeature`):
            What `processor` made of the prompt, of one row.
        outputs (`GenerateOutput`):
            Of `generate` with `return_dict_in_generate=True` and `output_visual_selection=True`.
        question (`str`):
            What was asked.
    """
    new_tokens = outputs.sequences[0, inputs["input_ids"].shape[1] :]
    answer = processor.decode(new_tokens, skip_special_tokens=True).strip()
    views = [Image.fromarray(view) for view in _pixels_seen(inputs, processor)]
    selection = outputs.visual_selections[0]
    if "image_sizes" in inputs and len(views) > 1:
        size, pinpoints = inputs["image_sizes"][0].tolist(), model.config.image_grid_pinpoints
        _, columns = get_anyres_image_grid_shape(size, pinpoints, model.config.vision_config.image_size)
        views, selection = _join_tiles(views, selection, columns)
    return Explanation(question, answer, views, selection, model.config.name_or_path)


def _join_tiles(
    views: list[Image.Image], selection: VisualSelection, columns: int
) -> tuple[list[Image.Image], VisualSelection]:
    """The tiles after the base view, in rows of `columns`, become one view: the picture without what pads it."""
    (width, height), tiles = views[0].size, views[1:]
    joined = Image.new("RGB", (columns * width, len(tiles) // columns * height))
    for number, tile in enumerate(tiles):
        joined.paste(tile, (number % columns * width, number // columns * height))
    grid = selection.grid.cpu().clone()  # type: ignore[union-attr]
    rows_of_view, columns_of_view = (1 + grid[grid[:, 0] == 0, 1:].amax(0)).tolist()
    is_tile = grid[:, 0] > 0
    number, places = grid[is_tile, 0] - 1, grid[is_tile, 1:]
    places += torch.stack([number // columns * rows_of_view, number % columns * columns_of_view], dim=-1)
    (top, left), (bottom, right) = places.amin(0).tolist(), (1 + places.amax(0)).tolist()
    across, down = width / columns_of_view, height / rows_of_view  # pixels of a token
    joined = joined.crop((round(left * across), round(top * down), round(right * across), round(bottom * down)))
    grid[is_tile] = torch.cat([torch.ones_like(number)[:, None], places - torch.tensor([top, left])], dim=-1)
    return [views[0], joined], replace(selection, grid=grid)


def _pixels_seen(inputs: Any, processor: Any) -> Any:
    """What the vision tower saw of the first image or video, as uint8 `(views, height, width, 3)`."""
    is_video = "pixel_values_videos" in inputs
    settings = processor.video_processor if is_video else processor.image_processor
    pixels = inputs["pixel_values_videos" if is_video else "pixel_values"].detach().float().cpu()
    if pixels.ndim == 5:  # [images, views, C, H, W]
        pixels = pixels[0]
    elif pixels.ndim == 2:  # [patches, C * frames * P * P]: merge groups of patches, one after the other
        times, rows, columns = inputs["video_grid_thw" if is_video else "image_grid_thw"][0].tolist()
        side, merge, frames = settings.patch_size, settings.merge_size, settings.temporal_patch_size
        pixels = pixels[: times * rows * columns]
        pixels = pixels.view(times, rows // merge, columns // merge, merge, merge, -1, frames, side, side)
        pixels = pixels.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)[:, 0]  # the first of the frames that share a token
        pixels = pixels.reshape(times, -1, rows * side, columns * side)
    if settings.do_normalize:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (settings.image_mean, settings.image_std))
        pixels = pixels * std + mean
    if settings.do_rescale:
        pixels = pixels / (settings.rescale_factor * 255)
    return pixels.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


class _Canvas:
    """One drawing. Lengths are in pixels of the finished picture; `_SCALE` comes in where something is drawn."""

    def __init__(self, explanation: Explanation):
        selection = explanation.selection
        if selection.grid is None:
            raise ValueError("the selection has no `grid`: where its tokens are in the image is not known.")
        self.explanation = explanation
        self.grid = selection.grid.tolist()
        self.kept = dict(zip(selection.indices.tolist(), selection.is_focus.tolist()))
        self.anchors = {token: anchor for token, anchor in enumerate(selection.merged_into.tolist()) if anchor >= 0}
        # Rows and columns of tokens in each size of view.
        self.shapes: dict[tuple[int, int], tuple[int, int]] = {}
        for view, row, column in self.grid:
            if min(view, row, column) >= 0:  # not a newline
                size = explanation.views[view].size
                rows, columns = self.shapes.get(size, (0, 0))
                self.shapes[size] = max(rows, row + 1), max(columns, column + 1)
        self.rows, self.columns = map(max, zip(*self.shapes.values()))
        # Panels, one for each view that has tokens: as many in a row as make the tokens largest.
        self.views = sorted({place[0] for place in self.grid if min(place) >= 0})
        width, sizes = _WIDTH - 2 * _MARGIN, {}
        for across in range(1, len(self.views) + 1):
            down = -(-len(self.views) // across)
            fitting = (width - _GAP * (across - 1)) // (across * self.columns)
            sizes[across] = min(fitting, (width * 5 // 4 - _GAP * (down - 1)) // (down * self.rows))
        self.across = max(sizes, key=lambda across: sizes[across])
        self.cell = max(2, sizes[self.across])
        # Where a view has fewer tokens than another, they are larger.
        self.cells = {}
        for view in self.views:
            rows, columns = self.shapes[explanation.views[view].size]
            self.cells[view] = min(self.rows * self.cell // rows, self.columns * self.cell // columns)
        self.font, self.title = _font(20), _font(28)

    def draw(self) -> Picture:
        explanation, width = self.explanation, _WIDTH - 2 * _MARGIN
        panel_width, panel_height = self.columns * self.cell, self.rows * self.cell
        down = -(-len(self.views) // self.across)
        question = _wrap(explanation.question, self.title, width)
        answer = _wrap(explanation.answer or "(no answer)", self.font, width)

        top = _MARGIN + 38 * len(question) + 28 * len(answer) + 14
        left = (_WIDTH - self.across * panel_width - (self.across - 1) * _GAP) // 2
        widths = {view: self.shapes[explanation.views[view].size][1] * cell for view, cell in self.cells.items()}
        origins = {
            view: (
                left + place % self.across * (panel_width + _GAP) + (panel_width - widths[view]) // 2,
                top + place // self.across * (panel_height + _GAP),
            )
            for place, view in enumerate(self.views)
        }
        legend = top + down * (panel_height + _GAP) + 10
        self.image = Image.new("RGB", (_WIDTH * _SCALE, (legend + 118) * _SCALE), _PAPER)
        self.pen = ImageDraw.Draw(self.image)
        boxes = [None if min(place) < 0 else self._box(origins[place[0]], *place) for place in self.grid]

        self._write(_MARGIN, _MARGIN - 14, question, self.title, 38, _INK)
        self._write(_MARGIN, _MARGIN - 10 + 38 * len(question), answer, self.font, 28, _GREY)
        for view, origin in origins.items():
            self._draw_view(view, origin)
        without_lines = self.image.copy()
        self._draw_lines([(boxes[token], boxes[anchor]) for token, anchor in self.anchors.items()])
        for token, is_focus in self.kept.items():
            if (box := boxes[token]) is not None:
                self._draw_kept(box, FOCUS if is_focus else SCAN, without_lines)
        self._draw_legend(legend)
        return Picture(self.image.reduce(_SCALE), boxes)

    def _box(self, origin: tuple[int, int], view: int, row: int, column: int) -> tuple[int, int, int, int]:
        cell = self.cells[view]
        left, top = origin[0] + column * cell, origin[1] + row * cell
        return left, top, left + cell, top + cell

    def _draw_view(self, number: int, origin: tuple[int, int]) -> None:
        """A view with every token as bright as what became of it, and paper where there is none."""
        rows, columns = self.shapes[self.explanation.views[number].size]
        cells = Image.new("L", (columns, rows), 0)
        exists = Image.new("1", (columns, rows), 0)
        for token, (view, row, column) in enumerate(self.grid):
            if view == number and min(row, column) >= 0:
                share = 1.0 if token in self.kept else MERGED if token in self.anchors else DROPPED
                cells.putpixel((column, row), round(255 * share))
                exists.putpixel((column, row), 1)
        size = (columns * self.cells[number] * _SCALE, rows * self.cells[number] * _SCALE)
        view_image = self.explanation.views[number].convert("RGB").resize(size, Image.Resampling.LANCZOS)
        brightness = cells.resize(size, Image.Resampling.NEAREST)
        dimmed = Image.composite(view_image, Image.new("RGB", size, _DARK), brightness)
        place = (origin[0] * _SCALE, origin[1] * _SCALE)
        self.image.paste(dimmed, place, exists.resize(size, Image.Resampling.NEAREST))

    def _draw_kept(
        self, box: tuple[int, int, int, int], colour: tuple[int, int, int], without_lines: Image.Image
    ) -> None:
        """The token, over the lines, with a tint, and an outline inside of the cell, so that neighbours stay apart."""
        left, top, right, bottom = (side * _SCALE for side in box)
        cell = without_lines.crop((left, top, right, bottom))
        self.image.paste(Image.blend(cell, Image.new("RGB", cell.size, colour), TINT), (left, top))
        width = _SCALE * (1 + (box[2] - box[0] >= 12) + (box[2] - box[0] >= 30))
        self.pen.rectangle((left + 1, top + 1, right - 2, bottom - 2), outline=colour, width=width)

    def _draw_lines(self, pairs: list[tuple[Any, Any]]) -> None:
        """From merged tokens to their anchors, see-through: where they bundle they do not get denser."""
        mask = Image.new("L", self.image.size, 0)
        pen = ImageDraw.Draw(mask)
        ends = [
            [((left + right) * _SCALE / 2, (top + bottom) * _SCALE / 2) for left, top, right, bottom in pair]
            for pair in pairs
        ]
        for pair in ends:
            pen.line(pair, fill=150, width=_SCALE)
        size = min(max(12, self.cell), 38)
        for pair in ends:
            for (x, y), radius in zip(pair, (size / 16, size / 8)):
                radius *= _SCALE
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=235)
        self.image.paste(_LINE, (0, 0), mask)

    def _draw_legend(self, top: int) -> None:
        counts = self.explanation.counts
        summary = (
            f"{counts['kept']} of {counts['tokens']} visual tokens kept ({counts['kept'] / counts['tokens']:.0%})"
        )
        x, y, light = _MARGIN, top + 2, (200, 200, 200)
        for fill, outline, text in (
            (_mix(light, FOCUS, TINT), FOCUS, f"{counts['focus']} Focus"),
            (_mix(light, SCAN, TINT), SCAN, f"{counts['scan']} Scan anchors"),
            (_mix(_DARK, light, MERGED), None, f"{counts['merged']} merged into an anchor"),
            (_mix(_DARK, light, DROPPED), None, f"{counts['dropped']} dropped"),
        ):
            corners = tuple(side * _SCALE for side in (x, y, x + 26, y + 26))
            self.pen.rectangle(corners, fill=fill, outline=outline, width=3 * _SCALE if outline else 0)
            if "merged" in text:
                self._draw_lines([((x, y + 8, x + 14, y + 22), (x + 15, y + 1, x + 22, y + 14))])
            self._write(x + 36, y + 1, [text], self.font, 0, _INK)
            x += 36 + round(self.font.getlength(text) / _SCALE) + 36
        self._write(_MARGIN, top + 48, [summary], self.font, 0, _INK)
        self._write(_MARGIN, top + 80, [self.explanation.model], _font(15), 0, _GREY)

    def _write(self, left: int, top: int, lines: list[str], font, spacing: int, colour) -> None:
        for number, line in enumerate(lines):
            self.pen.text((left * _SCALE, (top + number * spacing) * _SCALE), line, fill=colour, font=font)


def _font(size: int):
    return ImageFont.load_default(size * _SCALE)


def _wrap(text: str, font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width * _SCALE:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _mix(below: tuple[int, int, int], above: tuple[int, int, int], share: float) -> tuple[int, ...]:
    return tuple(round(b + share * (a - b)) for b, a in zip(below, above))
