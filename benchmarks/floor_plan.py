"""How the package is laid out: names at its top, levels of imports between them, circles.

    python benchmarks/floor_plan.py [FOLDER_OF_A_PACKAGE]

A name imports another if any module below it does, wherever in the module. The levels are the
longest way through these imports, names in one circle counting as one. What Python itself asks for,
`__init__` and `__main__`, is no name of the plan.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "qdeploy"


def top(path: Path, package: Path) -> str:
    """The name at the package's top that a module belongs to."""
    return path.relative_to(package).with_suffix("").parts[0]


def imported(path: Path, package: Path) -> set[str]:
    """Names at the package's top that a module imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found.update(n.split(".")[1] for n in names if n.startswith(f"{package.name}."))
    return {n for n in found if (package / n).is_dir() or (package / f"{n}.py").exists()}


def graph_of(package: Path) -> dict[str, set[str]]:
    """What each name at the top imports; what Python asks for aside."""
    graph: dict[str, set[str]] = defaultdict(set)
    for path in sorted(package.rglob("*.py")):
        own = top(path, package)
        if own not in {"__init__", "__main__"}:
            graph[own] |= imported(path, package) - {own}
    return dict(graph)


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of names that reach each other."""

    @cache
    def reached(name: str) -> frozenset[str]:
        seen, todo = set(), [name]
        while todo:
            for other in graph.get(todo.pop(), set()) - seen:
                seen.add(other)
                todo.append(other)
        return frozenset(seen)

    found: list[set[str]] = []
    for name in graph:
        circle = {name} | {other for other in reached(name) if name in reached(other)}
        if len(circle) > 1 and circle not in found:
            found.append(circle)
    return found


def levels(graph: dict[str, set[str]], tied: list[set[str]]) -> int:
    """The number of floors."""
    one = {name: min(next((c for c in tied if name in c), {name})) for name in graph}
    merged: dict[str, set[str]] = defaultdict(set)
    for name, others in graph.items():
        merged[one[name]] |= {one[o] for o in others if o in one} - {one[name]}
    height: dict[str, int] = {}
    for name in TopologicalSorter(merged).static_order():
        height[name] = 1 + max((height[o] for o in merged[name]), default=0)
    return max(height.values())


def main() -> None:
    package = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else PACKAGE
    graph = graph_of(package)
    tied = circles(graph)
    loose = sorted(n for n in graph if not (package / n).is_dir())
    print(f"names at the top  {len(graph)}")
    print(f"loose modules     {len(loose)}: {', '.join(loose)}")
    print(f"import levels     {levels(graph, tied)}")
    print(f"circles           {len(tied)}" + "".join(f": {', '.join(sorted(c))}" for c in tied))


if __name__ == "__main__":
    main()
