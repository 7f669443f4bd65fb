"""The package as the flat files of a Hub folder, which transformers loads with `trust_remote_code=True`."""

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ..version import __version__
from .families import FAMILIES, Family
from .manifest import write_manifest


__all__ = ["flat_files", "write_remote_code"]

_PACKAGE = __name__.partition(".")[0]
_ALLOWED = sys.stdlib_module_names | {"torch", "transformers"}
_ALLOWED_MODULES = {"huggingface_hub.dataclasses"}
_OPTIONAL = {"triton"}  # inside `try:` only, where transformers does not ask for it
_TRAVELS_WITH = """

from typing import TYPE_CHECKING  # noqa: E402


if TYPE_CHECKING:
    # transformers copies and downloads the files that it finds named in imports. These names keep the code together
    # when a config or a processor is loaded or saved by itself. After an interrupted download it asks again only for
    # files that this one names: so it names them all.
"""


def write_remote_code(obj: Any, directory: str | os.PathLike) -> None:
    """
    Writes the code that `obj`, a config or a processor of this package, needs in order to load from `directory`, and
    names its classes in the `auto_map` of `obj`. A model leaves both to its config, which it saves when it should.
    """
    family = next(family for family in FAMILIES if isinstance(obj, family.classes))
    if isinstance(obj, family.model):
        return
    is_config = isinstance(obj, family.config)
    obj.auto_map = {auto: name for auto, name in family.auto_map.items() if is_config or auto == "AutoProcessor"}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = flat_files(family)
    for name, source in files.items():
        (directory / name).write_text(source, encoding="utf-8")
    write_manifest(directory, files)  # what else is in the folder is yet to be written


@cache
def flat_files(family: Family) -> dict[str, str]:
    """
    The modules that the classes of a family need, found by walking their imports, as `{file name: source}`.

    Raises:
        `ValueError`: naming module and line, if a module imports what a Hub folder cannot: another package than torch
            and transformers, an `__init__`, a whole module, or two modules of one basename.
    """
    entries = {cls.__module__: cls.__name__ for cls in family.classes}
    files: dict[str, str] = {}
    origin: dict[str, str] = {}
    direct: dict[str, dict[str, str]] = {}  # what an entry imports
    names = dict(entries)  # of each module, a name in it
    pending = list(entries)
    while pending:
        module = pending.pop()
        basename = module.rpartition(".")[2]
        if origin.setdefault(basename, module) != module:
            raise ValueError(f"{module} and {origin[basename]} would be one flat file: rename one of them.")
        if f"{basename}.py" in files:
            continue
        source, needed = _flatten_module(module)
        if module in entries:
            direct[module] = needed
        files[f"{basename}.py"] = f"# Generated from {_PACKAGE} {__version__} ({module}), do not edit.\n{source}"
        pending += needed
        names = needed | names
    for module, needed in direct.items():
        others = sorted(names.keys() - needed.keys() - {module})
        if others:
            lines = (f"    from .{other.rpartition('.')[2]} import {names[other]}  # noqa: F401\n" for other in others)
            files[f"{module.rpartition('.')[2]}.py"] += _TRAVELS_WITH + "".join(lines)
    return dict(sorted(files.items()))


def _flatten_module(module: str) -> tuple[str, dict[str, str]]:
    """The source of `module` with its in-package imports made flat, and the modules that these name, with a name."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.loader is not None
    source = spec.loader.get_source(module)  # type: ignore[attr-defined]
    lines = source.split("\n")
    needed: dict[str, str] = {}
    for node, is_optional in _imports(ast.parse(source)):
        place = f"{module}, line {node.lineno}, `{ast.unparse(node)}`"
        if isinstance(node, ast.ImportFrom) and node.level:
            target = importlib.util.resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
            _check_in_package(target, place)
            before, statement = lines[node.lineno - 1][: node.col_offset], lines[node.lineno - 1][node.col_offset :]
            flat = f"from .{target.rpartition('.')[2]} import"
            statement, found = re.subn(r"^from\s+[.\w]+\s+import\b", flat, statement)
            if not found:
                raise ValueError(f"{place}: write `from .x import` on one line.")
            lines[node.lineno - 1] = before + statement
            needed[target] = node.names[0].name
        else:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                root = name.partition(".")[0]
                if root not in _ALLOWED and name not in _ALLOWED_MODULES and not (root in _OPTIONAL and is_optional):
                    raise ValueError(
                        f"{place}: the code of a Hub folder imports the standard library, torch, transformers, "
                        f"huggingface_hub.dataclasses, and triton inside `try:`, but not {name!r}."
                    )
    source = "\n".join(lines)
    # transformers finds imports by this pattern, in docstrings too, and fails on a file that does not exist.
    seen = set(re.findall(r"^\s*(?:from|import)\s+\.(\S+)", source, flags=re.MULTILINE))
    stray = seen - {target.rpartition(".")[2] for target in needed}
    if stray:
        raise ValueError(f"{module}: transformers would take a line of text for an import of {', '.join(stray)}.")
    return source, needed


def _imports(node: ast.AST, is_optional: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import below `node`, and whether it stands in the body of a `try:`."""
    for child in ast.iter_child_nodes(node):
        in_try = is_optional or (isinstance(node, ast.Try) and child in node.body)
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, in_try
        else:
            yield from _imports(child, in_try)


def _check_in_package(target: str, place: str) -> None:
    spec = importlib.util.find_spec(target) if target.startswith(f"{_PACKAGE}.") else None
    if spec is None or spec.submodule_search_locations is not None:
        raise ValueError(f"{place}: import names from a module of the package, not from {target}.")
