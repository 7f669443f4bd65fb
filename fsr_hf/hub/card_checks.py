"""
Checks of model cards that need no network: `python -m fsr_hf.hub.card_checks [FOLDER ...]`.

Without a folder, every card that the package can write is rendered and checked; with folders, their `README.md`.
"""

import ast
import re
import sys
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from .cards import card_data, card_names, render_card


__all__ = ["check_card", "main"]

_REQUIRED = ("language", "library_name", "license", "pipeline_tag", "tags")
_ALLOWED = {
    "base_model_relation": ("adapter", "finetune", "merge", "quantized"),
    "library_name": ("transformers",),
    "pipeline_tag": ("image-text-to-text", "video-text-to-text"),
}
_REMOTE = ("AutoConfig", "AutoModel", "AutoProcessor")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]*)\)")
_LEFTOVER = re.compile(r"\{\{|\}\}|\{%|%\}|\bUndefined\b|\bNone\b|\bTODO\b|More Information Needed")
_MEASURED = re.compile(r"\d\.\d|\d ?%|^\|", flags=re.MULTILINE)  # what somebody must have measured


def check_card(content: str, folder: Path | None = None, *, is_complete: bool = True) -> list[str]:
    """
    What is wrong with a model card.

    Args:
        content (`str`): The text of the card.
        folder (`Path`, *optional*): Where it stands, for links to other files there.
        is_complete (`bool`, *optional*, defaults to `True`): Whether the licence and the language have to be known.

    Returns:
        `list[str]`: a line for each fault, none for a good card.
    """
    try:
        card = ModelCard(content)
    except (ValueError, yaml.YAMLError) as error:
        return [f"metadata: {error}"]
    prose = _FENCE.sub("", card.text)
    return [
        *_check_metadata(card, is_complete),
        *(f"not filled in: {found.group()!r}" for found in _LEFTOVER.finditer(prose)),
        *_check_code(card.text),
        *_check_links(prose, folder),
        *_check_sections(prose),
    ]


def _check_metadata(card: ModelCard, is_complete: bool) -> list[str]:
    metadata = card.data.to_dict()
    faults = []
    for key in _REQUIRED:
        if not metadata.get(key) and (is_complete or key not in ("language", "license")):
            faults.append(f"metadata: {key} is missing")
    licences = {licence["metadata"]["license"] for licence in card_data()["licences"].values()}
    for key, allowed in {**_ALLOWED, **({"license": licences} if is_complete else {})}.items():
        if key in metadata and metadata[key] not in allowed:
            faults.append(f"metadata: {key} is {metadata[key]!r}, not one of {', '.join(sorted(allowed))}")
    if ("base_model" in metadata) != ("base_model_relation" in metadata):
        faults.append("metadata: base_model and base_model_relation need each other")
    if metadata.get("license") == "other" and not {"license_name", "license_link"} <= metadata.keys():
        faults.append("metadata: license other needs license_name and license_link")
    languages = metadata.get("language", [])
    faults += [
        f"metadata: language {language!r} is no ISO 639-1 code"
        for language in ([languages] if isinstance(languages, str) else languages)
        if not re.fullmatch("[a-z]{2}", language)
    ]
    tags = metadata.get("tags", [])
    if "custom_code" not in tags or len(set(tags)) < len(tags):
        faults.append("metadata: tags need custom_code, and no tag twice")
    faults += [
        f"metadata: the result on {result.dataset_name} has no source"
        for result in card.data.get("eval_results") or []
        if not result.source_url
    ]
    return faults


def _check_code(text: str) -> list[str]:
    faults = []
    trusted = set()
    for language, source in _FENCE.findall(text):
        if language != "python":
            continue
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            faults.append(f"python: {error.msg} in {error.text!r}")
            continue
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            loader = ast.unparse(call.func).removesuffix(".from_pretrained")
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if loader not in (*_REMOTE, "pipeline"):
                continue
            if keywords.get("trust_remote_code") != "True":
                faults.append(f"python: `{loader}` without trust_remote_code=True")
            # A name stands for the repository, a text for a folder that the example has written.
            place = keywords.get("model") or ast.unparse(call.args[0])
            if place.isidentifier() and "revision" not in keywords:
                faults.append(f"python: `{loader}` pins no revision")
            trusted.add(loader)
    missing = {"AutoModel", "AutoProcessor"} - trusted
    return [*faults, *(f"python: no `{loader}.from_pretrained`" for loader in sorted(missing))]


def _check_links(prose: str, folder: Path | None) -> list[str]:
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"(?m)^#+ (.*)$", prose)
    }
    faults = []
    for link in _LINK.findall(prose):
        if link.startswith("#"):
            is_good = link[1:] in anchors
        elif link.startswith("https://"):
            is_good = re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/[\w./@:~-]*)?", link) is not None
        else:
            is_good = bool(link) and folder is not None and (folder / link).is_file()
        if not is_good:
            faults.append(f"link: {link!r} leads nowhere")
    return faults


def _check_sections(prose: str) -> list[str]:
    """Numbers that were measured need a source in their section; rows of a table, as many cells as its header."""
    faults = []
    for section in re.split(r"(?m)^(?=## )", prose)[1:]:
        title, _, body = section.partition("\n")
        if _MEASURED.search(re.sub(r"`[^`]*`|\[[^\]]*\]\([^)]*\)", "", body)):
            sources = re.findall(r"(?m)^Source: (.*)$", body)
            if not any(_LINK.search(source) for source in sources):
                faults.append(f"{title}: measured numbers without a line `Source: [...](...)`")
        for table in re.findall(r"(?:^\|.*\n?)+", body, flags=re.MULTILINE):
            if len({row.count("|") for row in table.splitlines()}) > 1:
                faults.append(f"{title}: rows of a table differ in length")
    return faults


def main(folders: list[str]) -> int:
    """Print the faults of the cards in `folders`, or of all that the package can write; 1 if there are any."""
    if folders:
        cards = {folder: (Path(folder) / "README.md").read_text(encoding="utf-8") for folder in folders}
    else:
        cards = {name: str(render_card(name)) for name in card_names()}
    number = 0
    for name, content in cards.items():
        for fault in check_card(content, Path(name) if folders else None, is_complete=not folders):
            print(f"{name}: {fault}", file=sys.stderr)
            number += 1
    print(f"{len(cards)} model cards, {number} faults")
    return int(number > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
