"""Check the contents of the source distribution and the wheel against the tracked files.

    python .ci/check_archives.py DIST

The source distribution has every tracked file, so that its tests run; the wheel has every tracked file of the packages.
Neither has any other file, except for the metadata that setuptools writes, nor a file above 4 MiB. The wheel has the
command, the entry points of the plugins, the licence and the same extras as pyproject.toml. Exits with one sentence
otherwise.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

MAX_BYTES = 4 << 20
WRITTEN = ("PKG-INFO", "setup.cfg", "ttd_plugins.egg-info/")
"""What setuptools adds to a source distribution."""


def tracked_files() -> set[str]:
    """Paths of the files that git tracks, from the repository's root."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True, text=True).stdout
    return {name for name in listed.split("\0") if name}


def packaged(names: Iterable[str]) -> dict[str, str]:
    """Tracked files of the packages, by their path in the wheel."""
    found = {}
    for name in names:
        inside = name.removeprefix("adapters/")
        if inside.startswith(("ttd_plugins/", "ttd_")) and "/" in inside and (inside != name or "ttd_plugins/" in name):
            found[inside] = name
    return found


def compare(what: str, actual: set[str], expected: set[str]) -> None:
    """Exit if a file is missing or extra."""
    for title, names in (("lacks", expected - actual), ("should not have", actual - expected)):
        if names:
            raise SystemExit(f"{what} {title} {len(names)} files, such as {', '.join(sorted(names)[:5])}")


def check_sdist(file: Path, tracked: set[str]) -> None:
    with tarfile.open(file) as archive:
        members = [member for member in archive if member.isfile()]
    top = file.name.removesuffix(".tar.gz") + "/"
    names = {member.name.removeprefix(top) for member in members}
    compare(file.name, {name for name in names if not name.startswith(WRITTEN)}, tracked)
    check_sizes(file, {member.name: member.size for member in members})


def check_wheel(file: Path, tracked: set[str], project: dict) -> None:  # type: ignore[type-arg]
    with zipfile.ZipFile(file) as archive:
        sizes = {one.filename: one.file_size for one in archive.infolist() if not one.is_dir()}
        (records,) = {name.split("/")[0] for name in sizes if name.split("/")[0].endswith(".dist-info")}
        points, about = ConfigParser(), Parser().parsestr(archive.read(f"{records}/METADATA").decode())
        points.optionxform = str  # type: ignore[assignment,method-assign]
        points.read_string(archive.read(f"{records}/entry_points.txt").decode())
    compare(file.name, {name for name in sizes if not name.startswith(f"{records}/")}, set(packaged(tracked)))
    check_sizes(file, sizes)
    expected = {"console_scripts": project["scripts"], **project["entry-points"]}
    if {group: dict(points[group]) for group in points.sections()} != expected:
        raise SystemExit(f"{file.name} has other entry points than pyproject.toml")
    extras = {name.replace("_", "-") for name in project["optional-dependencies"]}
    if {name.replace("_", "-") for name in about.get_all("Provides-Extra", [])} != extras:
        raise SystemExit(f"{file.name} has other extras than pyproject.toml")
    if f"{records}/licenses/LICENSE" not in sizes:
        raise SystemExit(f"{file.name} has no licence")


def check_sizes(file: Path, sizes: dict[str, int]) -> None:
    large = {name: size for name, size in sizes.items() if size > MAX_BYTES}
    if large:
        raise SystemExit(f"{file.name} has files above 4 MiB: {', '.join(sorted(large))}")


def main(folder: Path) -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    tracked = tracked_files()
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    check_sdist(sdist, tracked)
    check_wheel(wheel, tracked, project)
    print(f"{sdist.name} and {wheel.name}: {len(tracked)} tracked files, {len(packaged(tracked))} in the packages")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
