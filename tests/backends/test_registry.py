import sys

import pytest

from mlakit.backends import registry
from mlakit.backends.base import Backend
from mlakit.bench.config import BenchmarkConfig

OURS = ["torch_naive", "torch_absorb", "sdpa"]
# The seven that the suite's documentation names: each is a name that a user may give.
FIELD = ["flash", "triton", "flashinfer", "cutlass_mla", "flashinfer_mla", "flashattn_mla", "flashmla"]

PLUGIN = """
from mlakit.backends.base import Available, Backend, Parameter

class Good(Backend):
    name = "plugin_good"
    attention = frozenset({"standard"})
    extra_parameters = (Parameter("chunk", int, "tokens at once", minimum=1),)

    def availability(self, device):
        return Available("1.2")

class NoBackend:
    pass
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes a module importable, and a distribution that declares the given entry points."""
    count = 0

    def make(*lines: str, group: str = registry.ENTRY_POINT_GROUP) -> None:
        nonlocal count
        count += 1
        (tmp_path / "mlakit_test_plugin.py").write_text(PLUGIN)
        info = tmp_path / f"mlakit_test_plugin_{count}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mlakit-test-plugin-{count}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        registry._declared.cache_clear()

    yield make
    sys.modules.pop("mlakit_test_plugin", None)
    monkeypatch.undo()
    registry._declared.cache_clear()


@pytest.mark.parametrize(
    ("given", "ours"),
    # vLLM's enum names, vLLM's own configs, this project's spelling, and stray blanks; a path is left alone.
    [
        ("FLASHMLA", "flashmla"),
        ("FLASH_ATTN_MLA", "flashattn_mla"),
        ("flash_attn_mla", "flashattn_mla"),
        ("flashattn_mla", "flashattn_mla"),
        ("FLASH_ATTN", "flash"),
        ("TRITON_ATTN", "triton"),
        ("TRITON_MLA", "vllm_triton_mla"),
        ("CUTLASS_MLA", "cutlass_mla"),
        ("FLASHINFER_MLA", "flashinfer_mla"),
        ("FLASHINFER", "flashinfer"),
        ("TORCH_SDPA", "sdpa"),
        ("Torch_Absorb", "torch_absorb"),
        (" sdpa ", "sdpa"),
        ("my.module:MyClass", "my.module:MyClass"),
    ],
)
def test_spellings(given, ours):
    assert registry.normalize(given) == ours
    assert registry.is_known(ours)
    assert registry.check_name(given) == ours


def test_own_backends_come_first():
    assert registry.names()[:3] == OURS


@pytest.mark.parametrize("name", OURS)
def test_own_backends_load_under_their_name(name):
    backend = registry.load(name)
    assert isinstance(backend, Backend)
    assert backend.name == name
    assert backend.summary
    assert registry.attention_kinds(name) == backend.attention
    assert registry.load(name.upper()).name == name


@pytest.mark.parametrize("name", FIELD)
def test_the_field_is_known(name):
    # "mla" in a name is a name for MLA; the three others are for standard attention.
    assert registry.is_known(name)
    assert registry.attention_kinds(name) == {"mla" if "mla" in name else "standard"}


@pytest.mark.parametrize("name", sorted(registry.WITHOUT_ADAPTER))
def test_without_adapter(name):
    with pytest.raises(ValueError, match=f"no adapter for {name} "):
        registry.load(name)
    assert name not in registry.names()


@pytest.mark.parametrize(
    ("name", "meant"),
    # A letter too few, a letter too many, two letters swapped, in capitals as vLLM writes it.
    [("sdp", "sdpa"), ("flashmlaa", "flashmla"), ("torch_niave", "torch_naive"), ("CUTLAS_MLA", "cutlass_mla")],
)
@pytest.mark.parametrize("function", [registry.check_name, registry.load, registry.attention_kinds])
def test_unknown_names_the_nearest_and_all(function, name, meant):
    with pytest.raises(ValueError, match=f"unknown backend '{name}'; did you mean '{meant}'") as error:
        function(name)
    for known in [*OURS, *FIELD]:
        assert known in str(error.value)


@pytest.mark.parametrize(
    ("path", "reason"),
    # No such module, no such class, no class named, and a class that is something else.
    [
        ("mlakit_no_such_module:X", "No module named 'mlakit_no_such_module'"),
        ("mlakit.backends.sdpa:SPDA", "no attribute 'SPDA'"),
        ("mlakit.backends.sdpa:", "cannot be loaded from"),
        ("mlakit.backends.sdpa.deeper:X", "cannot be loaded from"),
        ("fractions:Fraction", "fractions:Fraction is no subclass of mlakit.backends.Backend"),
    ],
)
def test_paths_that_lead_nowhere(path, reason):
    with pytest.raises(ValueError, match=f"backend '{path}'") as error:
        registry.load(path)
    assert reason in str(error.value)


def test_path():
    assert registry.load("mlakit.backends.sdpa:SDPA").name == "sdpa"
    assert registry.attention_kinds("mlakit.backends.torch_absorb:TorchAbsorb") == {"mla"}


def test_path_of_a_module_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "mlakit_test_local.py").write_text(PLUGIN)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    try:
        assert registry.load("mlakit_test_local:Good").name == "plugin_good"
    finally:
        sys.modules.pop("mlakit_test_local", None)


def test_entry_point(install):
    before = registry.names()
    install("plugin_good = mlakit_test_plugin:Good")
    assert registry.names() == [*before, "plugin_good"]
    assert registry.is_known("plugin_good")
    assert registry.load("PLUGIN_GOOD").name == "plugin_good"
    assert registry.attention_kinds("plugin_good") == {"standard"}
    assert list(registry.load("plugin_good").parameters) == ["chunk"]
    config = BenchmarkConfig.model_validate({"backend": "plugin_good", "batch_spec": "q1s1k"})
    assert config.attention == "standard"
    with pytest.raises(ValueError, match="did you mean 'plugin_good'"):
        registry.check_name("plugin_god")


def test_entry_points_of_other_groups_are_not_ours(install):
    install("plugin_good = mlakit_test_plugin:Good", group="somebody.else")
    assert not registry.is_known("plugin_good")


def test_own_names_cannot_be_taken_over(install):
    install("sdpa = mlakit_test_plugin:Good", "plugin_good = mlakit_test_plugin:Good")
    assert registry.load("sdpa").name == "sdpa"
    assert registry.names().count("sdpa") == 1


@pytest.mark.parametrize(
    ("value", "reason"),
    # An uninstalled library, a renamed class, and something that is no backend: each costs an error with both names.
    [
        (
            "mlakit_no_such_module:X",
            "cannot be loaded from mlakit_no_such_module:X: ModuleNotFoundError: No module named",
        ),
        ("mlakit_test_plugin:Renamed", "cannot be loaded from mlakit_test_plugin:Renamed: AttributeError: module"),
        ("mlakit_test_plugin:NoBackend", "mlakit_test_plugin:NoBackend is no subclass of mlakit.backends.Backend"),
    ],
)
def test_broken_entry_point(install, value, reason):
    install(f"plugin_broken = {value}")
    assert "plugin_broken" in registry.names()  # listed, so that `mlakit backends` can say what is wrong with it
    with pytest.raises(ValueError, match="backend 'plugin_broken'") as error:
        registry.load("plugin_broken")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "path", ["json:dumps", "mlakit.dims:MLADims", "mlakit.dims:MLA_PRESETS", "..x:Y", ":", "broken:X", "raises:X"]
)
def test_whatever_a_path_leads_to_the_error_is_one_line(path, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "raises.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="backend "):
        registry.load(path)
