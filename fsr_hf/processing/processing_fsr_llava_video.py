"""The processor of LLaVA-Video with FSR: the stock one of LLaVA-OneVision, with LLaVA-Video's tokens for a video."""

import math
from functools import partial
from typing import Any

import torch
from transformers import LlavaOnevisionProcessor
from transformers.video_utils import VideoMetadata, make_batched_metadata, make_batched_videos

from ..configuration.remote_code import RemoteCodeMixin
from .video_files import read_video


__all__ = ["FSRLlavaVideoProcessor", "sample_frames", "time_instruction"]


class FSRLlavaVideoProcessor(RemoteCodeMixin, LlavaOnevisionProcessor):
    r"""
    [`LlavaOnevisionProcessor`] for LLaVA-Video: every row of every frame ends with a newline token, so that a frame of
    27 x 27 patches takes 14 x 15 placeholders. It also returns `video_num_frames`, so that the videos of a batch can
    have different numbers of frames.

    Args:
        image_processor ([`LlavaOnevisionImageProcessor`]):
            As in [`LlavaOnevisionProcessor`].
        tokenizer ([`PreTrainedTokenizerBase`]):
            The language model's tokenizer.
        video_processor ([`LlavaOnevisionVideoProcessor`]):
            As in [`LlavaOnevisionProcessor`]. Its `num_frames`, if it has any, holds for video files.
        num_image_tokens (`int`, *optional*, defaults to 729):
            Patches of a view or a frame.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"full"`):
            As in the model's config.
        chat_template (`str`, *optional*):
            The template of a conversation.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            The placeholder of an image, where the tokenizer names none.
        video_token (`str`, *optional*, defaults to `"<video>"`):
            The placeholder of a video, where the tokenizer names none.
        vision_aspect_ratio (`str`, *optional*, defaults to `"anyres_max_9"`):
            As in the model's config.
        spatial_pool_mode (`str`, *optional*, defaults to `"bilinear"`):
            As in the model's config.
        add_time_instruction (`bool`, *optional*, defaults to `False`):
            Whether a sentence about its length and the times of its frames follows each video, as in LLaVA-Video's
            training. A call can say otherwise.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        num_image_tokens: int = 729,
        vision_feature_select_strategy: str = "full",
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        vision_aspect_ratio: str = "anyres_max_9",
        spatial_pool_mode: str = "bilinear",
        add_time_instruction: bool = False,
        **kwargs: Any,
    ):
        if math.isqrt(num_image_tokens) ** 2 != num_image_tokens:
            raise ValueError(f"`num_image_tokens={num_image_tokens}` is no square of a number of patches.")
        if spatial_pool_mode not in ("bilinear", "average"):
            raise ValueError(
                f'`spatial_pool_mode={spatial_pool_mode!r}` is not allowed: it must be "bilinear" or "average".'
            )
        self.spatial_pool_mode = spatial_pool_mode
        self.add_time_instruction = add_time_instruction
        super().__init__(
            image_processor,
            tokenizer,
            video_processor,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            video_token=video_token,
            vision_aspect_ratio=vision_aspect_ratio,
            **kwargs,
        )

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        add_time_instruction: bool | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        do_sample_frames: bool | None = None,
        video_metadata: Any = None,
        **kwargs: Any,
    ):
        """
        As the stock method.

        Args:
            videos (`str`, `np.ndarray`, `torch.Tensor`, `list`):
                A video or several: the name of a file, frames in one array, or a list of frames. Files are decoded by
                torchcodec or, without it or FFmpeg, by PyAV.
            add_time_instruction (`bool`, *optional*):
                In place of the processor's own. Frames that are not read from a file need `video_metadata`.
            num_frames (`int`, *optional*):
                Frames to take of each video, spread evenly from the first to the last, as LLaVA-Video does it. A
                shorter video gives what it has. Without it, a file gives as many as the video processor says.
            fps (`float`, *optional*):
                Frames to take of each second of a video, but no more than `num_frames`.
            do_sample_frames (`bool`, *optional*):
                `False` takes all frames.
            video_metadata (`VideoMetadata` or `dict`, or a `list` of them, *optional*):
                For videos that are no files: `fps`, `total_num_frames`, and with it `frames_indices` where the frames
                are some of the video's.

        Raises:
            `ValueError`: if a video has no frames, frames of different sizes, or times that are asked for and unknown.
        """
        nested = dict(kwargs.pop("videos_kwargs", {}))
        num_frames, fps = nested.pop("num_frames", num_frames), nested.pop("fps", fps)
        do_sample_frames = nested.pop("do_sample_frames", do_sample_frames)
        video_metadata = nested.pop("video_metadata", video_metadata)
        if nested:
            kwargs["videos_kwargs"] = nested
        # Callers that give both whether there are any or not.
        images = None if isinstance(images, (list, tuple)) and not images else images
        videos = None if isinstance(videos, (list, tuple)) and not videos else videos
        if videos is None:
            return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)

        clips, metadata = self._read_videos(videos, video_metadata, num_frames, fps, do_sample_frames)
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
            placeholders = sum(row.count(self.video_token) for row in text)
            if placeholders != len(clips) and not kwargs.get("sanitize_control_tokens"):
                raise ValueError(
                    f"`text` has {placeholders} {self.video_token}, but `videos` holds {len(clips)} videos. (Where no "
                    "frames are given, there is no video.)"
                )
            if self.add_time_instruction if add_time_instruction is None else add_time_instruction:
                times = [time_instruction(len(clip), facts) for clip, facts in zip(clips, metadata)]
                text, _ = self.get_text_with_replacements(
                    text, videos_replacements=[f"{self.video_token}\n{words}" for words in times]
                )
        return super().__call__(
            images=images,
            text=text,
            videos=clips,
            audio=audio,
            video_metadata=metadata,
            do_sample_frames=False,
            **kwargs,
        )

    def _read_videos(
        self,
        videos: Any,
        video_metadata: Any,
        num_frames: int | None,
        fps: float | None,
        do_sample_frames: bool | None,
    ) -> tuple[list[Any], list[VideoMetadata]]:
        """The frames of each video, `(frames, ...)`, and what is known of it."""
        _check_frames(videos)
        videos = make_batched_videos(videos)
        if video_metadata is None:
            facts = [None] * len(videos)
        else:
            facts = video_metadata if isinstance(video_metadata, (list, tuple)) else [video_metadata]
            facts = [each for part in facts for each in (part if isinstance(part, (list, tuple)) else [part])]
        if len(facts) != len(videos):
            raise ValueError(f"`video_metadata` tells of {len(facts)} videos, but `videos` holds {len(videos)}.")
        if do_sample_frames is False:
            num_frames = fps = None
        clips, metadata = [], []
        for video, known in zip(videos, facts):
            if isinstance(video, str):
                number = num_frames
                if number is None and fps is None and do_sample_frames is not False:
                    number = self.video_processor.num_frames
                choose = partial(sample_frames, num_frames=number, fps=fps)
                clip, found = read_video(self.video_processor, video, choose)
            else:
                clip, found = self._take_frames(video, known, num_frames, fps)
            clips.append(clip)
            metadata.append(found)
        return clips, metadata

    def _take_frames(self, video: Any, known: Any, num_frames: int | None, fps: float | None):
        """Of frames that are at hand, those to take."""
        if isinstance(video, (list, tuple)):  # names of files
            video = self.video_processor.fetch_images(list(video))
            _check_frames(video)
            (video,) = make_batched_videos([video])
        known = None if known is None else [{"total_num_frames": len(video), **known}]
        (metadata,) = make_batched_metadata([video], known)
        if metadata.frames_indices is None and metadata.total_num_frames == len(video):
            metadata.frames_indices = list(range(len(video)))
        if metadata.frames_indices is not None and len(metadata.frames_indices) != len(video):
            raise ValueError(
                f"`video_metadata` has {len(metadata.frames_indices)} `frames_indices` for a video of {len(video)} "
                "frames: it must have one for each frame that is given."
            )
        if num_frames is not None or fps is not None:
            rate = metadata.fps and metadata.fps * len(video) / metadata.total_num_frames
            at_hand = VideoMetadata(total_num_frames=len(video), fps=rate)
            indices = sample_frames(at_hand, num_frames, fps)
            video = video[indices]
            if metadata.frames_indices is not None:
                metadata.frames_indices = [metadata.frames_indices[index] for index in indices]
        return video, metadata

    def _process_videos(self, videos: Any, **kwargs: Any):
        kwargs["return_tensors"] = None  # videos of different lengths make no tensor before they are padded
        inputs = self.video_processor(videos, **kwargs)
        frames = [torch.as_tensor(video) for video in inputs["pixel_values_videos"]]
        inputs["video_num_frames"] = [len(video) for video in frames]
        most = max(inputs["video_num_frames"])
        inputs["pixel_values_videos"] = torch.stack(
            [torch.nn.functional.pad(video, (0, 0) * (video.ndim - 1) + (0, most - len(video))) for video in frames]
        )
        return inputs, [self.replace_video_token(inputs, number) for number in range(len(frames))]

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs: Any) -> str:
        return self.video_token * self._num_video_tokens(int(video_inputs["video_num_frames"][video_idx]))

    def _num_video_tokens(self, num_frames: int) -> int:
        side = math.isqrt(self.num_image_tokens)
        side = side // 2 if self.spatial_pool_mode == "average" else math.ceil(side / 2)
        return num_frames * side * (side + 1)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any):
        data = super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        if video_sizes is not None:
            data.num_video_tokens = [self._num_video_tokens(num_frames) for num_frames, _, _ in video_sizes]
        return data

    @property
    def model_input_names(self) -> list[str]:
        """The stock names, and the number of frames of each video."""
        return [*super().model_input_names, "video_num_frames"]


def sample_frames(
    metadata: VideoMetadata, num_frames: int | None = None, fps: float | None = None, **kwargs: Any
) -> list[int]:
    """
    The frames that LLaVA-Video takes of a video
    ([load_video](https://github.com/LLaVA-VL/LLaVA-NeXT/blob/main/docs/LLaVA_Video_1003.md)): `num_frames` spread
    evenly from the first to the last, or `fps` of each second where that makes no more; all without either.

    Raises:
        `ValueError`: if `num_frames` or `fps` is not positive, or the frame rate of the video is not known.
    """
    for name, value in (("num_frames", num_frames), ("fps", fps)):
        if value is not None and not value > 0:
            raise ValueError(f"`{name}={value!r}` is not allowed: it must be positive.")
    total = metadata.total_num_frames
    indices = list(range(total))
    if fps is not None:
        if not metadata.fps:
            raise ValueError(f"`fps={fps}` needs the frame rate of the video: put `fps` into its `video_metadata`.")
        indices = indices[:: max(1, round(metadata.fps / fps))]
    if num_frames is not None and (fps is None or len(indices) > num_frames):
        number = min(num_frames, total)
        indices = [step * (total - 1) // max(number - 1, 1) for step in range(number)]
    return indices


def time_instruction(num_frames: int, metadata: VideoMetadata) -> str:
    """
    What LLaVA-Video tells of the times of frames, in the words (and the spaces) of
    [its usage](https://github.com/LLaVA-VL/LLaVA-NeXT/blob/main/docs/LLaVA_Video_1003.md).
    """
    if not metadata.fps or metadata.frames_indices is None:
        raise ValueError(
            "`add_time_instruction=True` needs to know when frames were taken: pass `video_metadata` with `fps`, "
            "`total_num_frames` and `frames_indices` for each video, or the videos as files. It is "
            f"{dict(metadata)}."
        )
    duration = metadata.total_num_frames / metadata.fps
    times = ",".join(f"{index / metadata.fps:.2f}s" for index in metadata.frames_indices)
    return (
        f"The video lasts for {duration:.2f} seconds, and {num_frames} frames are uniformly sampled from it. These "
        f"frames are located at {times}.Please answer the following questions related to this video."
    )


def _check_frames(videos: Any, place: str = "videos") -> None:
    """Refuse videos without frames, and frames that do not stack."""
    if getattr(videos, "ndim", 0) >= 4 and 0 in videos.shape[:-3]:
        raise ValueError(f"`{place}` has no frames: its shape is {tuple(videos.shape)}.")
    if not isinstance(videos, (list, tuple)):
        return
    if place == "videos" and not _holds_frames(videos):
        raise ValueError(f"`videos` is {videos!r}: it holds no frames. Leave it out for a prompt without videos.")
    sizes = {_frame_size(frame) for frame in videos}
    if None not in sizes and len(sizes) > 1:
        raise ValueError(f"`{place}` has frames of different sizes, but must have frames of one: {sizes}.")
    for number, part in enumerate(videos):
        _check_frames(part, f"{place}[{number}]")


def _holds_frames(videos: Any) -> bool:
    return any(map(_holds_frames, videos)) if isinstance(videos, (list, tuple)) else True


def _frame_size(frame: Any) -> tuple[int, ...] | None:
    """The size of a picture; `None` for anything else."""
    if isinstance(size := getattr(frame, "size", None), tuple):  # PIL
        return size
    return tuple(frame.shape) if getattr(frame, "ndim", 0) == 3 else None
