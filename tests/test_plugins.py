"""Discovery, isolation, conflicts, names, and the two ways in."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import FakeAdapter, FakeFamily, FakeModel, FakePlugin, OtherModel
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ttd_plugins import cli, hookimpl, load, plugins, wrap
from ttd_plugins.adapter import API_VERSION, DenseAdapter
from ttd_plugins.errors import (
    AdapterConflictError,
    BackboneNameError,
    InputError,
    PluginError,
    PluginWarning,
    TagExtractionError,
    TTDError,
    UnsupportedModelError,
)
from ttd_plugins.plugins import (
    BackboneName,
    families,
    family_for_model,
    get_family,
    list_backbones,
    list_plugins,
    make_tag_extractor,
    parse_name,
    tag_extractors,
    temporary_plugin,
)


class Entry:
    """What importlib.metadata gives for one entry point; ``plugin`` may be an exception to raise on import."""

    def __init__(self, name: str, plugin: object, distribution: str | None = "strange-dist") -> None:
        self.name = name
        self.plugin = plugin
        self.dist = SimpleNamespace(name=distribution, version="1.2") if distribution else None

    def load(self) -> object:
        if isinstance(self.plugin, BaseException):
            raise self.plugin
        return self.plugin


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Call it with entries, and they are all the entry points of a process that has loaded nothing yet."""

    def use(*entries: Entry) -> None:
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: list(entries))
        monkeypatch.setattr("ttd_plugins.plugins.discovery._loaded", None)

    monkeypatch.delenv("TTD_LOAD_PLUGINS", raising=False)
    use()
    return use


def quiet_listing() -> dict[str, plugins.PluginInfo]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)
        return {plugin.name: plugin for plugin in list_plugins()}


# Hooks ---------------------------------------------------------------------------------------------------------------


def test_hook_register_adapters() -> None:
    with temporary_plugin(FakePlugin(), name="mine") as info:
        assert info.families == ("fake",)
        assert info.hooks == ("register_adapters",)
        assert isinstance(get_family("fake"), FakeFamily)
        assert "fake" in families()
    assert "fake" not in families()


def test_hook_register_tag_extractors() -> None:
    class Shout:
        name = "shout"

        def __init__(self, mark: str = "!") -> None:
            self.mark = mark

        def __call__(self, captions: list[str]) -> list[list[str]]:
            return [[caption.upper() + self.mark] for caption in captions]

    class Plugin:
        @hookimpl
        def register_tag_extractors(self, register: Callable[..., None]) -> None:
            register("shout", Shout)

    with temporary_plugin(Plugin()) as info:
        assert info.name == "Plugin"
        assert info.tag_extractors == ("shout",)
        assert tag_extractors()["shout"] is Shout
        assert make_tag_extractor("shout", mark="?")(["dog"]) == [["DOG?"]]
    assert "shout" not in tag_extractors()


def test_hook_adapter_for_model_is_accepted_and_ignored_with_one_warning(install: Install) -> None:
    class OldPlugin(FakePlugin):
        @hookimpl
        def adapter_for_model(self, model: object) -> str | None:
            raise AssertionError("the hook is never called")

    install(Entry("old", OldPlugin()), Entry("new", FakePlugin(FakeFamily("other", OtherModel))))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = FakeModel()
        adapter = wrap(model)
        assert family_for_model(OtherModel()) == "other"
        list_plugins()
    assert isinstance(adapter, FakeAdapter)
    assert adapter.model is model
    (warning,) = caught
    assert warning.category is FutureWarning
    assert str(warning.message).startswith(
        "plugin 'old' (strange-dist 1.2) implements the hook adapter_for_model, which is ignored"
    )
    found = {plugin.name: plugin for plugin in list_plugins()}
    assert found["old"].hooks == ("adapter_for_model", "register_adapters")
    assert found["old"].deprecated_hooks == ("adapter_for_model",)
    assert found["old"].error is None
    assert found["new"].deprecated_hooks == ()
    shown = CliRunner().invoke(cli.app, ["plugins"]).stdout
    assert "hooks: adapter_for_model (deprecated, ignored), register_adapters\n" in shown


def test_claims_decides_which_family_takes_an_object() -> None:
    model = FakeModel()
    with temporary_plugin(FakePlugin()):
        adapter = wrap(model)
        assert isinstance(adapter, FakeAdapter)
        assert adapter.model is model
        assert family_for_model(model) == "fake"
    with pytest.raises(UnsupportedModelError):
        wrap(model)


# Loading and isolation -----------------------------------------------------------------------------------------------


def test_built_in_plugins_are_found_as_anybodys_are() -> None:
    found = {plugin.name: plugin for plugin in list_plugins()}
    assert found["ttd_plugins.tag_extractors.word_tags"].tag_extractors == ("words",)
    assert found["stanza"].distribution == "ttd-plugins"
    assert found["stanza"].error is None


def test_loading_happens_once_and_late(install: Install) -> None:
    loads: list[str] = []

    class Counted(Entry):
        def load(self) -> object:
            loads.append(self.name)
            return super().load()

    install(Counted("once", FakePlugin()))
    assert loads == []
    families(), list_plugins(), tag_extractors()
    assert loads == ["once"]


@pytest.mark.parametrize("error", [ImportError("no module called grobl"), RuntimeError("boom"), SystemExit(3)])
def test_a_plugin_that_cannot_be_imported_is_isolated_and_reported(install: Install, error: BaseException) -> None:
    install(Entry("broken", error), Entry("works", FakePlugin()))
    with pytest.warns(PluginWarning, match=r"'broken' \(strange-dist 1.2\): could not be imported"):
        found = {plugin.name: plugin for plugin in list_plugins()}
    assert found["broken"].distribution == "strange-dist"
    assert found["broken"].version == "1.2"
    assert type(error).__name__ in (found["broken"].error or "")
    assert str(error) in (found["broken"].error or "")
    assert found["works"].error is None
    assert isinstance(load("fake:small"), FakeAdapter)
    with pytest.raises(BackboneNameError, match="not loaded: plugin 'broken'"):
        get_family("broken")


def test_a_plugin_whose_registration_raises_leaves_nothing_behind(install: Install) -> None:
    class Raises(FakePlugin):
        @hookimpl
        def register_tag_extractors(self, register: Callable[..., None]) -> None:
            register("early", list)
            raise ValueError("too late")

    install(Entry("raises", Raises()), Entry("works", FakePlugin(FakeFamily("other"))))
    found = quiet_listing()
    assert found["raises"].error == "raised in register_tag_extractors: ValueError: too late"
    assert found["raises"].hooks == found["raises"].families == found["raises"].tag_extractors == ()
    assert set(families()) == {"other"}
    assert set(tag_extractors()) == {"words"}
    assert plugins.plugin_manager().get_plugin("raises") is None


def test_an_unknown_hook_is_refused_with_a_suggestion(install: Install) -> None:
    class Misspelt(FakePlugin):
        @hookimpl
        def register_adaptors(self, register: Callable[..., None]) -> None: ...

    class Optional(FakePlugin):
        @hookimpl(optionalhook=True)
        def hook_of_tomorrow(self) -> None: ...

    install(Entry("misspelt", Misspelt()), Entry("optional", Optional()))
    found = quiet_listing()
    assert "unknown hook 'register_adaptors'; did you mean 'register_adapters'" in (found["misspelt"].error or "")
    assert found["optional"].error is None
    assert set(families()) == {"fake"}


def test_a_hook_with_an_argument_that_does_not_exist_is_refused(install: Install) -> None:
    class Plugin:
        @hookimpl
        def register_adapters(self, registre: Callable[..., None]) -> None: ...

    install(Entry("odd", Plugin()), Entry("works", FakePlugin()))
    found = quiet_listing()
    assert "registre" in (found["odd"].error or "")
    assert plugins.plugin_manager().get_plugin("odd") is None
    assert set(families()) == {"fake"}


def test_one_object_under_two_entry_points_is_registered_once(install: Install) -> None:
    plugin = FakePlugin()
    install(Entry("first", plugin), Entry("second", plugin))
    found = quiet_listing()
    assert found["first"].error is None
    assert found["second"].error == "is registered already, as plugin 'first'"
    assert set(families()) == {"fake"}


def test_two_distributions_may_use_one_entry_point_name(install: Install) -> None:
    install(
        Entry("clip", FakePlugin(FakeFamily("one")), "dist-a"), Entry("clip", FakePlugin(FakeFamily("two")), "dist-b")
    )
    assert {plugin.name for plugin in list_plugins()} == {"ttd_plugins.tag_extractors.word_tags", "clip", "clip@dist-b"}
    assert set(families()) == {"one", "two"}


def test_a_plugin_that_asks_for_plugins_while_they_load_is_refused(install: Install) -> None:
    class Early(FakePlugin):
        @hookimpl
        def register_tag_extractors(self, register: Callable[..., None]) -> None:
            families()

    install(Entry("early", Early()))
    assert "while they are being loaded" in (quiet_listing()["early"].error or "")
    assert families() == {}


@pytest.mark.parametrize("version", [0, API_VERSION + 1])
def test_another_version_of_the_contract_isolates_the_family(install: Install, version: Any) -> None:
    other = FakeFamily("other")
    other.api_version = version
    install(Entry("both", FakePlugin(FakeFamily(), other)))
    found = quiet_listing()["both"]
    assert found.families == ("fake",)
    assert f"implements version {version}" in (found.error or "")
    assert "other" not in families()
    with pytest.raises(PluginError, match=rf"plugin 'both' .*supports version {API_VERSION}; install"):
        load("other:small")


@pytest.mark.parametrize("family", ["not a family", FakeFamily("UPPER"), FakeFamily("with:colon"), FakeFamily("")])
def test_what_is_no_family_is_refused(install: Install, family: Any) -> None:
    install(Entry("odd", FakePlugin(family)))
    assert "is refused" in (quiet_listing()["odd"].error or "")
    assert families() == {}


@pytest.mark.parametrize(("name", "factory"), [("two words", list), ("", list), (3, list), ("fine", "not callable")])
def test_what_is_no_tag_extractor_is_refused(install: Install, name: Any, factory: Any) -> None:
    class Plugin:
        @hookimpl
        def register_tag_extractors(self, register: Callable[..., None]) -> None:
            register(name, factory)

    install(Entry("odd", Plugin()))
    assert "is refused" in (quiet_listing()["odd"].error or "")
    assert set(tag_extractors()) == {"words"}


# Duplicates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
def test_a_family_name_of_two_plugins_belongs_to_neither(install: Install, order: int) -> None:
    entries = [
        Entry("a", FakePlugin(FakeFamily("fake"), FakeFamily("mine")), "dist-a"),
        Entry("b", FakePlugin(FakeFamily("fake")), "dist-b"),
    ]
    install(*entries[::order])
    with pytest.warns(PluginWarning, match="registered by plugin 'a'"):
        found = {plugin.name: plugin for plugin in list_plugins()}
    for name in "ab":
        assert "family 'fake' is registered by plugin 'a' (dist-a 1.2) and by plugin 'b' (dist-b 1.2)" in (
            found[name].error or ""
        )
    assert found["a"].families == ("mine",)
    assert set(families()) == {"mine"}
    for use in (get_family, parse_name, load):
        with pytest.raises(AdapterConflictError, match=r"plugin 'a' .* plugin 'b' .*TTD_LOAD_PLUGINS"):
            use("fake:small" if use is not get_family else "fake")
    assert isinstance(load("mine:small"), FakeAdapter)


def test_a_tag_extractor_of_ours_stays_ours() -> None:
    class Plugin:
        @hookimpl
        def register_tag_extractors(self, register: Callable[..., None]) -> None:
            register("words", list)

    with temporary_plugin(Plugin(), name="rival") as info:
        assert info.tag_extractors == ()
        assert tag_extractors()["words"] is not list
        assert "registers tag extractor 'words', which is a name of ttd-plugins; it is ignored" in str(info.error)
        assert make_tag_extractor("words")(["a dog"]) == [["dog"]]
    assert make_tag_extractor("words")(["a dog"]) == [["dog"]]


# The environment variable --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "loaded"),
    [
        (None, {"one", "two"}),
        ("", set()),
        (" , ", set()),
        ("a", {"one"}),
        (" b ,a", {"one", "two"}),
        ("Dist_B", {"two"}),
        ("dist-a,b", {"one", "two"}),
        ("ttd_plugins.tag_extractors.word_tags", set()),
    ],
)
def test_the_environment_variable_limits_what_is_loaded(
    install: Install, monkeypatch: pytest.MonkeyPatch, value: str | None, loaded: set[str]
) -> None:
    install(Entry("a", FakePlugin(FakeFamily("one")), "dist-a"), Entry("b", FakePlugin(FakeFamily("two")), "dist.b"))
    if value is not None:
        monkeypatch.setenv("TTD_LOAD_PLUGINS", value)
    assert set(families()) == loaded
    assert set(tag_extractors()) == {"words"}
    assert all(plugin.error is None for plugin in list_plugins())


def test_an_unknown_name_in_the_environment_variable_is_reported(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Entry("siglip", FakePlugin()))
    monkeypatch.setenv("TTD_LOAD_PLUGINS", "siglipp")
    with pytest.warns(PluginWarning, match="TTD_LOAD_PLUGINS: unknown plugin 'siglipp'; did you mean 'siglip'"):
        assert families() == {}
    assert "unknown plugin" in (quiet_listing()["siglipp"].error or "")


# A real distribution -------------------------------------------------------------------------------------------------


@pytest.fixture
def distribution(tmp_path: Path) -> Path:
    """A folder with two installed distributions, one of which does not import."""
    for name, module, code in (
        ("stranger", "stranger_ttd", "from fakes import FakeFamily, FakePlugin\nplugin = FakePlugin()\n"),
        ("wreck", "wreck_ttd", "import a_library_that_is_not_there\n"),
    ):
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-3.4.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 3.4\n")
        target = f"{module}:plugin" if name == "stranger" else module
        (info / "entry_points.txt").write_text(f"[ttd_plugins]\n{name} = {target}\n")
    return tmp_path


def test_real_distributions_are_found(distribution: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(distribution))
    monkeypatch.delenv("TTD_LOAD_PLUGINS", raising=False)
    monkeypatch.setattr("ttd_plugins.plugins.discovery._loaded", None)
    found = quiet_listing()
    assert (found["stranger"].distribution, found["stranger"].version) == ("stranger-ttd", "3.4")
    assert found["stranger"].families == ("fake",)
    assert "a_library_that_is_not_there" in (found["wreck"].error or "")
    assert isinstance(load("fake:small"), FakeAdapter)


def test_the_command_line_survives_a_wreck(distribution: Path) -> None:
    code = "from ttd_plugins.cli import main; main(['plugins', '--json'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(distribution), str(Path(__file__).parent)]),
            "TTD_LOAD_PLUGINS": "stranger-ttd,wreck",
        },
    )
    assert done.returncode == 0, done.stderr
    listed = {plugin["name"]: plugin for plugin in json.loads(done.stdout)}
    assert set(listed) == {"ttd_plugins.tag_extractors.word_tags", "stranger", "wreck"}
    assert listed["stranger"]["families"] == ["fake"]
    assert done.stderr.count("warning: plugin 'wreck' (wreck-ttd 3.4): could not be imported") == 1
    assert "Traceback" not in done.stderr


# temporary_plugin ----------------------------------------------------------------------------------------------------


def test_a_temporary_plugin_goes_after_an_error_too() -> None:
    def use() -> None:
        with temporary_plugin(FakePlugin(), name="brief"):
            raise KeyError("a failing test")

    with pytest.raises(KeyError):
        use()
    assert "fake" not in families()
    assert "brief" not in {plugin.name for plugin in list_plugins()}


def test_a_temporary_plugin_that_cannot_be_registered_fails_its_test() -> None:
    class Plugin:
        @hookimpl
        def register_adapters(self, register: Callable[..., None]) -> None:
            raise ValueError("no luck")

    with pytest.raises(PluginError, match=r"plugin 'bad' raised in register_adapters: ValueError: no luck"):
        temporary_plugin(Plugin(), name="bad").__enter__()
    plugin = FakePlugin()
    with temporary_plugin(plugin, name="good"):
        with pytest.raises(PluginError, match="another plugin has its name"):
            temporary_plugin(FakePlugin(), name="good").__enter__()
        with pytest.raises(PluginError, match="is registered already"):
            temporary_plugin(plugin, name="again").__enter__()
        assert "fake" in families()
    assert "fake" not in families()


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake() -> Any:
    family = FakeFamily()
    with temporary_plugin(FakePlugin(family), name="fake_plugin"):
        yield family


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("fake:small@good", ("fake", "small", "good")),
        ("fake:small", ("fake", "small", "good")),
        ("fake:small@random", ("fake", "small", "random")),
        (" fake:small ", ("fake", "small", "good")),
        ("fake:hub:org/model@b", ("fake", "hub:org/model", "b")),
        ("fake:small@/tmp/a:b.pt", ("fake", "small", "/tmp/a:b.pt")),
        ("fake:a@b@c", ("fake", "a@b", "c")),
    ],
)
def test_a_name_is_split_at_the_first_colon_and_the_last_at(
    fake: FakeFamily, name: str, parts: tuple[str, str, str]
) -> None:
    assert parse_name(name) == BackboneName(*parts)


part = st.text(st.characters(blacklist_categories=("Zs", "Zl", "Zp", "Cc", "Cs")), min_size=1)


@given(model=part, weights=part.filter(lambda text: "@" not in text))
def test_every_complete_name_is_read_back_as_it_was_written(model: str, weights: str) -> None:
    name = BackboneName("fake", model, weights)
    with temporary_plugin(FakePlugin()):
        assert parse_name(str(name)) == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fake", r"'fake' is a family and names no model; write fake:MODEL with one of hub:org/model, small"),
        ("small", r"did you mean 'fake:small'\?"),
        (":small", r"did you mean 'fake:small'\?"),
        ("", r"does not follow family:model@weights; families: .*fake"),
        ("fake:", r"names no model; write fake:MODEL@WEIGHTS with one of hub:org/model, small"),
        ("fake:@good", r"names no model"),
        ("fake:small@", r"names no weights after '@'; write fake:small@WEIGHTS with 'random' or one of good"),
        ("fake:hub:org/model", r"names no weights; write fake:hub:org/model@WEIGHTS with 'random' or one of a, b"),
        ("fale:small", r"unknown family 'fale'; did you mean 'fake'\?"),
        ("FAKE:small", r"did you mean 'fake'\?"),
        ("fake:smal", r"unknown model of fake 'smal'; did you mean 'small'\?"),
        (3, "a backbone name is a string"),
    ],
)
def test_a_name_with_a_part_missing_or_misspelt_lists_the_choices(fake: FakeFamily, name: Any, said: str) -> None:
    for use in (parse_name, load):
        with pytest.raises(BackboneNameError, match=said):
            use(name)
    assert fake.loaded == []


def test_random_weights_are_never_a_default(fake: FakeFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "default_weights", lambda model: "random")
    with pytest.raises(PluginError, match="unless it says @random"):
        load("fake:small")
    assert load("fake:small@random").description.weights == "random"


# load ----------------------------------------------------------------------------------------------------------------


def test_load_gives_an_adapter_in_evaluation_mode(fake: FakeFamily) -> None:
    adapter = load("fake:small")
    assert fake.loaded == [("small", "good")]
    assert not any(module.training for module in adapter.modules())
    assert not adapter.has_lora


@pytest.mark.parametrize("lora", [2, {"rank": 2, "alpha": 4.0, "dropout": 0.1}])
def test_load_adds_lora(fake: FakeFamily, lora: Any) -> None:
    adapter = load("fake:small", lora=lora)
    assert adapter.has_lora
    assert {min(parameter.shape) for parameter in adapter.lora_parameters()} == {2}
    assert not any(module.training for module in adapter.modules())


def test_load_moves_to_a_device(fake: FakeFamily) -> None:
    assert load("fake:small", device="cpu").device == torch.device("cpu")
    with pytest.raises(InputError, match="device 'meta' cannot be used: tensors of the device meta have no values"):
        load("fake:small", device="meta")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"lora": 0}, "rank of LoRA is a whole number of at least 1, not 0"),
        ({"lora": True}, "lora is a rank, a dict"),
        ({"lora": "8"}, "lora is a rank, a dict"),
        ({"lora": {"rnak": 8}}, "unknown argument of lora 'rnak'; did you mean 'rank'"),
        ({"lora": {"rank": 2.5}}, "rank of LoRA is a whole number"),
        ({"device": "grobl"}, "device 'grobl' cannot be used"),
        ({"device": "cuda:77"}, "device 'cuda:77' cannot be used"),
        ({"widht": 6}, "unknown option of family 'fake' 'widht'; did you mean 'width'"),
        ({"model": "x"}, "unknown option of family 'fake' 'model'"),
    ],
)
def test_load_refuses_options_before_it_reads_weights(fake: FakeFamily, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load("fake:small", **arguments)
    assert fake.loaded == []


def test_options_reach_the_family(fake: FakeFamily) -> None:
    assert load("fake:small", width=10).description.embedding_width == 10


def test_what_a_family_raises_becomes_one_sentence_that_names_its_plugin(
    fake: FakeFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: str, weights: str) -> DenseAdapter:
        raise ZeroDivisionError("over\nnothing")

    monkeypatch.setattr(fake, "load", broken)
    with pytest.raises(
        PluginError, match=r"^plugin 'fake_plugin' failed to load fake:small@good: ZeroDivisionError: over nothing$"
    ) as caught:
        load("fake:small")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    monkeypatch.setattr(fake, "load", lambda model, weights: FakeModel())
    with pytest.raises(PluginError, match="returned a FakeModel, not a DenseAdapter"):
        load("fake:small")
    monkeypatch.setattr(fake, "default_weights", broken)
    with pytest.raises(PluginError, match="plugin 'fake_plugin' failed to list the models"):
        load("fake:small")


def test_our_own_errors_pass_unchanged(fake: FakeFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: str, weights: str) -> DenseAdapter:
        raise UnsupportedModelError("the weights are from the future")

    monkeypatch.setattr(fake, "load", refuse)
    with pytest.raises(UnsupportedModelError, match=r"^the weights are from the future$"):
        load("fake:small")


# wrap ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_wrap_leaves_the_mode_as_it_is(fake: FakeFamily, training: bool) -> None:
    model = FakeModel().train(training)
    adapter = wrap(model)
    assert adapter.training is training
    assert all(module.training is training for module in model.modules())


def test_wrap_adds_lora_and_gives_the_model_back(fake: FakeFamily) -> None:
    model = FakeModel()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = wrap(model, lora=2)
    assert adapter.has_lora
    assert adapter.unload() is model
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_wrap_refuses_misspelt_options(fake: FakeFamily) -> None:
    with pytest.raises(InputError, match="unknown option of family 'fake' 'tokeniser'"):
        wrap(FakeModel(), tokeniser=None)


def test_an_object_that_nobody_takes_is_named_with_the_families(fake: FakeFamily) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        wrap(OtherModel())
    for part_of_it in ("fakes.OtherModel", "fake", "docs/"):
        assert part_of_it in str(caught.value)


@pytest.mark.parametrize(
    ("thing", "said"), [("fake:small", "pass the name 'fake:small' to load()"), (FakeAdapter(FakeModel()), "already")]
)
def test_wrap_tells_what_it_takes(thing: Any, said: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        wrap(thing)
    assert said in str(caught.value)


@pytest.mark.parametrize("order", [1, -1])
def test_two_claimants_are_found_whatever_their_order(install: Install, order: int) -> None:
    pair = [FakePlugin(FakeFamily("one")), FakePlugin(FakeFamily("two"))][::order]
    with temporary_plugin(pair[0], name="p"), temporary_plugin(pair[1], name="q"):
        with pytest.raises(AdapterConflictError) as caught:
            wrap(FakeModel())
        for part_of_it in ("fakes.FakeModel", "family 'one'", "family 'two'", "plugin 'p'", "plugin 'q'"):
            assert part_of_it in str(caught.value)


def test_two_families_of_one_plugin_that_claim_one_object_are_found() -> None:
    with temporary_plugin(FakePlugin(FakeFamily("one"), FakeFamily("two")), name="p"):
        with pytest.raises(AdapterConflictError, match="family 'one' of plugin 'p' and by family 'two' of plugin 'p'"):
            wrap(FakeModel())
        with pytest.raises(UnsupportedModelError):
            wrap(OtherModel())


def test_a_claim_that_raises_is_skipped_where_another_family_claims_the_object(fake: FakeFamily) -> None:
    class Raising(FakeFamily):
        def claims(self, model: object) -> bool:
            raise AttributeError("visual")

    with temporary_plugin(FakePlugin(Raising("raising")), name="raises"):
        with pytest.warns(PluginWarning, match="'raises' failed to decide whether family 'raising' claims .*visual"):
            assert isinstance(wrap(FakeModel()), FakeAdapter)
        with pytest.raises(PluginError, match=r"no family claims fakes.OtherModel, and plugin 'raises'") as caught:
            wrap(OtherModel())
        assert caught.value.__cause__ is not None
        assert isinstance(caught.value.__cause__.__cause__, AttributeError)


def test_what_wrap_raises_names_the_plugin(fake: FakeFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, *, tokenizer: Any, preprocess: Any) -> DenseAdapter:
        raise KeyError("proj")

    monkeypatch.setattr(fake, "wrap", broken)
    with pytest.raises(PluginError, match=r"plugin 'fake_plugin' failed to wrap fakes.FakeModel: KeyError: 'proj'"):
        wrap(FakeModel())


# Listings ------------------------------------------------------------------------------------------------------------


def test_backbones_are_listed_and_filtered(fake: FakeFamily) -> None:
    (info,) = list_backbones("fake")
    assert (info.family, info.summary, info.plugin, info.error) == ("fake", "a fake", "fake_plugin", None)
    assert [(one.model, one.weights, one.default_weights) for one in info.backbones] == [
        ("small", ("good",), "good"),
        ("hub:org/model", ("a", "b"), None),
    ]

    def names(pattern: str) -> list[str]:
        return [one.model for one in list_backbones("fake", pattern)[0].backbones]

    assert names("SMALL") == ["small"]
    assert names("fake:*@b") == ["hub:org/model"]
    assert names("small@good") == names("sm*@g??d") == names("fake:small") == ["small"]
    assert names("nothing") == []
    assert {one.family for one in list_backbones()} == set(families())


def test_a_family_that_cannot_list_its_models_does_not_stop_the_others(
    fake: FakeFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[str]:
        raise OSError("the disk is gone")

    monkeypatch.setattr(fake, "models", broken)
    listed = {info.family: info for info in list_backbones()}
    assert listed["fake"].backbones == ()
    assert "plugin 'fake_plugin' failed to list the models" in (listed["fake"].error or "")
    with pytest.raises(BackboneNameError):
        list_backbones("fakee")


def test_tag_extractors_are_made_by_name() -> None:
    with pytest.raises(TagExtractionError, match=r"unknown tag extractor 'word'; did you mean 'words'\?"):
        make_tag_extractor("word")
    with pytest.raises(
        InputError, match="unknown option of tag extractor 'words' 'stopwords'; did you mean 'stop_words'"
    ):
        make_tag_extractor("words", stopwords=None)


def test_what_a_factory_raises_names_the_plugin() -> None:
    def factory() -> None:
        raise RuntimeError("out of ink")

    class Plugin:
        @hookimpl
        def register_tag_extractors(self, register: Callable[..., None]) -> None:
            register("inky", factory)

    with (
        temporary_plugin(Plugin(), name="printer"),
        pytest.raises(PluginError, match="'printer' failed to build tag extractor 'inky': RuntimeError: out of ink"),
    ):
        make_tag_extractor("inky")


def test_every_error_of_ours_is_a_ttd_error_on_one_line(fake: FakeFamily) -> None:
    for use in (
        lambda: load("fake"),
        lambda: load("nofamily:x"),
        lambda: wrap(OtherModel()),
        lambda: load("fake:x@y", a=1),
    ):
        with pytest.raises(TTDError) as caught:
            use()
        assert "\n" not in str(caught.value)
        assert textwrap.shorten(str(caught.value), 10_000) == str(caught.value)
