"""Plugins that raise, lie or come twice: the command line says whose fault it is, and lives.

Each is a module beside a dist-info on the path, found as any installed plugin is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from ttd_plugins import cli

HEAD = """
import sys
import torch
from fakes import FakeAdapter, FakeFamily, FakeModel, FakePlugin
from ttd_plugins.adapter import ImageFeatures
from ttd_plugins.hookspecs import hookimpl

class Adapter(FakeAdapter):
    pass

class Family(FakeFamily):
    def __init__(self, name="hostile"):
        super().__init__(name)
    def wrap(self, model, *, tokenizer=None, preprocess=None):
        adapter = Adapter(model)
        adapter.name = self.name
        return adapter
    def load(self, model, weights):
        adapter = self.wrap(FakeModel())
        adapter.weights = weights
        return adapter

class Plugin(FakePlugin):
    def __init__(self):
        super().__init__(Family())
"""
HEALTHY = HEAD + "\nplugin = Plugin()\n"


def patched(where: str, name: str, arguments: str, body: str) -> str:
    """A plugin of which one method does something else."""
    return HEAD + f"\ndef changed({arguments}):\n    {body}\n{where}.{name} = changed\nplugin = Plugin()\n"


BOOM = "raise ZeroDivisionError('over nothing')"
EXIT = "sys.exit(9)"

# Plugins that do not load, with what is said of them.
AT_LOADING = {
    "raises at import": ("raise RuntimeError('at import')\n", "could not be imported: RuntimeError: at import"),
    "exits at import": ("import sys\nsys.exit(7)\n", "could not be imported: SystemExit: 7"),
    "syntax error": ("plugin = = 1\n", "could not be imported: SyntaxError"),
    "no such attribute": ("nothing = 1\n", "could not be imported: AttributeError"),
    "raises in register_adapters": (
        HEAD
        + f"\nclass Bad:\n    @hookimpl\n    def register_adapters(self, register):\n        {BOOM}\nplugin = Bad()\n",
        "raised in register_adapters: ZeroDivisionError: over nothing",
    ),
    "exits in register_adapters": (
        HEAD
        + f"\nclass Bad:\n    @hookimpl\n    def register_adapters(self, register):\n        {EXIT}\nplugin = Bad()\n",
        "raised in register_adapters: SystemExit: 9",
    ),
    "raises in register_tag_extractors": (
        HEAD
        + f"\nclass Bad:\n    @hookimpl\n    def register_tag_extractors(self, register):\n        {BOOM}\n"
        + "plugin = Bad()\n",
        "raised in register_tag_extractors: ZeroDivisionError: over nothing",
    ),
    "a name that raises": (
        HEAD
        + "\nclass Nameless(Family):\n    @property\n    def name(self):\n        raise KeyError('no name')\n"
        + "    @name.setter\n    def name(self, value): ...\n"
        + "class Bad:\n    @hookimpl\n    def register_adapters(self, register):\n        register(Nameless())\n"
        + "plugin = Bad()\n",
        "raised in register_adapters: KeyError",
    ),
}
# Families that cannot be listed.
AT_LISTING = {
    "models raises": (patched("Family", "models", "self", BOOM), "ZeroDivisionError: over nothing"),
    "models exits": (patched("Family", "models", "self", EXIT), "SystemExit: 9"),
    "models gives nothing": (patched("Family", "models", "self", "return None"), "TypeError"),
    "models gives numbers": (patched("Family", "models", "self", "return [1]"), "a model's name is a int"),
    "weights raises": (patched("Family", "weights", "self, model", BOOM), "ZeroDivisionError: over nothing"),
    "weights gives nothing": (patched("Family", "weights", "self, model", "return None"), "TypeError"),
    "default_weights raises": (patched("Family", "default_weights", "self, model", BOOM), "ZeroDivisionError"),
    "the summary is no text": (HEAD + "\nFamily.summary = 3\nplugin = Plugin()\n", "summary is a int"),
}
# Adapters that fail, or lie, when they are used.
RAISING = {
    f"{method} raises": (patched("Adapter", method, arguments, BOOM), "ZeroDivisionError: over nothing")
    for method, arguments in {
        "encode_image": "self, pixels, *, pooled=True",
        "encode_text": "self, ids",
        "tokenize": "self, texts",
        "dense_transform": "self, size=None",
        "patch_grid": "self, height, width",
    }.items()
} | {
    "encode_image exits": (patched("Adapter", "encode_image", "self, pixels, *, pooled=True", EXIT), "SystemExit: 9"),
    "load raises": (patched("Family", "load", "self, model, weights", BOOM), "ZeroDivisionError: over nothing"),
    "load exits": (patched("Family", "load", "self, model, weights", EXIT), "SystemExit: 9"),
    "load gives a model": (
        patched("Family", "load", "self, model, weights", "return FakeModel()"),
        "returned a FakeModel",
    ),
    "the description raises": (
        HEAD + f"\ndef changed(self):\n    {BOOM}\nAdapter.description = property(changed)\nplugin = Plugin()\n",
        "ZeroDivisionError: over nothing",
    ),
    "the description is a dict": (
        HEAD + "\nAdapter.description = {}\nplugin = Plugin()\n",
        "its description is a dict",
    ),
}
IMAGE = "self, pixels, *, pooled=True"
TRUE = "found = FakeAdapter.encode_image(self, pixels, pooled=pooled); "
LYING = {
    "another grid": (
        patched("Adapter", "encode_image", IMAGE, TRUE + "found.patches = found.patches[:, 1:, 1:]; return found"),
        "encode_image returns patches of shape (1, 3, 3, 6), not (1, 4, 4, 6)",
    ),
    "a flat grid": (
        patched("Adapter", "encode_image", IMAGE, TRUE + "found.patches = found.patches.flatten(1, 2); return found"),
        "encode_image returns patches of shape (1, 16, 6), not (1, 4, 4, 6)",
    ),
    "another width of patches": (
        patched("Adapter", "encode_image", IMAGE, TRUE + "found.patches = found.patches[..., :5]; return found"),
        "encode_image returns patches of shape (1, 4, 4, 5), not (1, 4, 4, 6)",
    ),
    "a tensor for features": (
        patched("Adapter", "encode_image", IMAGE, TRUE + "return found.patches"),
        "encode_image returns a Tensor, not ImageFeatures",
    ),
    "nothing for features": (
        patched("Adapter", "encode_image", IMAGE, "return None"),
        "encode_image returns a NoneType, not ImageFeatures",
    ),
    "another width of texts": (
        patched("Adapter", "encode_text", "self, ids", "return torch.zeros(len(ids), 7)"),
        "encode_text returns a tensor of shape (2, 7), not (2, 6)",
    ),
    "one text too many": (
        patched("Adapter", "encode_text", "self, ids", "return torch.zeros(len(ids) + 1, 6)"),
        "encode_text returns a tensor of shape (3, 6), not (2, 6)",
    ),
    "ids for tokens": (
        patched("Adapter", "tokenize", "self, texts", "return torch.zeros(len(texts), 32)"),
        "tokenize returns a Tensor, not Tokens",
    ),
    "another size of pixels": (
        patched("Adapter", "dense_transform", "self, size=None", "return FakeAdapter.dense_transform(self, 40)"),
        "dense_transform returns a tensor of shape (3, 40, 40), not (3, 32, 32)",
    ),
    "no pixels": (
        patched("Adapter", "dense_transform", "self, size=None", "return lambda image: image"),
        "dense_transform returns a Image, not a tensor of shape (3, 32, 32)",
    ),
}
IN_USE = RAISING | LYING


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    return file


def write_distribution(folder: Path, name: str, code: str) -> None:
    """A module with an entry point, as pip would leave them."""
    module = f"{name}_ttd_plugin"
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{name}-3.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 3.4\n")
    (info / "entry_points.txt").write_text(f"[ttd_plugins]\n{name}_plugin = {module}:plugin\n")


Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Call it with the code of distributions by name; they and a healthy one are then what is installed."""
    folder = tmp_path / "installed"
    folder.mkdir()
    before = set(sys.modules)

    def use(**codes: str) -> Path:
        write_distribution(folder, "healthy", HEALTHY.replace('"hostile"', '"healthy"'))
        for name, code in codes.items():
            write_distribution(folder, name, code)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setenv("TTD_LOAD_PLUGINS", ",".join(["healthy", *codes]))
        monkeypatch.setattr("ttd_plugins.plugins.discovery._loaded", None)
        return folder

    yield use
    for name in set(sys.modules) - before:
        if name.endswith("_ttd_plugin"):
            del sys.modules[name]


def ttd(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def errors(result: Result) -> list[str]:
    """Lines of standard error, the warnings about plugins left out; there is no traceback in what was printed."""
    assert "Traceback" not in result.output
    return [line for line in result.stderr.splitlines() if not line.startswith("warning: plugin")]


def one_error(result: Result, *parts: str) -> None:
    assert result.exit_code == cli.USER_ERROR, result.exception
    (line,) = errors(result)
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def others_work(picture: Path, tmp_path: Path) -> None:
    """The healthy plugin is listed, loaded and used, whatever the others do."""
    listed = json.loads(ttd("backbones", "healthy", "--json").stdout)
    assert [backbone["model"] for backbone in listed[0]["backbones"]] == ["small", "hub:org/model"]
    used = ttd("tags", picture, "a red dog", "--backbone", "healthy:small", "--json")
    assert used.exit_code == 0, used.output
    assert len(json.loads(used.stdout)["tags"]) >= 1
    drawn = ttd("heatmap", picture, "a red dog", "--backbone", "healthy:small", "--out", tmp_path / "maps.png")
    assert drawn.exit_code == 0, drawn.output


@pytest.mark.parametrize("kind", AT_LOADING)
def test_a_plugin_that_does_not_load(install: Install, picture: Path, tmp_path: Path, kind: str) -> None:
    code, said = AT_LOADING[kind]
    install(hostile=code)
    shown = ttd("plugins")
    assert shown.exit_code == 0 and errors(shown) == []
    assert shown.stderr.count("warning: plugin 'hostile_plugin' (hostile 3.4): ") == 1
    assert said in shown.stdout and said in shown.stderr
    assert "families: healthy" in shown.stdout
    assert ttd("backbones").exit_code == 0
    for command in (
        ("tags", picture, "a dog", "--backbone"),
        ("heatmap", picture, "a dog", "--out", tmp_path / "maps.png", "--backbone"),
        ("demo", "--out", tmp_path / "demo", "--backbone"),
        ("check-adapter",),
    ):
        one_error(ttd(*command, "hostile:small"), "unknown family 'hostile'", "plugin 'hostile_plugin' (hostile 3.4)")
    others_work(picture, tmp_path)


@pytest.mark.parametrize("kind", AT_LISTING)
def test_a_family_that_cannot_be_listed(install: Install, picture: Path, tmp_path: Path, kind: str) -> None:
    code, said = AT_LISTING[kind]
    install(hostile=code)
    for arguments in ((), ("hostile",), ("--filter", "small")):
        shown = ttd("backbones", *arguments)
        assert shown.exit_code == 0 and errors(shown) == []
        assert "  error: plugin 'hostile_plugin' (hostile 3.4) failed to list the models" in shown.stdout
        assert said in shown.stdout
    listed = {family["family"]: family for family in json.loads(ttd("backbones", "--json").stdout)}
    assert listed["hostile"]["error"] and not listed["hostile"]["backbones"]
    assert ttd("plugins").exit_code == 0
    others_work(picture, tmp_path)


@pytest.mark.parametrize("kind", IN_USE)
def test_an_adapter_that_fails_or_lies_in_use(install: Install, picture: Path, tmp_path: Path, kind: str) -> None:
    code, said = IN_USE[kind]
    install(hostile=code)
    assert ttd("backbones").exit_code == ttd("plugins").exit_code == 0
    for command in (
        ("tags", picture, "a dog", "--tag", "dog", "--backbone"),
        ("heatmap", picture, "a dog", "--tag", "dog", "--out", tmp_path / "maps.png", "--backbone"),
    ):
        one_error(ttd(*command, "hostile:small"), "plugin 'hostile_plugin' (hostile 3.4)", said)
    assert not (tmp_path / "maps.png").exists()
    others_work(picture, tmp_path)


@pytest.mark.parametrize("kind", ["load raises", "encode_image raises", "encode_image exits", "another grid"])
def test_the_other_commands(install: Install, tmp_path: Path, kind: str) -> None:
    install(hostile=IN_USE[kind][0])
    checked = ttd("check-adapter", "hostile:small")
    assert checked.exit_code == 1 and "Traceback" not in checked.output
    assert json.loads(ttd("check-adapter", "hostile:small", "--json").stdout)["ok"] is False
    one_error(ttd("demo", "--backbone", "hostile:small", "--out", tmp_path / "demo"))
    one_error(ttd("calibrate", "hostile:small", "--scenes", 8))


def test_one_family_of_two_distributions(install: Install, picture: Path, tmp_path: Path) -> None:
    install(one=HEALTHY, two=HEALTHY)
    both = "registered by plugin 'one_plugin' (one 3.4) and by plugin 'two_plugin' (two 3.4)"
    assert both in ttd("plugins").stdout
    assert "hostile" not in ttd("backbones").stdout
    for command in (
        ("tags", picture, "a dog", "--backbone"),
        ("heatmap", picture, "a dog", "--out", tmp_path / "maps.png", "--backbone"),
        ("demo", "--out", tmp_path / "demo", "--backbone"),
    ):
        one_error(ttd(*command, "hostile:small"), both, "TTD_LOAD_PLUGINS")
    one_error(ttd("backbones", "hostile"), both)
    assert "Traceback" not in ttd("check-adapter", "hostile:small").output
    others_work(picture, tmp_path)


def test_one_family_twice_in_one_plugin(install: Install, picture: Path, tmp_path: Path) -> None:
    code = HEAD + "\nplugin = FakePlugin(Family(), Family())\n"
    install(hostile=code)
    assert "error: registers family 'hostile' twice; the first counts" in ttd("plugins").stdout
    assert ttd("tags", picture, "a dog", "--backbone", "hostile:small").exit_code == 0
    others_work(picture, tmp_path)


def test_a_tag_extractor_that_raises(install: Install, picture: Path) -> None:
    code = HEAD + (
        f"\nclass Extractor:\n    def __call__(self, captions):\n        {BOOM}\n"
        "class Tags:\n    @hookimpl\n    def register_tag_extractors(self, register):\n"
        "        register('hostile', Extractor)\nplugin = Tags()\n"
    )
    install(hostile=code)
    result = ttd("tags", picture, "a dog", "--tags", "hostile", "--backbone", "healthy:small")
    one_error(result, "ZeroDivisionError: over nothing")


def test_a_bug_of_our_own_keeps_its_traceback(install: Install, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ttd_plugins.method import similarity

    install()

    def broken(*_: object) -> None:
        raise LookupError("ours")

    monkeypatch.setattr(similarity, "tag_maps", broken)
    result = ttd("tags", picture, "a dog", "--tag", "dog", "--backbone", "healthy:small")
    assert isinstance(result.exception, LookupError)


def test_the_real_command_with_such_plugins_on_the_path(install: Install, picture: Path) -> None:
    folder = install(hostile=LYING["another grid"][0], wreck=AT_LOADING["exits at import"][0])
    path = os.pathsep.join([str(folder), str(Path(__file__).parent), *(path for path in sys.path if path)])

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = "from ttd_plugins.cli import main; main()"
        environment = {**os.environ, "PYTHONPATH": path, "TTD_LOAD_PLUGINS": "healthy,hostile,wreck"}
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=environment
        )

    done = run("tags", str(picture), "a dog", "--tag", "dog", "--backbone", "hostile:small")
    assert done.returncode == 2 and done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first.startswith("warning: plugin 'wreck_plugin' (wreck 3.4): could not be imported: SystemExit: 7")
    assert second.startswith("error: plugin 'hostile_plugin' (hostile 3.4) breaks the adapter contract: encode_image")
    used = run("tags", str(picture), "a dog", "--tag", "dog", "--backbone", "healthy:small", "--json")
    assert used.returncode == 0, used.stderr
