"""Imports and includes point one way, and no family depends on another."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.core

ROOT = Path(__file__).parent.parent
FAMILIES = ("attention", "pruning", "cross_entropy")
# Where each family has a module or a package.
BACKENDS = ("ops", "reference", "triton_kernels")

# For each top-level module or package of stamp_kernels, those that it may import besides itself.
# "stamp_kernels" is the package's __init__.
LAYERS = {
    "_backend": (),
    "common": (),
    "relative_position": ("common",),
    "reference": ("common", "relative_position"),
    "triton_kernels": ("common", "relative_position"),
    "ops": ("_backend", "common", "reference", "relative_position", "triton_kernels"),
    "packed": ("common", "ops"),
    "data": ("common", "ops", "packed"),
    "modules": ("common", "ops", "packed", "relative_position"),
    "integrations": ("common", "modules", "ops", "packed", "relative_position"),
    "stamp_kernels": ("_backend", "modules", "ops", "packed", "relative_position"),
    "flops": ("ops", "stamp_kernels"),
}
LAYERS["profiling"] = tuple(LAYERS)


class Dependency(NamedTuple):
    """One import or include."""

    file: Path  # relative to ROOT
    line: int
    importer: str  # a module's name, or a header's or source's path below csrc
    imported: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.importer} must not depend on {self.imported}"


def module_name(file: Path) -> str:
    """triton_kernels is installed as stamp_kernels.triton_kernels."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "stamp_kernels":
        parts = ("stamp_kernels", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(file): file
    for folder in ("stamp_kernels", "triton_kernels")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if (ROOT / "stamp_kernels" / "triton_kernels") not in file.parents  # the same files through the link
}


def imported_modules(node: ast.AST, importer: str) -> Iterator[str]:
    """Full names of what an import statement imports; of a name in a module, that module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if node.level > 0:
            package = importer.split(".")
            dropped = node.level - (FILES[importer].name == "__init__.py")
            module = ".".join([*package[: len(package) - dropped], *filter(None, [module])])
        for alias in node.names:
            yield name if (name := f"{module}.{alias.name}") in FILES else module


def imports() -> Iterator[Dependency]:
    """Of the package's modules by its modules, inside functions too."""
    for importer, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            for imported in imported_modules(node, importer):
                if imported.split(".")[0] == "stamp_kernels":
                    yield Dependency(file.relative_to(ROOT), node.lineno, importer, imported)


def includes() -> Iterator[Dependency]:
    """Of the sources in csrc by one another; their paths are relative to csrc."""
    for file in sorted((ROOT / "csrc").rglob("*")):
        if file.suffix in (".h", ".cpp"):
            for number, line in enumerate(file.read_text().splitlines(), start=1):
                if match := re.match(r'\s*#\s*include\s+"([^"]+)"', line):
                    path = file.relative_to(ROOT)
                    yield Dependency(path, number, str(path.relative_to("csrc")), match[1])


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def family(name: str) -> str | None:
    """The family that a module or a source belongs to, by the name of its file or folder."""
    parts = re.split(r"[./]", name)
    return next((part for part in parts if part in FAMILIES), None)


def assert_none(dependencies: Iterator[Dependency], is_wrong: Callable[[Dependency], bool]) -> None:
    checked = list(dependencies)
    assert checked
    wrong = [str(dependency) for dependency in checked if is_wrong(dependency)]
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def test_no_family_imports_another():
    def is_wrong(x: Dependency) -> bool:
        if layer(x.importer) not in BACKENDS or layer(x.imported) not in BACKENDS:
            return False
        importer, imported = family(x.importer), family(x.imported)
        return importer is not None and imported not in (None, importer)

    assert_none(imports(), is_wrong)


def test_no_family_includes_another():
    """What is outside the families, such as core, includes none."""
    assert_none(includes(), lambda x: family(x.imported) not in (None, family(x.importer)))


def test_only_ops_import_the_reference():
    def is_wrong(x: Dependency) -> bool:
        return layer(x.imported) == "reference" and layer(x.importer) not in ("ops", "reference")

    assert_none(imports(), is_wrong)


def test_imports_point_one_way():
    def is_wrong(x: Dependency) -> bool:
        importer, imported = layer(x.importer), layer(x.imported)
        return imported not in (importer, *LAYERS.get(importer, ()))

    assert {layer(module) for module in FILES} == set(LAYERS)
    assert_none(imports(), is_wrong)
