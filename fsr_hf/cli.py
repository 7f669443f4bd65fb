"""The command line, `fsr-hf`."""

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer


__all__ = ["app"]

_FAMILIES = """\b
Families:
  family       checkpoint, for example           default     takes
  LLaVA-1.5    llava-hf/llava-1.5-7b-hf          128 tokens  images
  LLaVA-NeXT   llava-hf/llava-v1.6-vicuna-7b-hf  1/9         images
  Qwen2.5-VL   Qwen/Qwen2.5-VL-7B-Instruct       1/2         images, videos
  Qwen3-VL     Qwen/Qwen3-VL-8B-Instruct         1/2         images, videos
  LLaVA-Video  lmms-lab/LLaVA-Video-7B-Qwen2     1/5         images, videos
\b
The default is what is kept of each image or video. In LLaVA-1.5 and LLaVA-NeXT
the question counts, given --text-encoder openai/clip-vit-large-patch14-336."""

app = typer.Typer(
    help="Focus-Scan-Refine visual-token pruning for vision-language models.",
    epilog=_FAMILIES,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # it would take "[...]" in a text for markup
    pretty_exceptions_enable=False,
)


@app.command(epilog=_FAMILIES)
def export(
    source: Annotated[str, typer.Argument(help="Stock or FSR checkpoint: a folder or a Hub id, org/name[@revision].")],
    output_dir: Annotated[Path, typer.Argument(help="Folder to make.")],
    text_encoder: Annotated[
        str | None,
        typer.Option(
            help="LLaVA-1.5 and LLaVA-NeXT: CLIP checkpoint of the vision tower, a folder or a Hub id. Without it the "
            "question plays no part in the pruning."
        ),
    ] = None,
    num_visual_tokens: Annotated[
        int | None, typer.Option(help="Visual tokens kept of each image or video. Default: the family's.")
    ] = None,
    retention_ratio: Annotated[
        float | None, typer.Option(help="Kept share of the visual tokens, in (0, 1], in place of a number.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace what is in OUTPUT_DIR; what no export made, or was edited, stays in OUTPUT_DIR.replaced.",
        ),
    ] = False,
    link: Annotated[bool, typer.Option("--link/--copy", help="Hard-link the weights, or copy them.")] = False,
    base_model: Annotated[
        str | None,
        typer.Option(help="Hub id of SOURCE, where that is a folder: the card and the licence depend on it."),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check that the result loads.")] = True,
) -> None:
    """
    Make a Hub folder with FSR out of a checkpoint.

    The weights stay as they are and are never loaded: a 13B checkpoint needs no more memory than a small one. The
    folder loads with trust_remote_code=True wherever transformers is installed, without this package. Until it is
    complete it is called OUTPUT_DIR.incomplete. Of SOURCE only files of known names are copied, and links out of it
    are refused.

    \b
    Examples:
      fsr-hf export llava-hf/llava-1.5-7b-hf llava-1.5-7b-fsr --text-encoder openai/clip-vit-large-patch14-336
      fsr-hf export ./qwen2.5-vl-7b qwen-fsr --base-model Qwen/Qwen2.5-VL-7B-Instruct --retention-ratio 0.4 --link
    """
    from . import export as export_checkpoint

    budget = {"num_visual_tokens": num_visual_tokens, "retention_ratio": retention_ratio}
    try:
        export_checkpoint(
            source,
            output_dir,
            text_encoder=text_encoder,
            fsr_config={name: value for name, value in budget.items() if value is not None},
            base_model=base_model,
            force=force,
            link=link,
            verify=verify,
        )
    except _hub_errors() as error:
        _fail(error)
    typer.echo(f'{output_dir} is ready: AutoModel.from_pretrained("{output_dir}", trust_remote_code=True)')


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Hub folder with FSR, made by `fsr-hf export`.")],
    repo_id: Annotated[str, typer.Argument(help="Repository, org/name. It is made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    tag: Annotated[str | None, typer.Option(help="Tag of the commit, such as v0.1.0.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.  [default: main]")] = None,
) -> None:
    """
    Upload a Hub folder with FSR in one commit, and tag it.

    Log in with `hf auth login` first, or set HF_TOKEN. A folder that differs from its manifest, or would not load, is
    refused. What the repository has and FOLDER has not, of code, weights and settings, is deleted in the same commit.
    HF_ENDPOINT names another server than huggingface.co; set HF_HUB_DISABLE_XET=1 if it has no Xet storage.

    \b
    Example:
      fsr-hf push ./llava-1.5-7b-fsr org/llava-1.5-7b-fsr --tag v0.1.0
    """
    from .hub.push import push as push_folder

    try:
        pushed = push_folder(folder, repo_id, private=private, tag=tag, revision=revision)
    except _hub_errors() as error:
        _fail(error)
    typer.echo(pushed.url)
    typer.echo(f'AutoModel.from_pretrained("{repo_id}", revision="{pushed.revision}", trust_remote_code=True)')


@app.command()
def verify(
    source: Annotated[str, typer.Argument(help="Hub folder with FSR, or a Hub id, org/name[@revision].")],
    manifest_of: Annotated[
        str | None,
        typer.Option(help="Compare with the manifest of this folder or Hub id, in place of the one in SOURCE."),
    ] = None,
    run: Annotated[
        bool,
        typer.Option(
            "--run", help="If nothing differs, run its code: pruned decoding against a loop, on a tiny twin."
        ),
    ] = False,
) -> None:
    """
    Check a Hub folder against its manifest of file hashes, and print what differs.

    Nothing of it is run, but with --run. Its code has to be that of this version of fsr-hf, and nothing in it may send
    a loader elsewhere. Of a repository on the Hub the weights are not downloaded: the hashes that the server has of
    them are compared. Whoever can change the weights can also rewrite the manifest: a copy of it from elsewhere, or a
    commit that somebody signed, tells. Exit code 1 if anything differs.

    With --run, the code in SOURCE then builds a tiny model of its family with random weights and prunes prompts with
    it: a check that it is right under the transformers that is installed, which may be newer than the folder.

    \b
    Example:
      fsr-hf verify ./llava-1.5-7b-fsr --manifest-of org/llava-1.5-7b-fsr@v0.1.0
    """
    from transformers import __version__ as transformers_version

    from .hub.verify import verify as verify_folder

    try:
        differences = verify_folder(source, manifest_of=manifest_of, run=run)
    except _hub_errors() as error:
        _fail(error)
    for difference in differences:
        typer.echo(_printable(difference))
    if differences:
        raise typer.Exit(1)
    typer.echo(f"{source} is what {'its manifest' if manifest_of is None else f'the manifest of {manifest_of}'} says.")
    if run:
        typer.echo(f"Its code prunes rightly under transformers {transformers_version}.")


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Argument(help="FSR checkpoint: a folder or a Hub id.  [default: the small LLaVA of this package]"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...  [default: a GPU if there is one]")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=2, help="The most that an answer has.  [default: 8, with --web 128]")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each question is asked; times are medians.")] = 3,
    web: Annotated[bool, typer.Option("--web", help="Open a chat about pictures in the browser.")] = False,
    host: Annotated[str, typer.Option(help="With --web: address to listen on; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="With --web: port to listen on.")] = 7860,
    browser: Annotated[bool, typer.Option(help="With --web: open the page.")] = True,
) -> None:
    """
    Ask about drawn pictures, unpruned and pruned, and compare answers, tokens, memory and times.

    The model is loaded by the Auto classes with trust_remote_code=True, in a process that cannot import this package:
    the code in MODEL is what runs. Without MODEL, a LLaVA of seven million parameters answers that was trained on
    questions about such pictures, and a larger one of random weights shows what is saved. Nothing is downloaded, and
    it takes less than a minute. `fsr-hf bench` measures more.

    With --web, a page opens on which to ask about your own pictures, with a slider for the budget: both answers side
    by side, what the language model saw, and the kept tokens. It runs the package's code, none of MODEL's.

    \b
    Examples:
      fsr-hf demo
      fsr-hf demo --web
      fsr-hf demo ./llava-1.5-7b-fsr --device cuda --web --port 8000
    """
    if not web:
        from .demo.run import run_demo

        try:
            run_demo(model, device=device, max_new_tokens=max_new_tokens or 8, repeats=repeats, echo=typer.echo)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            _fail(error)
        return
    try:
        from .demo.web import build_app, check_port, launch
    except ImportError as error:
        _fail(f"--web needs gradio: pip install 'fsr-hf[web]' ({error})")
    from .demo.shapes_vqa import shapes_vqa_folder

    try:
        check_port(host, port)
        typer.echo("Loading the model ...")
        chat = build_app(model or str(shapes_vqa_folder()), device, max_new_tokens or 128)
        typer.echo(f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}  Ctrl+C ends it.")
        launch(chat, server_name=host, server_port=port, inbrowser=browser, quiet=True)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        _fail(error)


@app.command()
def space(
    output_dir: Annotated[Path, typer.Argument(help="Folder to make.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="FSR checkpoint: a folder, which becomes a part of the Space, or a Hub id, which the Space loads.  "
            "[default: the small LLaVA of this package]"
        ),
    ] = None,
) -> None:
    """
    Make the folder of a Hugging Face Space out of the chat that `fsr-hf demo --web` opens.

    It holds the app, this package, and the model or its name, and pins the versions that are installed here. Upload it
    as it is. A public repository of a large model is better named by its id than copied.

    \b
    Examples:
      fsr-hf space ./fsr-space
      fsr-hf space ./fsr-space --model org/llava-1.5-7b-fsr
      hf upload org/fsr ./fsr-space --type space
    """
    from .hub.space import write_space

    try:
        write_space(output_dir, model)
    except _hub_errors() as error:
        _fail(error)
    typer.echo(f"{output_dir} is ready: hf upload org/name {output_dir} --type space")


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="FSR checkpoint: a folder or a Hub id.")],
    image: Annotated[Path, typer.Argument(help="Image file, or a video for a model that takes videos.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write: .png, .jpg or .webp.")] = Path(
        "explain.png"
    ),
    num_visual_tokens: Annotated[
        int | None, typer.Option(help="Visual tokens to keep.  [default: the checkpoint's budget]")
    ] = None,
    retention_ratio: Annotated[
        float | None, typer.Option(help="Share of the visual tokens to keep, in (0, 1], in place of a number.")
    ] = None,
    num_frames: Annotated[int, typer.Option(min=1, help="Frames to take of a video, evenly.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 64,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...  [default: a GPU if there is one]")] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run the code in MODEL. Only a family that this version of fsr-hf does not have needs it.",
        ),
    ] = False,
) -> None:
    """
    Draw which visual tokens of an image or a video were kept for a question.

    Focus tokens are orange, Scan anchors blue. What was dropped is dark; a line goes from each merged token to the
    anchor that absorbed it. The image is shown as the vision tower saw it, cropped by the processor; of a picture in
    tiles, the overview and the tiles joined; of a video, its frames.

    \b
    Examples:
      fsr-hf explain ./llava-1.5-7b-fsr cup.jpg "What is in the cup?" -o cup.png
      fsr-hf explain org/llava-1.5-7b-fsr cup.jpg "What is in the cup?" --num-visual-tokens 64
      fsr-hf explain ./llava-video-7b-fsr clip.mp4 "What happens?" --num-frames 8
    """
    if not image.is_file():
        _fail(f"there is no file {image}", code=2)
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        _fail(f"cannot write {output}: choose a name that ends in .png, .jpg or .webp", code=2)
    if not output.absolute().parent.is_dir():
        _fail(f"cannot write {output}: there is no folder {output.absolute().parent}", code=2)

    from .explain import explain as explain_answer
    from .explain import load_fsr_model, load_visual

    try:
        visual = load_visual(image)
    except OSError as error:
        _fail(error, code=2)
    budget = {"num_visual_tokens": num_visual_tokens, "retention_ratio": retention_ratio}
    try:
        loaded_model, processor = load_fsr_model(model, device, trust_remote_code or None)
        explanation = explain_answer(
            loaded_model,
            processor,
            visual,
            question,
            max_new_tokens=max_new_tokens,
            num_frames=num_frames,
            **budget,
        )
        explanation.draw().image.save(output, quality=90)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        _fail(error)
    counts = explanation.counts
    typer.echo(explanation.answer)
    typer.echo(
        f"{output}: {counts['kept']} of {counts['tokens']} visual tokens kept, {counts['focus']} Focus and "
        f"{counts['scan']} Scan; {counts['merged']} merged."
    )


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="FSR checkpoint: a folder or a Hub id.  [default: a small LLaVA of random weights]"),
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Visual tokens to keep of the image or video (64), or shares (0.25), with commas.")
    ] = "0.5,0.2,0.1",
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Rows of the prompt. May be given again.  [default: 1]")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image file, or a video.  [default: noise]")] = None,
    question: Annotated[str, typer.Option(help="What to ask.")] = "What is in it?",
    image_size: Annotated[str, typer.Option(help="Width and height of the noise.")] = "672x672",
    num_frames: Annotated[
        int | None,
        typer.Option(min=1, help="Take a video of so many frames.  [default: 32 for LLaVA-Video, else a picture]"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...  [default: a GPU if there is one]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.  [default: the checkpoint's]")
    ] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="eager, sdpa, flash_attention_2, ...  [default: the model's]")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each method runs; times are medians.")] = 5,
    new_tokens: Annotated[int, typer.Option(min=0, help="Tokens to decode after each prompt.")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write all numbers to.")] = None,
) -> None:
    """
    Measure what pruning saves and costs: FLOPs, prefill, decoding, KV cache, memory, and the stages of FSR.

    Unpruned, pruned by FSR and pruned at random run in turn. Random tokens need no scores, so that is the least that
    any pruning costs. Without MODEL nothing is downloaded, and it takes about a minute on two cores.

    \b
    Examples:
      fsr-hf bench
      fsr-hf bench ./llava-1.5-7b-fsr --budgets 192,128,64 --batch-size 1 --batch-size 16 --dtype bfloat16
      fsr-hf bench ./qwen2.5-vl-7b-fsr --image-size 2048x2048 --budgets 0.5,0.1 --json qwen.json
      fsr-hf bench ./llava-video-7b-fsr --image clip.mp4 --num-frames 64
    """
    from .bench import parse_budgets, parse_size, run_bench

    if image is not None and not image.is_file():
        _fail(f"there is no file {image}", code=2)
    try:
        numbers, size = parse_budgets(budgets), parse_size(image_size)
    except ValueError as error:
        _fail(error, code=2)
    try:
        run_bench(
            model,
            budgets=numbers,
            batch_sizes=batch_size or [1],
            image=image,
            question=question,
            image_size=size,
            num_frames=num_frames,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            repeats=repeats,
            new_tokens=new_tokens,
            json_file=json_file,
            echo=typer.echo,
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        _fail(error)


@app.command("eval")
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="FSR checkpoint: a folder or a Hub id.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Questions: a file of JSON lines, a parquet file, or a folder with a dataset."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="In place of --data: tasks of lmms-eval, with commas.")] = None,
    budgets: Annotated[
        str, typer.Option(help="Visual tokens to keep of each image or video (64), or shares (0.25), with commas.")
    ] = "0.5,0.2,0.1",
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 1,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for what is found.")] = Path("fsr-eval"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ...  [default: a GPU if there is one]")] = None,
    metric: Annotated[str, typer.Option(help="--data: score of an answer: exact, contains or anls.")] = "exact",
    keep: Annotated[float, typer.Option(help="--data: share of the unpruned score that a budget has to keep.")] = 0.98,
    instruction: Annotated[
        str | None,
        typer.Option(help="--data: follows each question, such as 'Answer in a single word.'  [default: nothing]"),
    ] = None,
    split: Annotated[str | None, typer.Option(help="--data: part of a dataset, such as validation.")] = None,
    num_frames: Annotated[int, typer.Option(min=1, help="--data: frames to take of a video, evenly.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="--data: length of an answer.")] = 32,
    dtype: Annotated[
        str | None, typer.Option(help="--data: float32, bfloat16 or float16.  [default: the checkpoint's]")
    ] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="--data: eager, sdpa, flash_attention_2, ...  [default: the model's]")
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="--data: run the code in MODEL. Only a family that this version of fsr-hf does not have needs it.",
        ),
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="--tasks: questions of each.  [default: all]")] = None,
    model_args: Annotated[
        str | None, typer.Option(help="--tasks: more arguments of lmms-eval's model, such as max_frames_num=32.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="--tasks: folder with tasks of your own.")] = None,
    num_processes: Annotated[int, typer.Option(min=1, help="--tasks: processes, each on a GPU of its own.")] = 1,
) -> None:
    """
    Find the budget that is right for a model and for questions of your own, or run benchmarks.

    --data: a line has question, answer (or answers, a list), and image, images (a list) or video, the names of files
    relative to the data. All are asked unpruned and at every budget. The result: scores, 95 % intervals of what
    pruning changes, tokens, times, a plot, and the smallest budget that keeps --keep of the unpruned score with 95 %
    confidence. `accelerate launch -m fsr_hf eval` shares the questions among several processes.

    --tasks: lmms-eval runs each task unpruned and at every budget; the paper's numbers stand beside the result where
    it has the model, the task and the budget.

    A run that was interrupted goes on when the command is given again.

    \b
    Examples:
      fsr-hf eval ./llava-1.5-7b-fsr --data questions.jsonl --budgets 192,128,64
      fsr-hf eval ./qwen2.5-vl-7b-fsr --data documents.jsonl --budgets 0.5,0.25 --metric anls --keep 0.95
      accelerate launch -m fsr_hf eval ./llava-1.5-7b-fsr --data questions.jsonl --budgets 192,128,64
      fsr-hf eval ./llava-1.5-7b-fsr --tasks gqa,pope --budgets 192,128,64
    """
    from .bench import parse_budgets

    if (data is None) == (tasks is None):
        _fail("give either --data or --tasks", code=2)
    of_data = ("metric", "keep", "instruction", "split", "num_frames", "max_new_tokens", "dtype")
    of_data += ("attn_implementation", "trust_remote_code")
    others = of_data if data is None else ("limit", "model_args", "include_path", "num_processes")
    for name in others:
        if context.get_parameter_source(name).name == "COMMANDLINE":  # type: ignore[union-attr]
            _fail(
                f"--{name.replace('_', '-')} goes with --{'data' if data is None else 'tasks'}: leave it out", code=2
            )
    try:
        numbers = parse_budgets(budgets)
    except ValueError as error:
        _fail(error, code=2)
    shared: dict[str, Any] = {
        "budgets": numbers,
        "batch_size": batch_size,
        "output": output,
        "device": device,
        "echo": typer.echo,
    }
    try:
        if data is not None:
            from .evaluation.evaluate import run_eval

            run_eval(
                model,
                data,
                metric=metric,
                keep=keep,
                instruction=instruction,
                split=split,
                num_frames=num_frames,
                max_new_tokens=max_new_tokens,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code or None,
                **shared,
            )
        else:
            from .evaluation.lmms_eval_tasks import run_tasks

            run_tasks(
                model,
                [task.strip() for task in str(tasks).split(",")],
                limit=limit,
                model_args=model_args,
                include_path=include_path,
                num_processes=num_processes,
                **shared,
            )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        _fail(error)


def _hub_errors() -> tuple[type[Exception], ...]:
    """What ends a command that talks to the Hub; a lost connection is an error of the client's HTTP library."""
    from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError

    return (OSError, RuntimeError, ValueError, StrictDataclassError, *HfHubHTTPError.__bases__)


def _fail(error: Exception | str, code: int = 1) -> NoReturn:
    """Ends the command with the error in one line: exit code 2 for arguments that cannot be right, else 1."""
    typer.echo(f"fsr-hf: {_printable(' '.join(str(error).split()))}", err=True)
    raise typer.Exit(code)


def _printable(text: str) -> str:
    """`text` with escapes for what is no letter: the name of a file may hold a new line, or codes for the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
