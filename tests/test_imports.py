"""Import directions and the size of things, read from the source without running it."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "cluster")
LONGEST_MODULE, LONGEST_FUNCTION = 250, 45


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
every_module = pytest.mark.parametrize("module", SOURCES)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """The full names of all modules that a module imports, also inside functions."""
    return frozenset(_imports(module))


def _imports(module: str) -> Iterator[str]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: imports are written in full"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & SOURCES.keys()
            yield from submodules
            if len(submodules) < len(node.names):
                yield node.module


def is_within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def foreign(module: str, *allowed: str) -> set[str]:
    """What a module imports beyond the standard library and what is allowed."""
    return {name for name in imports(module) if not is_within(name, *allowed, *sys.stdlib_module_names)}


def modules_within(*packages: str) -> list[str]:
    found = [module for module in SOURCES if is_within(module, *packages)]
    assert found, packages
    return found


def test_numerics_import_torch_only() -> None:
    """But for the kernel, which only the sweep imports, where there is a GPU."""
    for module in modules_within("pipeline.numerics"):
        allowed = ("torch", "triton") if module == "pipeline.numerics.kernel" else ("torch",)
        assert not foreign(module, *allowed, "pipeline.numerics"), module
    assert [module for module in SOURCES if "pipeline.numerics.kernel" in imports(module)] == [
        "pipeline.numerics.solve"
    ]
    at_import = {ast.unparse(node) for node in tree("pipeline.numerics.solve").body}
    assert not [line for line in at_import if line.startswith(("import", "from")) and "kernel" in line]


def test_methods_import_numerics_sparsity_and_settings_only() -> None:
    ours = ("pipeline.methods", "pipeline.numerics", "pipeline.sparsity", "pipeline.settings")
    for module in modules_within("pipeline.methods"):
        assert not foreign(module, "torch", "pydantic", *ours), module


def test_the_pipeline_knows_nothing_of_ray_or_of_the_cluster() -> None:
    for module in modules_within("pipeline"):
        assert not [name for name in imports(module) if is_within(name, "cluster", "ray")], module


def test_transformers_are_imported_where_models_and_text_are_read() -> None:
    allowed = ("pipeline.models", "pipeline.calibration", "pipeline.evaluate", "pipeline.runtime")
    users = {module for module in SOURCES if any(is_within(name, "transformers") for name in imports(module))}
    assert users and all(is_within(module, *allowed) for module in users), users


def test_of_transformers_the_runtime_reads_only_the_version() -> None:
    uses = [
        ast.unparse(node)
        for node in ast.walk(tree("pipeline.runtime"))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("transformers.")
    ]
    assert "transformers" in imports("pipeline.runtime") and uses == ["transformers.__version__"]


@every_module
def test_nobody_imports_tests_or_scripts(module: str) -> None:
    theirs = {path.stem for folder in ("tests", "scripts") for path in (ROOT / folder).rglob("*.py")}
    assert not [name for name in imports(module) if is_within(name, "tests", "scripts", *theirs)]


def test_there_is_no_import_cycle() -> None:
    """Importing a module also runs the packages above it, so they count too."""
    graph = {module: {name for name in _with_packages(module)} - {module} for module in SOURCES}
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in finished:
            for imported in sorted(graph[module]):
                visit(imported, (*path, module))
            finished.add(module)

    for module in SOURCES:
        visit(module, ())


def _with_packages(module: str) -> Iterator[str]:
    for name in imports(module) & SOURCES.keys():
        yield name
        parents = name.split(".")[:-1]
        for depth in range(1, len(parents) + 1):
            package = ".".join(parents[:depth])
            # a package that is being imported already is not run again for its own parts
            if not is_within(module, package):
                yield package


@every_module
def test_a_module_opens_with_what_it_is_and_is_read_in_one_sitting(module: str) -> None:
    assert ast.get_docstring(tree(module))
    assert len(SOURCES[module].read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE


@every_module
def test_a_function_fits_the_screen(module: str) -> None:
    lengths = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}


@every_module
def test_no_module_is_named_for_nothing(module: str) -> None:
    assert module.split(".")[-1] not in {"utils", "util", "common", "helpers", "misc", "base"}
