"""The command line, `fsr-hf`."""

from pathlib import Path
from typing import Annotated

import typer


__all__ = ["app"]

app = typer.Typer(
    help="Focus-Scan-Refine visual-token pruning for vision-language models.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # it would take "[...]" in a text for markup
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """Keeps `export` a command of its own while it is the only one."""


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="Stock or FSR checkpoint: a folder or a Hub id, org/name[@revision].")],
    output_dir: Annotated[Path, typer.Argument(help="Folder to make.")],
    text_encoder: Annotated[
        str | None,
        typer.Option(
            help="CLIP checkpoint of the vision tower, a folder or a Hub id (LLaVA-1.5: "
            "openai/clip-vit-large-patch14-336). Without it the question plays no part in the pruning."
        ),
    ] = None,
    num_visual_tokens: Annotated[
        int | None, typer.Option(help="Visual tokens kept of each image or video. Default: the family's.")
    ] = None,
    retention_ratio: Annotated[
        float | None, typer.Option(help="Kept share of the visual tokens, in (0, 1], in place of a number.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is in OUTPUT_DIR.")] = False,
    link: Annotated[bool, typer.Option("--link/--copy", help="Hard-link the weights, or copy them.")] = False,
) -> None:
    """
    Make a Hub folder with FSR out of a checkpoint.

    The weights stay as they are and are never loaded: a 13B checkpoint needs no more memory than a small one. The
    folder loads with trust_remote_code=True wherever transformers is installed, without this package.
    """
    from . import export as export_checkpoint

    budget = {"num_visual_tokens": num_visual_tokens, "retention_ratio": retention_ratio}
    try:
        export_checkpoint(
            source,
            output_dir,
            text_encoder=text_encoder,
            fsr_config={name: value for name, value in budget.items() if value is not None},
            force=force,
            link=link,
        )
    except (OSError, ValueError) as error:
        _fail(error)
    typer.echo(f'{output_dir} is ready: AutoModel.from_pretrained("{output_dir}", trust_remote_code=True)')


def _fail(error: Exception) -> None:
    """Ends the command with the error in one line, and exit code 1."""
    typer.echo(f"fsr-hf: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(1)
