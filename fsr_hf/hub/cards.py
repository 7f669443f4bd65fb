"""
Model cards: `hub_cards/model_card.md`, filled with what `hub_cards/cards.yaml` knows of a checkpoint and with what its
config says.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import cache
from importlib.metadata import requires
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from packaging.requirements import Requirement

from ..package_data import data_folder
from ..version import __version__
from .files import find_file


__all__ = [
    "address_card",
    "card_data",
    "card_folder",
    "card_names",
    "default_budget",
    "markdown_table",
    "read_base",
    "render_card",
    "write_card",
]

_TOKENS, _SHARE = "num_visual_tokens", "retention_ratio"
_BASE_METADATA = ("license", "license_name", "license_link", "language")


class Budget(NamedTuple):
    """
    How much of an image or a video is kept.

    Args:
        name (`str`): The argument that says it, `num_visual_tokens` or `retention_ratio`.
        value (`int` or `Fraction`): Its value.
    """

    name: str
    value: int | Fraction

    def __str__(self) -> str:
        """As an argument in Python."""
        return f"{self.name}={self.text}"

    @property
    def text(self) -> str:
        """The value in Python: `64`, `0.2`, or `1/9` where a decimal number would be rounded."""
        decimal = f"{float(self.value):g}"
        return decimal if Fraction(decimal) == self.value else str(self.value)

    @property
    def share(self) -> str:
        """A share in words of a sentence: `20 %`, or `1/9`."""
        return self.text if "/" in self.text else f"{float(100 * self.value):g} %"


def card_folder() -> Path:
    """The folder of template and data."""
    return data_folder("hub_cards")


@cache
def card_data() -> dict[str, Any]:
    """What `cards.yaml` holds."""
    return yaml.safe_load((card_folder() / "cards.yaml").read_text(encoding="utf-8"))


def card_names() -> list[str]:
    """The names of the checkpoints that have a card of their own."""
    return list(card_data()["models"])


def default_budget(model_type: str) -> Budget:
    """
    The budget of a family: the strongest one at which the paper keeps nearly all of the unpruned score, or one of ours
    for a family that the paper does not report.
    """
    paper, family = card_data()["paper"], card_data()["families"][model_type]
    if "default_budget" in family:
        return _budget_of(family["default_budget"])
    table = paper["tables"][family["table"]]
    return [budget for budget, row in _budgets(table) if row["score"] >= paper["default_keeps"]][-1]


def render_card(
    model: str | None = None,
    *,
    model_type: str | None = None,
    fsr_config: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
    base_metadata: Mapping[str, Any] | None = None,
) -> ModelCard:
    """
    The model card of a checkpoint with FSR.

    Args:
        model (`str`, *optional*):
            The Hub id of the checkpoint that it was made from, or a name of [`card_names`]. `None` for one that is not
            on the Hub.
        model_type (`str`, *optional*):
            The family, such as `"fsr_llava"`. Needed for a `model` that has no card of its own.
        fsr_config (`Mapping`, *optional*):
            The `fsr_config` of its `config.json`. By default the one that an export with a text encoder writes.
        repo_id (`str`, *optional*):
            Where the examples load it from.
        revision (`str`, *optional*):
            The revision that they pin, by default the tag of this version of the package.
        base_metadata (`Mapping`, *optional*):
            Metadata of the base's own card, from which licence and language are taken if they are not known here.

    Raises:
        `ValueError`: for a `model_type` that is not known.
    """
    data = card_data()
    name, facts = _find(model)
    model_type = facts.get("family", model_type)
    if model_type is None or model_type not in data["families"]:
        raise ValueError(f"`model_type={model_type!r}` has no card; there are {', '.join(data['families'])}.")
    family = data["families"][model_type]
    name = name or family["name"].lower()
    if fsr_config is None:
        fsr_config = {default_budget(model_type).name: default_budget(model_type).value}
        fsr_config |= {"text_encoder_config": {} if "text_encoder" in family else None}
    budget = _budget_of(fsr_config)
    repo_id = repo_id or f"{data['code']['organization']}/{name}-fsr"
    revision = revision or f"v{__version__}"
    table = data["paper"]["tables"].get(facts.get("table", family.get("table")))
    is_reported = "table" in facts
    has_relevance = fsr_config.get("relevance") != "none" and fsr_config.get("text_encoder_config") is not None
    text_encoder = family.get("text_encoder") if facts else None  # somebody's own may have another one
    licence = data["licences"].get(facts.get("licence"))

    metadata: dict[str, Any] = {key: value for key, value in (base_metadata or {}).items() if key in _BASE_METADATA}
    if facts:
        metadata = {"language": facts["language"]} | licence["metadata"]
    base_model = facts.get("base_model", None if facts else model)
    measured = facts.get("measured", [])
    if measured:
        metadata["model_name"] = repo_id.rpartition("/")[2]
        metadata["eval_results"] = _eval_results(measured, family["pipeline_tag"])
    card = ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        library_name="transformers",
        pipeline_tag=family["pipeline_tag"],
        tags=[*data["code"]["tags"], *family["tags"]],
        **metadata,
    )
    return ModelCard.from_template(
        card,
        template_path=str(card_folder() / "model_card.md"),
        code=data["code"],
        code_licence=data["licences"][data["code"]["licence"]],
        paper=data["paper"],
        family=family,
        title=facts.get("title") or (name if model else family["name"]),
        about=facts.get("about"),
        budget=budget,
        num_tokens=table["num_tokens"]
        if is_reported and budget.name == _budgets(table)[0][0].name == _TOKENS
        else None,
        other_budget=_other_budget([] if table is None or "about" in facts else _budgets(table), budget),
        table=table,
        is_reported=is_reported,
        scores=_paper_table(table, family["item"]) if table else None,
        efficiency=_efficiency_table(table) if is_reported else None,
        measured=_measured_table(measured, family["item"]),
        sources=[entry["source"] for entry in measured],
        has_relevance=has_relevance,
        reads_values=fsr_config.get("relevance") != "clip",
        is_inverted=fsr_config.get("invert_relevance", True),
        inverted=data["inverted_relevance"],
        text_encoder=text_encoder,
        text_encoder_licence=data["text_encoders"][text_encoder]["licence"] if text_encoder else None,
        licence=licence,
        repo_id=repo_id,
        revision=revision,
        install=_install(family["requires"]),
    )


def write_card(
    folder: str | os.PathLike,
    base_model: str | None = None,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    base_metadata: Mapping[str, Any] | None = None,
) -> Path:
    """
    Write the card of the checkpoint in `folder` to its `README.md`. Family and budget are read from `config.json`; the
    arguments are those of [`render_card`].

    Returns:
        `Path`: the file.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    card = render_card(
        base_model,
        model_type=config["model_type"],
        fsr_config=config["fsr_config"],
        repo_id=repo_id,
        revision=revision,
        base_metadata=base_metadata,
    )
    file = Path(folder) / "README.md"
    card.save(file)
    return file


def read_base(source: str | os.PathLike, folder: Path) -> tuple[str | None, dict[str, Any]]:
    """
    What an export of `source`, whose files are in `folder`, comes from, as [`write_card`] takes it: the Hub id of its
    base, if there is one, and the metadata of the base's card. A checkpoint with FSR has the base that its card names.
    """
    metadata: dict[str, Any] = {}
    if (folder / "README.md").is_file():
        file = find_file(folder, "README.md")
        with suppress(AttributeError, TypeError, ValueError, yaml.YAMLError):  # a card that cannot be read is none
            card = ModelCard.load(file, ignore_metadata_errors=True)
            metadata = {key: value for key, value in card.data.to_dict().items() if _is_text(value)}
    if "focus-scan-refine" in metadata.get("tags", ()):
        base = metadata.get("base_model")
        return (base if isinstance(base, str) and _is_id(base) else None), metadata
    in_cache = re.search(r"models--([^/]+)--([^/]+)/snapshots/[^/]+$", folder.resolve().as_posix())
    if not os.path.isdir(source):
        return str(source).partition("@")[0], metadata
    return (f"{in_cache[1]}/{in_cache[2]}" if in_cache else None), metadata


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _is_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def address_card(folder: str | os.PathLike, repo_id: str, revision: str) -> None:
    """Make the card in `folder` speak of `repo_id` at `revision`; the rest of it stays as it is."""
    file = Path(folder) / "README.md"
    text = file.read_text(encoding="utf-8")
    place = re.search(r'^repo, revision = "(([^"/]+)/[^"]*)", "([^"]*)"$', text, flags=re.MULTILINE)
    if place is not None:
        text = text.replace(place[0], f'repo, revision = "{repo_id}", "{revision}"')
        text = text.replace(f'push_to_hub("{place[2]}/', f'push_to_hub("{repo_id.partition("/")[0]}/')
        file.write_text(text, encoding="utf-8")


def _find(model: str | None) -> tuple[str, dict[str, Any]]:
    """The name of a checkpoint, and what is known of it: nothing if it is somebody's own."""
    for name, facts in card_data()["models"].items():
        if model is not None and model in (name, facts.get("base_model")):
            return name, facts
    return (model or "").rpartition("/")[2], {}


def _budgets(table: Mapping[str, Any]) -> list[tuple[Budget, Mapping[str, Any]]]:
    """The budgets of a table of the paper, each as one would ask for it, with its row."""
    budgets = []
    for row in table["pruned"]:
        if "removed" in row:
            budget = Budget(_SHARE, 1 - Fraction(row["removed"], 100))
        elif table.get("as_share"):
            budget = Budget(_SHARE, Fraction(row[_TOKENS], table["num_tokens"]))
        else:
            budget = Budget(_TOKENS, row[_TOKENS])
        budgets.append((budget, row))
    return budgets


def _budget_of(fsr_config: Mapping[str, Any]) -> Budget:
    if fsr_config.get(_TOKENS) is not None:
        return Budget(_TOKENS, fsr_config[_TOKENS])
    ratio = fsr_config[_SHARE]
    near = Fraction(ratio).limit_denominator(100)
    return Budget(_SHARE, near if float(near) == float(ratio) else Fraction(str(ratio)))


def _other_budget(budgets: Sequence[tuple[Budget, Any]], budget: Budget) -> Budget:
    """A budget for the examples that is not the checkpoint's own: the first such in the paper's table, else half."""
    others = [other for other, _ in budgets if other.name == budget.name and other != budget]
    half = budget.value // 2 if isinstance(budget.value, int) else budget.value / 2
    return others[0] if others else Budget(budget.name, max(1, half) if budget.name == _TOKENS else half)


def _paper_table(table: Mapping[str, Any], item: str) -> str:
    has_tokens = bool(table.get("as_share"))  # where the budget does not say how many they are
    rows: list[list[Any]] = []
    if table["unpruned"]:
        tokens = [table["num_tokens"]] if has_tokens else []
        rows.append([_unpruned(table), *tokens, *table["unpruned"], "100 %"])
    for budget, row in _budgets(table):
        tokens = [row[_TOKENS]] if has_tokens else []
        rows.append([f"`{budget}`", *tokens, *row["scores"], f"{row['score']} %"])
    tokens_header = [f"visual tokens per {item}"] if has_tokens else []
    return markdown_table(["budget", *tokens_header, *table["benchmarks"], "score kept"], rows)


def _efficiency_table(table: Mapping[str, Any]) -> str | None:
    efficiency = table.get("efficiency")
    if efficiency is None:
        return None
    pruned = efficiency["pruned"]
    rows = [
        [_unpruned(table), *efficiency["unpruned"]],
        [f"`{Budget(_TOKENS, pruned[_TOKENS])}`", *pruned["values"]],
    ]
    return markdown_table(["budget", *efficiency["columns"]], rows)


def _unpruned(table: Mapping[str, Any]) -> str:
    is_known = "num_tokens" in table and not table.get("as_share")
    return f"unpruned, {table['num_tokens']} tokens" if is_known else "unpruned"


def _measured_table(measured: Sequence[Mapping[str, Any]], item: str) -> str | None:
    if not measured:
        return None
    header = ["budget", *(f"{entry['dataset']['name']}, {entry['metric']['name']}" for entry in measured)]
    rows: list[list[Any]] = [["unpruned", *(entry["unpruned"] for entry in measured)]]
    for results in zip(*(entry["pruned"] for entry in measured), strict=True):
        (budget,) = {_budget_of(result) for result in results}
        rows.append([f"`{budget}`", *(result["value"] for result in results)])
    return markdown_table(header, rows)


def _eval_results(measured: Sequence[Mapping[str, Any]], task: str) -> list[EvalResult]:
    """
    Our own measurements for the Hub's table of results. The paper's numbers are not among them: they come from other
    code, and that table has no column to say so.
    """
    return [
        EvalResult(
            task_type=task,
            dataset_type=entry["dataset"]["type"],
            dataset_name=entry["dataset"]["name"],
            metric_type=entry["metric"]["type"],
            metric_name=f"{entry['metric']['name']} ({_budget_of(result)})",
            metric_value=result["value"],
            source_name=entry["source"]["name"],
            source_url=entry["source"]["url"],
        )
        for entry in measured
        for result in entry["pruned"]
    ]


def markdown_table(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """Names on the left, numbers on the right."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _install(packages: Sequence[str]) -> str:
    """What pip installs to run a checkpoint: this package's own range of transformers, and what the family needs."""
    own = map(Requirement, requires(card_data()["code"]["package"]) or [])
    versions = next(requirement.specifier for requirement in own if requirement.name == "transformers")
    ordered = ",".join(sorted(map(str, versions), reverse=True))
    return f'"transformers{ordered}" {" ".join(packages)}'
