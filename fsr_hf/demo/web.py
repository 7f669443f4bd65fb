"""
The web demo: a chat about a picture, with all visual tokens beside those that FSR keeps. `fsr-hf demo --web` opens it,
and `fsr-hf space` writes a Space of it.
"""

import socket
from typing import Any

import gradio as gr
from PIL import Image

from ..explain import explain_output, load_fsr_model
from .compare import generate
from .shapes_vqa import example_questions


__all__ = ["build_app", "check_port", "launch"]

_UNPRUNED, _PRUNED = "All visual tokens", "FSR"
_THEME = gr.themes.Default(
    primary_hue="orange",
    secondary_hue="blue",
    neutral_hue="slate",
    font=("system-ui", "sans-serif"),  # a font of its own would be fetched from elsewhere
    font_mono=("ui-monospace", "monospace"),
)
_CSS = """
.gradio-container {max-width: 1320px !important; margin: auto}
.fsr-title h3 {font-size: 1.02em; margin: 8px 0 0}
#numbers table {width: 100%; border-collapse: collapse; border: 0; font-variant-numeric: tabular-nums}
#numbers th, #numbers td {padding: 9px 6px; text-align: right; border: 0; font-weight: 400; white-space: nowrap}
#numbers th {text-align: left; white-space: normal}
#numbers thead, #numbers thead tr {border: 0}
#numbers thead td {font-weight: 600; vertical-align: bottom}
#numbers tbody tr {border: 0; border-top: 1px solid var(--border-color-primary)}
#numbers td:last-child {font-weight: 600; color: var(--primary-600)}
#kept img {max-height: 640px; object-fit: contain}
footer {display: none !important}
"""
# Below so many weights, what is around the language model takes most of the time.
_SMALL = 50e6


class Chat:
    """
    A model, and what it is asked.

    Args:
        model, processor:
            From [`load_fsr_model`] or the Auto classes.
        max_new_tokens (`int`):
            The most that an answer has.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        # In LLaVA-1.5 every picture has as many visual tokens; in other families they follow from its size.
        self.is_share = model.config.model_type != "fsr_llava"
        self.max_budget: int = 100 if self.is_share else model.config.image_seq_length

    @property
    def default_budget(self) -> int:
        """Of the checkpoint: visual tokens, or percent of them."""
        budget = self.model.config.fsr_config
        if self.is_share and budget.retention_ratio is None:
            return 50
        return max(1, round(100 * budget.retention_ratio)) if self.is_share else budget.budget(self.max_budget)

    def answer(
        self, image: Image.Image, turns: list[tuple[str, str]], question: str, budget: int | None
    ) -> tuple[str, dict[str, Any], Image.Image | None]:
        """
        The answer to a question after other ones, what [`generate`] measured, and the picture of the kept tokens.

        The whole conversation is run again, so that the picture is pruned by this question and this budget; `turns`
        are the questions before, with this side's answers. `budget` is as [`default_budget`]; `None` prunes nothing.
        """
        messages: list[dict[str, Any]] = []
        for asked, answered in turns:
            messages += [_message("user", asked), _message("assistant", answered)]
        messages.append(_message("user", question))
        messages[0]["content"].insert(0, {"type": "image", "image": image})
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device, self.model.dtype)
        options: dict[str, Any] = {"fsr_enabled": False}
        if budget is not None:
            options = {"retention_ratio": budget / 100} if self.is_share else {"num_visual_tokens": budget}
            options["output_visual_selection"] = True
        outputs, measured = generate(self.model, inputs, max_new_tokens=self.max_new_tokens, **options)
        if budget is not None:
            explanation = explain_output(self.model, self.processor, inputs, outputs, question)
            return explanation.answer, measured, explanation.draw().image
        answer = self.processor.decode(outputs.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer.strip(), measured, None


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def build_app(model: str, device: str | None = None, max_new_tokens: int = 128) -> gr.Blocks:
    """
    Load a model and build the app around it.

    Args:
        model (`str`):
            FSR checkpoint: a folder or a Hub id, of a family that this package has.
        device (`str`, *optional*):
            By default a GPU if there is one.
        max_new_tokens (`int`, *optional*, defaults to 128):
            The most that an answer has.

    Raises:
        `OSError`: if there is no such checkpoint.
        `ValueError`: for a checkpoint without FSR.
    """
    loaded = load_fsr_model(model, device)
    examples = example_questions()
    warm_up = Chat(*loaded, max_new_tokens=2)  # the first calls of a process are slow, and times are shown
    for budget in (None, warm_up.default_budget):
        warm_up.answer(Image.open(examples[0].image).convert("RGB"), [], examples[0].question, budget)
    chat = Chat(*loaded, max_new_tokens=max_new_tokens)

    def ask(image, question, budget, session):
        """Answer a question twice, after what was said about the same picture."""
        if image is None:
            raise gr.Error("Choose a picture first.", title="No picture")
        if not question.strip():
            raise gr.Error("Write a question first.", title="No question")
        picture = hash((image.size, image.tobytes()))
        turns = session["turns"] if session["picture"] == picture else []
        yield _show(turns, question), _show(turns, question), gr.skip(), gr.skip(), "", gr.skip()
        try:
            unpruned, before, _ = chat.answer(image, _side(turns, 1), question, None)
            yield _show([*turns, (question, unpruned, "")], side=1), *[gr.skip()] * 5
            pruned, after, kept = chat.answer(image, _side(turns, 2), question, budget)
        except (RuntimeError, ValueError) as error:
            raise gr.Error(str(error)) from error
        turns = [*turns, (question, unpruned, pruned)]
        session = {"picture": picture, "turns": turns, "unpruned": before}
        yield _show(turns, side=1), _show(turns, side=2), _numbers(before, after), kept, "", session

    def revise(image, budget, session):
        """Answer the last question again, pruned to another budget."""
        if not session["turns"]:
            return [gr.skip()] * 4
        *turns, (question, unpruned, _) = session["turns"]
        pruned, after, kept = chat.answer(image, _side(turns, 2), question, budget)
        session = {**session, "turns": [*turns, (question, unpruned, pruned)]}
        return _show(session["turns"], side=2), _numbers(session["unpruned"], after), kept, session

    def reset():
        return [], [], _numbers(), None, _NEW_SESSION

    name, size = type(loaded[0]).__name__, sum(parameter.numel() for parameter in loaded[0].parameters())
    about = f"`{name}`, {size / 1e6:,.0f} M weights in {str(chat.model.dtype)[6:]}, on {chat.model.device}."
    if size < _SMALL:
        about += (
            " A model of this size knows drawn pictures such as the examples, and is too small for pruning to save "
            "time: what it saves are tokens and memory."
        )
    with gr.Blocks(title="Focus-Scan-Refine", analytics_enabled=False, fill_width=True) as app:
        session = gr.State(_NEW_SESSION)
        gr.Markdown(
            "# Focus-Scan-Refine\nAsk about a picture. The same model answers twice: with all of its visual tokens, "
            f"and with the few that FSR keeps for your question. {about}"
        )
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                _title("Picture")
                image = gr.Image(type="pil", show_label=False, sources=["upload", "clipboard"], height=300)
                slider = gr.Slider(
                    1,
                    chat.max_budget,
                    value=chat.default_budget,
                    step=1,
                    label=f"Visual tokens that FSR keeps{', in percent' if chat.is_share else ''}",
                    elem_id="budget",
                )
            with gr.Column(scale=8, min_width=480):
                with gr.Row():
                    chats = []
                    for name, elem_id in ((_UNPRUNED, "unpruned"), (_PRUNED, "pruned")):
                        with gr.Column(min_width=220):
                            _title(name)
                            chats.append(gr.Chatbot(show_label=False, elem_id=elem_id, height=300, buttons=[]))
                with gr.Row():
                    question = gr.Textbox(
                        show_label=False,
                        placeholder="Ask about the picture",
                        scale=8,
                        elem_id="question",
                        container=False,
                    )
                    ask_button = gr.Button("Ask", variant="primary", scale=1, min_width=90)
                    clear_button = gr.Button("Clear", scale=1, min_width=90)
                gr.Examples(
                    [[str(example.image), example.question] for example in examples],
                    [image, question],
                    label="Or one of these, about drawn pictures",
                    example_labels=[example.question for example in examples],
                    cache_examples=False,
                )
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                _title("Numbers")
                numbers = gr.HTML(_numbers(), elem_id="numbers")
            with gr.Column(scale=8, min_width=480):
                _title("Kept tokens")
                kept = gr.Image(
                    show_label=False, interactive=False, elem_id="kept", format="png", buttons=["download"]
                )
        shown = [*chats, numbers, kept]
        one_at_a_time: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        gr.on(
            [ask_button.click, question.submit],
            ask,
            [image, question, slider, session],
            [*shown, question, session],
            api_name="ask",
            **one_at_a_time,
        )
        slider.release(revise, [image, slider, session], [*shown[1:], session], api_name="revise", **one_at_a_time)
        gr.on(
            [clear_button.click, image.change, *(shown_chat.clear for shown_chat in chats)],
            reset,
            None,
            [*shown, session],
            api_name="reset",
        )
    return app


def _title(text: str) -> None:
    gr.Markdown(f"### {text}", elem_classes="fsr-title")


_NEW_SESSION: dict[str, Any] = {"picture": None, "turns": [], "unpruned": None}


def _side(turns: list[tuple[str, str, str]], side: int) -> list[tuple[str, str]]:
    return [(turn[0], turn[side]) for turn in turns]


def _show(turns: list[tuple[str, str, str]], question: str | None = None, side: int = 1) -> list[dict[str, str]]:
    """The messages of one side, and a question that has no answer yet."""
    messages = []
    for asked, answered in _side(turns, side):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered or "(no answer)"}]
    return messages if question is None else [*messages, {"role": "user", "content": question}]


# Rows of the table: heading, what `generate` measured, how it is written.
_ROWS = (
    ("Visual tokens", "visual_tokens", "{:,.0f}".format),
    ("Tokens seen by the language model", "length", "{:,.0f}".format),
    ("KV cache", "cache_bytes", lambda value: f"{value / 1e6:,.2f} MB"),
    ("Time to first token", "prefill", lambda value: f"{value * 1e3:,.0f} ms"),
    ("Time in all", "seconds", lambda value: f"{value * 1e3:,.0f} ms"),
)


def _numbers(unpruned: dict[str, Any] | None = None, pruned: dict[str, Any] | None = None) -> str:
    """The table of what was measured, of dashes before anything was."""
    rows = []
    for heading, field, write in _ROWS:
        cells = ["–", "–", ""]
        if unpruned is not None and pruned is not None:
            ratio = unpruned[field] / pruned[field]
            cells = [write(unpruned[field]), write(pruned[field]), f"{ratio:.1f} ×"]
        rows.append(f"<tr><th>{heading}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = f"<thead><tr><th></th><td>All</td><td>{_PRUNED}</td><td></td></tr></thead>"
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def check_port(host: str, port: int) -> None:
    """
    Raises:
        `OSError`: if nothing can listen there.
    """
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise OSError(
            f"cannot listen on port {port} of {host}: {error.strerror}. Choose another with --port."
        ) from error


def launch(app: gr.Blocks, **options: Any) -> None:
    """Serve an app from [`build_app`]; `options` are further arguments of gradio's `launch`."""
    app.launch(theme=_THEME, css=_CSS, ssr_mode=False, show_error=True, **options)
