"""The house has floors, and imports go down only (docs/architecture.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import asyncllm

ROOT = Path(asyncllm.__file__).parent
FLOORS = {
    "__init__": 6, "cli": 6, "probe": 6, "__main__": 6, "llm": 5, "client": 5, "server": 5, "router": 4, "engine": 3,
    "executor": 2, "models": 1, "layers": 1, "attention": 1, "weights": 1, "native": 1,
    "config": 0, "errors": 0, "types": 0, "ring": 0, "counters": 0, "metrics": 0, "threads": 0, "host_memory": 0,
}  # fmt: skip
TORCH_FREE_BELOW_TORCH = {"executor/base.py", "models/config.py"}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), path


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def room(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def test_every_module_stands_on_a_floor() -> None:
    unknown = [name for name, _ in modules() if room(name) not in FLOORS]
    assert not unknown


def test_imports_go_down_only() -> None:
    wrong = []
    for name, path in modules():
        for module in imports(ast.parse(path.read_text())):
            parts = module.split(".")
            if parts[0] == "asyncllm" and len(parts) > 1 and FLOORS[parts[1]] > FLOORS[room(name)]:
                wrong.append(f"{name} imports {module}")
    assert not wrong


def test_each_library_stays_in_its_rooms() -> None:
    allowed = {
        "torch": {1, 2},
        "triton": {1, 2},
        "aiohttp": {5},
        "asyncio": {4, 5, 6},
    }
    wrong = []
    for name, path in modules():
        for module in imports(ast.parse(path.read_text())):
            floors = allowed.get(module.split(".")[0])
            if floors is not None and FLOORS[room(name)] not in floors:
                wrong.append(f"{name} imports {module}")
            if module.split(".")[0] == "torch" and name in TORCH_FREE_BELOW_TORCH:
                wrong.append(f"{name} imports {module}")
    assert not wrong


def test_every_module_says_what_it_knows() -> None:
    silent = [
        name
        for name, path in modules()
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent
