"""Who imports whom: no circles in the package and beside it, and no test module that others lean on."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


def modules_below(root: Path, *folders: str) -> dict[str, Path]:
    """The modules in `folders` of `root` by their dotted names; a package stands for its `__init__`."""
    files = (file for folder in folders for file in (root / folder).rglob("*.py"))
    names = {file: ".".join(file.relative_to(root).with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


def imports_of(module: str, file: Path) -> Iterator[tuple[str, list[str]]]:
    """What a module imports, wherever the import stands: a dotted name, and the names that are taken from it."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*parents, *filter(None, [node.module])]), [alias.name for alias in node.names]


def import_graph(modules: dict[str, Path]) -> dict[str, set[str]]:
    """For each module, those of `modules` that it imports. Python runs the packages around them, too: not counted."""
    graph = {}
    for module, file in modules.items():
        imported = set()
        for source, names in imports_of(module, file):
            submodules = {f"{source}.{name}" for name in names} & modules.keys()
            imported |= submodules
            if len(submodules) < len(names) or not names:
                imported.add(source)
        graph[module] = imported & modules.keys()
    return graph


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next, and the last the first; none if there is no circle."""
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module not in finished:
            for imported in sorted(graph[module]):
                if circle := visit(imported, [*path, module]):
                    return circle
            finished.add(module)
        return []

    return next(filter(None, (visit(module, []) for module in sorted(graph))), [])


def test_no_module_imports_its_importer():
    graph = import_graph(modules_below(ROOT, "fsr_hf", "benchmarks", "examples"))
    assert "fsr_hf.hub.export" in graph["fsr_hf"] and "fsr_hf.version" in graph["fsr_hf.hub.flatten"]
    assert "benchmarks.quality" in graph["benchmarks.quality_page"]
    assert find_circle(graph) == []


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"__init__": "from .a import x\nfrom .version import v", "a": "from .version import v", "version": ""}, []),
        ({"__init__": "from .a import x", "a": "from . import v"}, ["p", "p.a"]),
        ({"__init__": "", "a": "def f():\n    from p.b import y", "b": "import p.c", "c": "from . import a"}, "abc"),
        ({"__init__": "", "a": "import p.a"}, "a"),
    ],
)
def test_a_circle_is_found(tmp_path, files, circle):
    (tmp_path / "p").mkdir()
    for name, source in files.items():
        (tmp_path / "p" / f"{name}.py").write_text(source)
    expected = [f"p.{name}" for name in circle] if isinstance(circle, str) else circle
    assert find_circle(import_graph(modules_below(tmp_path, "p"))) == expected


def test_no_test_module_is_imported():
    """Helpers stand in modules of their own: a test module that is imported collects tests and fixtures twice."""
    modules = modules_below(ROOT / "tests", ".")
    assert "oracle" in modules and "modeling.test_fsr" in modules
    importers = {
        f"{module} imports {source}"
        for module, file in modules.items()
        for source, names in imports_of(module, file)
        for name in (source, *names)
        if name.rpartition(".")[2].startswith("test_")
    }
    assert importers == set()
