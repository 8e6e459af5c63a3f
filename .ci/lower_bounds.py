"""Print the lower bound of every dependency of a pyproject.toml as a pin (`name==bound`), for `pip -c`.

    python .ci/lower_bounds.py pyproject.toml

Where extras have different bounds for one dependency, the highest is printed: all extras are installed together.
Exits with a sentence if a dependency has no lower bound.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*(?P<versions>[^;]*)")


def as_numbers(version: str) -> tuple[int, ...]:
    """The release numbers of a version, to compare by."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def lower_bounds(pyproject: Path) -> dict[str, str]:
    """The lower bound of each dependency, extras included; requirements on the project itself are passed over."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"]]
    for extra in project.get("optional-dependencies", {}).values():
        requirements += extra
    bounds: dict[str, str] = {}
    for requirement in requirements:
        match = REQUIREMENT.fullmatch(requirement)
        if match is None:
            raise SystemExit(f"{pyproject}: cannot read the requirement {requirement!r}")
        name = re.sub(r"[-_.]+", "-", match["name"]).lower()
        if name == project["name"]:
            continue
        bound = re.search(r">=\s*([\w.]+)", match["versions"])
        if bound is None:
            raise SystemExit(f"{pyproject}: {requirement!r} has no lower bound; write {match['name']}>=VERSION")
        bounds[name] = max(bounds.get(name, bound[1]), bound[1], key=as_numbers)
    return bounds


if __name__ == "__main__":
    for name, bound in sorted(lower_bounds(Path(sys.argv[1])).items()):
        print(f"{name}=={bound}")
