"""Registries and how plugins are found."""

import sys
from fractions import Fraction

import pytest

from vjepa_fast import registry
from vjepa_fast.errors import ConfigError
from vjepa_fast.registry import Registry


def one():
    return 1


def other():
    return 2


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Write a plugin module and name it in the environment."""

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv(registry.VARIABLE, f" {name} ,")
        return name

    yield write
    for name in list(registry._loaded):
        if name.startswith("vf_plugin_"):
            del registry._loaded[name]
            sys.modules.pop(name, None)


def test_registers_by_name_and_lists_in_order():
    kinds = Registry("kind")
    assert kinds.register("b")(one) is one
    kinds.add("a", other)
    assert list(kinds) == ["b", "a"]
    assert len(kinds) == 2
    assert kinds["a"] is other
    assert "c" not in kinds


def test_the_same_name_twice_is_an_error_and_the_same_thing_twice_is_not():
    kinds = Registry("kind")
    kinds.add("a", one)
    kinds.add("a", one)
    with pytest.raises(ValueError, match=r"kind 'a' is registered twice: .*one and .*other"):
        kinds.add("a", other)
    kinds.add("b", Fraction(1, 2))
    kinds.add("b", Fraction(2, 4))
    with pytest.raises(ValueError, match=r"kind 'b' is registered twice: .*1, 2.* and .*1, 3"):
        kinds.add("b", Fraction(1, 3))


def test_a_check_sees_every_entry():
    def check(name, entry):
        if not callable(entry):
            raise TypeError(f"{name} must be callable")

    with pytest.raises(TypeError, match="a must be callable"):
        Registry("kind", check=check).add("a", 3)


def test_an_unknown_name_is_answered_with_the_closest():
    kinds = Registry("decoder")
    kinds.add("pyav", one)
    with pytest.raises(ConfigError, match=r"data.decoder: unknown decoder 'pyab'; accepted: pyav; did you mean pyav\?"):
        kinds.get_named("pyab", "data.decoder")
    assert kinds.get_named("pyav", "data.decoder") is one


def test_a_plugin_is_imported_once_when_a_registry_is_asked(plugin, monkeypatch):
    monkeypatch.setattr(sys, "vf_counts", 0, raising=False)
    name = plugin("vf_plugin_counts", "import sys\nsys.vf_counts = getattr(sys, 'vf_counts', 0) + 1\n")
    kinds = Registry("kind")
    assert list(kinds) == []
    assert len(kinds) == 0
    assert sys.vf_counts == 1
    assert registry.load_plugins()[name] == registry.VARIABLE


def test_a_plugin_that_cannot_be_imported_is_an_error_each_time(plugin):
    plugin("vf_plugin_broken", "import no_such_module_here\n")
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"plugin vf_plugin_broken \(VJEPA_FAST_PLUGINS\) cannot be imported: Mod"
        ):
            list(Registry("kind"))


def test_every_kind_names_a_registry():
    for kind in registry.KINDS:
        assert isinstance(registry.registry_of(kind), Registry), kind
