"""The query: the user's words in chunks of CLIP's context length, as the processors of all families emit them."""

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import ContextVar
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import BatchFeature, CLIPTokenizer


__all__ = ["QueryProcessorMixin", "TurnMarkers", "check_query_tokenizer", "find_turn_markers", "last_user_words"]

# `apply_chat_template` knows the messages, the `__call__` that it ends in does not. (Its `processor_kwargs` are no way
# through: transformers 5.17 drops them as soon as a processor argument stands beside them, as pipelines do it.)
_chat_queries: ContextVar[Callable[[], list[str]] | None] = ContextVar("_chat_queries", default=None)

_TENSOR_TYPES = {"torch": "pt", "numpy": "np", "mlx": "mlx"}


class TurnMarkers(NamedTuple):
    """
    What a chat template writes around the words of a user.

    Args:
        user (`str`):
            The header of a user's turn, such as `USER:`, `[INST]` or `<|im_start|>user`.
        end (`tuple[str, ...]`):
            What may follow the user's words: the end of the turn, the header of the answer.
        system_end (`str`):
            What ends a system prompt that the template writes inside the user's turn, such as `<</SYS>>`, else `""`.
        answer_end (`str`):
            What ends an answer, such as `</s>`, else `""`.
    """

    user: str
    end: tuple[str, ...]
    system_end: str
    answer_end: str


def find_turn_markers(tokenizer: Any, chat_template: str) -> TurnMarkers | None:
    """
    Learn the markers of a chat template by rendering it around words that nobody writes.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]):
            The language model's tokenizer: it renders, and knows the special tokens that a template may use.
        chat_template (`str`):
            The template.

    Returns:
        [`TurnMarkers`], or `None` where the template cannot render a question, an answer and a second question.
    """
    question, answer, follow_up, system = "fsrquestion", "fsranswer", "fsrfollowup", "fsrsystem"

    def render(turns: list[tuple[str, str]], as_list: bool) -> str:
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if as_list else text} for role, text in turns
        ]
        with suppress(Exception):  # a template raises whatever it likes on a role or a content that it does not know
            rendered = tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False)
            if all(rendered.count(text) == 1 for _, text in turns):
                return rendered
        return ""

    talk = [("user", question), ("assistant", answer), ("user", follow_up)]
    for as_list in (False, True):
        first, exchange, whole = (render(talk[:length], as_list) for length in (1, 2, 3))
        if first and exchange and whole:
            break
    else:
        return None

    head, _, user_end = first.partition(question)
    to_answer = whole.partition(question)[2].partition(answer)[0]
    answer_end = exchange.partition(answer)[2]
    to_follow_up = whole.partition(answer)[2].partition(follow_up)[0]

    # "</s>USER: " follows an answer, and "</s>" alone ends it: "USER:" opens the turn. It also opens the first one,
    # where a template may write its own system prompt before it.
    header = to_follow_up.removeprefix(answer_end).strip()
    for token in (tokenizer.eos_token, tokenizer.bos_token):
        header = header.removeprefix(token or "").strip()
    head = head.rstrip()
    user = next(header[start:] for start in range(len(header) + 1) if head.endswith(header[start:])).strip()
    user = user or to_follow_up.strip()

    user_end = user_end if to_answer.startswith(user_end) else ""
    end = tuple(marker for marker in (user_end.strip(), to_answer.removeprefix(user_end).strip()) if marker)

    guided = render([("system", system), talk[0]], as_list)
    system_end = guided.partition(system)[2].partition(question)[0].strip()
    return TurnMarkers(user, end, "" if user in system_end else system_end, answer_end.strip())


def last_user_words(text: str, markers: TurnMarkers) -> str:
    """
    Cut the user's last turn out of a rendered prompt.

    A header counts only once the turn before it has ended, so a question may quote it. A text without any header is a
    question from its beginning on. The first marker of an end ends the question; where the text ends with all of them,
    as a prompt for an answer does, the last ones do, so that the question may quote them, too.
    """
    start = text.find(markers.user) if markers.user else -1
    start = 0 if start < 0 else start + len(markers.user)
    while True:
        stop = min((at for marker in markers.end if (at := text.find(marker, start)) >= 0), default=len(text))
        following = text.find(markers.user, stop) if markers.user else -1
        if following < 0:
            break
        start = following + len(markers.user)
    asked = text.rstrip()
    for marker in reversed(markers.end):
        if not asked.endswith(marker):
            break
        asked = asked.removesuffix(marker).rstrip()
    else:
        if not markers.answer_end or markers.answer_end not in text[stop : len(asked)]:
            stop = max(stop, len(asked))
    words = text[start:stop]
    return words.rpartition(markers.system_end)[2] if markers.system_end else words


def check_query_tokenizer(query_tokenizer: Any) -> CLIPTokenizer:
    """Return CLIP's tokenizer, refuse any other, and the one without words that transformers makes of no files."""
    if not isinstance(query_tokenizer, CLIPTokenizer):
        raise ValueError(
            "`query_tokenizer` must be a `CLIPTokenizer`, the one of the model's text tower, and is a "
            f"`{type(query_tokenizer).__name__}`. A saved processor keeps it in the subfolder `query_tokenizer`: save "
            "it there if it is missing. For a model without a text tower, use the stock processor of its family."
        )
    if len(query_tokenizer) <= len(set(query_tokenizer.all_special_ids)):
        raise ValueError(
            "`query_tokenizer` must be a `CLIPTokenizer` with a vocabulary, and has special tokens only: its files "
            "are missing from the subfolder `query_tokenizer` of the processor."
        )
    return query_tokenizer


def _check_names(names: Iterable[str]) -> None:
    """
    Reject misspelt names of `query`, which the stock processor ignores.

    Raises:
        ValueError: naming the argument.
    """
    for name in get_close_matches("query", names, n=1, cutoff=0.65):
        raise ValueError(f"`{name}` is no argument of the processor. Did you mean `query`?")


class QueryProcessorMixin:
    """
    Adds `query_input_ids` and `query_attention_mask` to what a stock processor returns.

    Comes before the stock class, whose `__init__` the subclass writes out with `query_tokenizer` as one more attribute
    after the stock ones. Both keys are `[batch_size, num_chunks * query_chunk_length]`. Each chunk holds up to
    `query_chunk_length - 2` tokens of the query between its own BOS and EOS, padded on the right. A row with fewer
    chunks than another, or with an empty query, ends in chunks of padding, whose mask is 0.

    The query of a row is, in this order: the `query` argument; in `apply_chat_template`, the text of the user's last
    message; else what `text` holds of the user's last turn, found by the chat template's own markers.
    """

    query_chunk_length = 77

    tokenizer: Any
    query_tokenizer: Any
    chat_template: str | dict[str, str] | None
    all_special_multimodal_tokens: list[str]
    image_token: str
    image_token_id: int
    _is_query_bound = False

    @classmethod
    def _load_tokenizer_from_pretrained(
        cls, sub_processor_type: str, pretrained_model_name_or_path: Any, subfolder: str = "", **kwargs: Any
    ) -> Any:
        # The stock method asks the subfolder for a model's config, which fails offline, and falls back on the folder.
        if sub_processor_type != "query_tokenizer":
            return super()._load_tokenizer_from_pretrained(  # type: ignore[misc]
                sub_processor_type, pretrained_model_name_or_path, subfolder=subfolder, **kwargs
            )
        subfolder = f"{subfolder}/query_tokenizer" if subfolder else "query_tokenizer"
        return CLIPTokenizer.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        query: str | list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        As the stock method, plus the query. A call without `text` has no rows, and so no query unless it is given.

        Args:
            query (`str` or `list[str]`, *optional*):
                What to look for in the images: one string for all rows, or a list with one string for each row.
        """
        _check_names(kwargs)
        if query is not None and self._is_query_bound:
            raise ValueError(f"`query` is {query!r}, but `bind_query` was called: the model reads it from the prompt.")
        # Callers that give both whether there are any or not.
        images = None if isinstance(images, (list, tuple)) and not images else images
        videos = None if isinstance(videos, (list, tuple)) and not videos else videos
        if videos is not None and not hasattr(self, "video_processor"):
            raise ValueError(
                f"`videos` are not supported: {type(self).__name__} takes images alone. Pass frames as images, or use "
                "a model for videos (FSRLlavaVideo, FSRQwen2_5_VL)."
            )
        rows = [text] if isinstance(text, str) else text
        queries = None
        if query is not None:
            queries = self._check_query(query, rows)
        elif (chat_queries := _chat_queries.get()) is not None:
            queries = chat_queries()
        inputs = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)  # type: ignore[misc]
        if self._is_query_bound:
            return inputs
        if queries is None and rows is not None:
            queries = self.queries_from_text(rows)
        if queries is not None:
            values = inputs["input_ids"] if "input_ids" in inputs else inputs["pixel_values"]
            tensor_type = _TENSOR_TYPES.get(type(values).__module__.partition(".")[0])
            inputs.update(BatchFeature(self.tokenize_queries(queries), tensor_type=tensor_type))
        return inputs

    def apply_chat_template(
        self, conversation: Any, *args: Any, query: str | list[str] | None = None, **kwargs: Any
    ) -> Any:
        """
        As the stock method; with `tokenize=True` and `return_dict=True` the result holds the query.

        Args:
            query (`str` or `list[str]`, *optional*):
                Takes the place of the text of the user's last message: one string for all conversations, or a list
                with one string for each.
        """
        _check_names(kwargs)
        if query is not None and self._is_query_bound:
            raise ValueError(f"`query` is {query!r}, but `bind_query` was called: the model reads it from the prompt.")
        if query is not None and not kwargs.get("tokenize"):
            raise ValueError(
                f"`query` is {query!r}, but without `tokenize=True` the result is a prompt, which holds no query: "
                "give it to the call of the processor that tokenizes the prompt."
            )
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = conversation if batched else [conversation]
        if query is not None:
            queries = partial(self._check_query, query, conversations)
        else:
            queries = partial(self.queries_from_conversations, conversations)
        token = _chat_queries.set(queries)
        try:
            return super().apply_chat_template(conversation, *args, **kwargs)  # type: ignore[misc]
        finally:
            _chat_queries.reset(token)

    @property
    def model_input_names(self) -> list[str]:
        """The stock names, then the two of the query."""
        names = dict.fromkeys(super().model_input_names)  # type: ignore[misc]
        return [*names, "query_input_ids", "query_attention_mask"]

    def queries_from_conversations(self, conversations: list[list[dict[str, Any]]]) -> list[str]:
        """Text of the user's last message in each conversation, its parts joined by a space; `""` without one."""
        queries = []
        for messages in conversations:
            content = (
                next((turn.get("content") for turn in reversed(messages) if turn.get("role") == "user"), None) or ""
            )
            if not isinstance(content, str):
                content = " ".join(part["text"] for part in content if part.get("type") == "text")
            queries.append(self._words(content))
        return queries

    def queries_from_text(self, texts: list[str]) -> list[str]:
        """Words of the user's last turn of each text, without placeholders, special tokens, system prompt, answer."""
        markers = self._turn_markers()
        return [self._words(last_user_words(text, markers) if markers else text) for text in texts]

    def bind_query(self, *models: Any) -> None:
        """
        Let models read the query from `input_ids` from now on, in place of this processor, which emits none any more.

        For trainers that drop `query_input_ids` on the way from the processor to the model, such as TRL's
        `GRPOTrainer`: so rollouts and training steps rank visual tokens by the same words. The query of a row is then
        the user's turn with the last image of the row, which nothing behind it, such as an answer, can change.

        Args:
            models ([`PreTrainedModel`], wrapped by PEFT or not, or `None`):
                For example `trainer.model, trainer.ref_model`. `None` is skipped.

        Raises:
            ValueError: if a model takes no query, or the chat template does not show where a user's turn ends.
        """
        if not getattr(self._turn_markers(), "end", ()):
            raise ValueError(
                "`bind_query` needs a `chat_template` that writes something behind a user's turn, such as "
                f'"ASSISTANT:": only so it can tell question and answer apart. It is {self.chat_template!r}.'
            )
        for model in models:
            readers = [] if model is None else [part for part in model.modules() if hasattr(part, "query_reader")]
            if model is not None and not readers:
                raise ValueError(
                    f"`bind_query` takes models of FSR, and `{type(model).__name__}` is none: it takes no query."
                )
            for part in readers:
                part.query_reader = self.read_queries
        self._is_query_bound = True

    def read_queries(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Make the query of each row from its ids: the words of the user's turn that has the row's last image.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`), attention_mask (same shape):
                Prompts, with answers or without.

        Returns:
            `query_input_ids` and `query_attention_mask`, `(batch, chunks * query_chunk_length)`. A row without an
            image has an empty query.

        Raises:
            ValueError: if the end of that turn is missing.
        """
        markers, queries = self._turn_markers() or TurnMarkers("", (), "", ""), []
        for number, (ids, mask) in enumerate(zip(input_ids, attention_mask)):
            ids = ids[mask.bool()]
            is_first = torch.ones_like(ids, dtype=torch.bool)
            is_first[1:] = (ids[1:] != self.image_token_id) | (ids[:-1] != self.image_token_id)
            text = self.tokenizer.decode(ids[is_first].tolist(), clean_up_tokenization_spaces=False)
            image = text.rfind(self.image_token)
            ends = [at + len(end) for end in markers.end if (at := text.find(end, image)) >= 0] if image >= 0 else [0]
            if not ends:
                raise ValueError(
                    f"Row {number} of `input_ids` does not show where the user's turn with the image ends: none of "
                    f"{markers.end} follows in {text[image:]!r}. Render prompts with the processor's chat template."
                )
            queries.append(self._words(last_user_words(text[: min(ends)], markers)))
        encoded = self.tokenize_queries(queries)
        return torch.tensor(encoded["query_input_ids"]), torch.tensor(encoded["query_attention_mask"])

    def _turn_markers(self) -> TurnMarkers | None:
        template = self.chat_template or self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return find_turn_markers(self.tokenizer, template) if template else None

    def tokenize_queries(self, queries: list[str]) -> dict[str, list[list[int]]]:
        """
        Cut queries into chunks of CLIP's context length; nothing is truncated.

        Returns:
            `dict[str, list[list[int]]]`: `query_input_ids` and `query_attention_mask`, one list of
            `num_chunks * query_chunk_length` numbers for each query.
        """
        tokenizer, length = self.query_tokenizer, self.query_chunk_length
        bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        encoded = tokenizer(queries, add_special_tokens=False, padding=False, truncation=False, verbose=False)
        ids, mask = [], []
        for tokens in encoded["input_ids"]:
            tokens = [token for token in tokens if token not in (bos, eos)]  # CLIP reads a chunk up to its first EOS
            row_ids: list[int] = []
            row_mask: list[int] = []
            for start in range(0, len(tokens), length - 2):
                chunk = [bos, *tokens[start : start + length - 2], eos]
                row_ids += chunk + [pad] * (length - len(chunk))
                row_mask += [1] * len(chunk) + [0] * (length - len(chunk))
            ids.append(row_ids)
            mask.append(row_mask)
        width = max([length, *map(len, ids)])
        return {
            "query_input_ids": [row + [pad] * (width - len(row)) for row in ids],
            "query_attention_mask": [row + [0] * (width - len(row)) for row in mask],
        }

    def _words(self, text: str) -> str:
        special = {*self.all_special_multimodal_tokens, *self.tokenizer.all_special_tokens}
        pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        return " ".join(re.sub(pattern, " ", text).split())

    @staticmethod
    def _check_query(query: Any, rows: list[Any] | None) -> list[str]:
        queries = [query] * (1 if rows is None else len(rows)) if isinstance(query, str) else query
        if not isinstance(queries, (list, tuple)) or not all(isinstance(words, str) for words in queries):
            raise ValueError(f"`query` must be a string, or a list with one string for each row, and is {query!r}.")
        if rows is not None and len(queries) != len(rows):
            raise ValueError(
                f"`query` must be a string, or a list with one string for each of the {len(rows)} rows, and has "
                f"{len(queries)}: {query!r}."
            )
        return list(queries)
