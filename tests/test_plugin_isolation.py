"""What a plugin does when it is imported stays with it: it prints nothing, changes nothing and takes no names."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeFamily, FakePlugin
from test_hostile_plugins import HEALTHY, Install, install, ttd, write_distribution  # noqa: F401
from test_plugins import Entry
from test_plugins import install as install_entries  # noqa: F401

from ttd_plugins import hookimpl
from ttd_plugins.errors import PluginError, PluginWarning
from ttd_plugins.plugins import families, list_backbones, list_plugins, load, tag_extractors
from ttd_plugins.plugins import isolation as isolation_module

ROOT = Path(__file__).parents[1]
LOUD = """
import os, sys
print("printed")
sys.stdout.write("written")
os.write(1, b"to the descriptor")
os.system("echo from a child")
"""
SELFISH = """
import logging, os, random, signal, sys, warnings
import numpy, torch
torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
torch.manual_seed(5); numpy.random.seed(5); random.seed(5)
warnings.simplefilter("error")
warnings.showwarning = lambda *a, **k: None
logging.basicConfig(level=logging.DEBUG, force=True)
logging.disable(logging.CRITICAL)
logging.getLogger("ttd_plugins").disabled = True
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.pop("TTD_TEST_VARIABLE", None)
os.chdir("/")
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.excepthook = lambda *a: None
"""


def state() -> dict[str, Any]:
    return {
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "seed": (torch.initial_seed(), np.random.get_state()[1][:4].tolist()),  # type: ignore[index]
        "warnings": (list(warnings.filters), warnings.showwarning),
        "logging": (
            logging.root.level, list(logging.root.handlers), logging.root.manager.disable,
            logging.getLogger("ttd_plugins").disabled,
        ),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "signal": signal.getsignal(signal.SIGINT),
        "hook": sys.excepthook,
    }  # fmt: skip


def test_global_state_is_restored_and_named(
    install: Install,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setenv("TTD_TEST_VARIABLE", "kept")
    # A shell ignores SIGINT for jobs in the background, and the plugin's change would be none.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))
    install(selfish=SELFISH + HEALTHY.replace('"hostile"', '"selfish"'))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        before = state()
        assert "selfish" in families()
        assert state() == before
    said = " ".join(str(one.message) for one in told if issubclass(one.category, PluginWarning))
    for part in (
        "torch's default dtype", "torch's gradient mode", "the configuration of logging", "HF_HUB_OFFLINE",
        "CUDA_VISIBLE_DEVICES", "TTD_TEST_VARIABLE", "the working directory", "the handler of SIGINT",
        "sys.excepthook",
    ):  # fmt: skip
        assert re.search(rf"plugin 'selfish_plugin' \(selfish 3\.4\): changes (the environment variable )?{part}", said)
    assert os.environ["TTD_TEST_VARIABLE"] == "kept"
    assert "healthy_plugin" not in said


def test_state_is_restored_after_an_import_that_fails(install: Install) -> None:  # noqa: F811
    install(selfish=SELFISH + "raise RuntimeError('at the end')\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = state()
        assert set(families()) == {"healthy"}
        assert state() == before


def console(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from ttd_plugins.cli import main; main(sys.argv[1:])"
    paths = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "adapters"), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )


def test_a_plugin_that_prints_does_not_corrupt_json(tmp_path: Path) -> None:
    printing = LOUD + HEALTHY.replace('"hostile"', '"loud"').replace(
        "class Plugin(", "Family.models = lambda self: (print('in models'), ['small'])[1]\nclass Plugin("
    )
    write_distribution(tmp_path, "loud", printing)
    for command in (["plugins", "--json"], ["backbones", "loud", "--json"]):
        done = console(tmp_path, *command, TTD_LOAD_PLUGINS="loud")
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)) >= 1
        for text in ("printed", "written", "to the descriptor", "from a child"):
            assert text in done.stderr
    assert "in models" in done.stderr


def test_a_hanging_import_is_named_on_the_terminal(tmp_path: Path) -> None:
    write_distribution(tmp_path, "slow", "import time\ntime.sleep(1.5)\n" + HEALTHY)
    quick = "import ttd_plugins.plugins.isolation as one; one.SLOW_SECONDS = 0.3\n"
    (tmp_path / "sitecustomize.py").write_text("")
    code = quick + "from ttd_plugins.cli import main; main(['plugins'])"
    paths = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "adapters"), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths, "TTD_LOAD_PLUGINS": "slow"},
    )
    assert done.returncode == 0, done.stderr
    assert "plugin 'slow_plugin' (slow 3.4) is still being imported after 0.3 seconds" in done.stderr
    assert "TTD_PLUGINS_DENY=slow" in done.stderr


def test_a_quick_import_is_not_named(
    install_entries: Any,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(isolation_module, "SLOW_SECONDS", 0.2)
    install_entries(Entry("quick", FakePlugin()))
    families()
    time.sleep(0.4)
    assert "still being imported" not in caplog.text


# Plugins without marks -----------------------------------------------------------------------------------------------


class Unmarked:
    def register_adapters(self, register: Any) -> None:
        register(FakeFamily())


class Half(Unmarked):
    @hookimpl
    def register_tag_extractors(self, register: Any) -> None:
        register("half", list)


class Empty:
    pass


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        (Unmarked(), "has register_adapters without @hookimpl of ttd_plugins"),
        (Half(), "has register_adapters without @hookimpl of ttd_plugins"),
        (Empty(), "has no hook, so that it does nothing"),
    ],
)
def test_a_plugin_without_marks_is_named(install_entries: Any, plugin: object, said: str) -> None:  # noqa: F811
    install_entries(Entry("odd", plugin))
    with pytest.warns(PluginWarning, match=rf"plugin 'odd' \(strange-dist 1\.2\): {said}"):
        found = {one.name: one for one in list_plugins()}
    assert said in str(found["odd"].error)
    assert ("half" in tag_extractors()) == isinstance(plugin, Half)


@pytest.mark.parametrize(
    ("version", "said"), [("1", "'1' of the type str"), (True, "of the type bool"), (1.0, "float")]
)
def test_a_version_that_is_no_whole_number_is_told(install_entries: Any, version: Any, said: str) -> None:  # noqa: F811
    family = FakeFamily("other")
    family.api_version = version
    install_entries(Entry("odd", FakePlugin(family)))
    with pytest.warns(PluginWarning, match=f"its api_version is .*{said}.*api_version = 1"):
        assert families() == {}
    with pytest.raises(PluginError, match="write the whole number"):
        load("other:small")


# Names of our own ----------------------------------------------------------------------------------------------------


OURS = "ttd-plugins"


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", ["aaa", "fake", "zzz"])
def test_a_family_of_ours_stays_ours(install_entries: Any, name: str, order: int) -> None:  # noqa: F811
    own, rival = FakeFamily("fake"), FakeFamily("fake")
    install_entries(
        *[Entry("fake", FakePlugin(own), OURS), Entry(name, FakePlugin(rival, FakeFamily("more")), "a-rival")][::order]
    )
    with pytest.warns(PluginWarning, match=r"\(a-rival 1\.2\): registers family 'fake', which is a name of ttd-plug"):
        assert families()["fake"] is own
    assert "more" in families()
    found = {one.distribution: one for one in list_plugins()}
    assert found["a-rival"].families == ("more",)
    assert load("fake:small").distribution == (OURS, "1.2")
    assert load("more:small").distribution == ("a-rival", "1.2")


def test_where_ours_is_left_out_the_other_is_used_and_named(
    install_entries: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rival = FakeFamily("fake")
    monkeypatch.setenv("TTD_LOAD_PLUGINS", "a-rival")
    install_entries(Entry("fake", FakePlugin(), OURS), Entry("rival", FakePlugin(rival), "a-rival"))
    with pytest.warns(PluginWarning, match="whose own plugin is not loaded; it is used in its place"):
        assert families()["fake"] is rival


# The deny list -------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(install_entries: Any) -> Iterator[None]:  # noqa: F811
    class Bomb(Entry):
        def load(self) -> object:
            raise AssertionError("a denied plugin was imported")

    install_entries(Entry("good", FakePlugin(), "good-dist"), Bomb("bad", None, "bad.dist"))
    return


@pytest.mark.parametrize("value", ["bad", "bad-dist", "Bad_Dist", " x , bad.dist "])
def test_denied_plugins_are_not_imported(two: None, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TTD_PLUGINS_DENY", value)
    monkeypatch.setenv("TTD_LOAD_PLUGINS", "good,bad")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PluginWarning)
        assert set(families()) == {"fake"}
    found = {one.name: one for one in list_plugins()}
    assert found["bad"].error == "is not loaded, because TTD_PLUGINS_DENY names it"
    with pytest.raises(Exception, match=r"denied by TTD_PLUGINS_DENY: plugin 'bad' \(bad\.dist 1\.2\)"):
        load("other:small")


def test_the_option_denies_for_one_command(tmp_path: Path) -> None:
    write_distribution(tmp_path, "bomb", "import os\nos._exit(3)\n")
    done = console(tmp_path, "--deny-plugin", "bomb", "plugins", "--json", TTD_LOAD_PLUGINS="bomb")
    assert done.returncode == 0, done.stderr
    assert {one["name"]: one for one in json.loads(done.stdout)}["bomb_plugin"]["error"]
    assert console(tmp_path, "plugins", TTD_LOAD_PLUGINS="bomb", TTD_PLUGINS_DENY="bomb").returncode == 0
    assert console(tmp_path, "plugins", TTD_LOAD_PLUGINS="bomb").returncode == 3
    assert list_backbones  # the registry of this process is not touched
