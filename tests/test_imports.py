"""Rules about imports that the house lives by: downward only, and nothing slow before it is needed."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "mlakit"
OPERATIONS = {"decode", "prefill", "sparse", "indexer", "concat", "cache", "quant", "merge", "rope", "paged"}

# A layer may import from the layers below it, and from itself.
LAYERS = [
    {
        "dims",
        "hardware",
        "testing",
        "dispatch",
        "hopper_compile",
        "hopper_counters",
        "hopper_descriptors",
        "hopper_linear",
        "triton_e4m3",
        "triton_launch",
        "triton_pieces",
        "triton_ragged",
    },
    OPERATIONS,
    {"nn", "compat"},
    {"backends"},
    {"bench", "distributed"},
    {"studies", "report"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _imports() -> list[tuple[Path, str]]:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import; the house writes imports in full"
                modules = [node.module or ""]
                if node.module == "mlakit":
                    modules = [f"mlakit.{alias.name}" for alias in node.names]
            else:
                continue
            found += [(path, module) for module in modules if module.split(".")[0] == "mlakit"]
    return found


def _part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(("path", "module"), [p for p in _imports() if _part(p[0]) != "__init__"], ids=str)
def test_imports_point_downward(path, module):
    here, there = _part(path), [*module.split("."), ""][1]
    if there in ("", "__version__"):
        return
    assert there in LEVEL, f"{path} imports {module}, which has no place in the house yet: give it one above"
    assert LEVEL[there] <= LEVEL[here], f"{path} imports {module}, which is above it"
    if here in OPERATIONS and there in OPERATIONS and here != there:
        public = module.split(".")[2:] in ([], ["api"], ["reference"])
        assert public, f"{path} imports {module}: operations may use one another's api and reference only"


def test_every_folder_has_a_place():
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert folders - {"configs"} <= set(LEVEL)


@cache
def _loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.splitlines()[-1]  # whatever the statement printed comes before
    return {name.split(".")[0] for name in modules.split()}


def test_importing_mlakit_loads_nothing_slow():
    assert not _loaded_by("import mlakit") & {"torch", "triton", "numpy", "pydantic", "rich", "yaml", "matplotlib"}


def test_help_loads_nothing_slow():
    # Under 0.3 s is the promise; what breaks it is an import, and that can be tested without a clock.
    statement = (
        "from mlakit.cli.main import main\n"
        "for command in ('', 'bench', 'compare', 'report', 'completion', 'study', 'study k-concat', 'backends',\n"
        "                'configs', 'limits', 'env'):\n"
        "    try: main([*command.split(), '--help'])\n"
        "    except SystemExit: pass\n"
    )
    assert not _loaded_by(statement) & {"torch", "triton", "numpy", "pydantic", "rich", "yaml", "matplotlib"}


def test_planning_needs_no_torch():
    statement = (
        "from mlakit.bench import config_file, plan, runner, formatter\n"
        "import mlakit.cli.bench_run\n"
        "for name in config_file.packaged():\n"
        "    plan.make_plan(plan.settings_for(config_file.load(name), {}, cpu=True), 'cpu')\n"
    )
    assert not _loaded_by(statement) & {"torch", "triton", "matplotlib"}


def test_operations_import_no_triton():
    # torch itself may load triton; what must not happen is that ours does it beyond that.
    names = sorted(path.name for path in SOURCE.iterdir() if path.name in OPERATIONS)
    assert "decode" in names
    imports = "; ".join(f"import mlakit.{name}" for name in names)
    assert "triton" not in _loaded_by(imports) - _loaded_by("import torch")


def test_public_names_exist():
    import mlakit

    for name in mlakit.__all__:
        assert getattr(mlakit, name) is not None
    assert set(mlakit.__all__) <= set(dir(mlakit))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mlakit.nonsense  # noqa: B018 - the access is what is tested
