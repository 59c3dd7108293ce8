import sys
from types import SimpleNamespace

import pytest

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.limits import Ceilings
from mlakit.bench.measure import measure_row
from mlakit.hardware import DeviceInfo, pretend
from tests.support import fake_peers
from tests.support.fake_flashinfer import flashinfer

CEILINGS = Ceilings("a CPU", "bfloat16", 1e10, 1e10, 1e11)
# Every top-level package that a backend looks for: absent in a test unless it installs a fake.
PEERS = ("flash_attn_interface", "flash_attn", "flash_mla", "flashinfer", "vllm")


def device(*capability: int) -> DeviceInfo:
    """This CPU, looking to the backends like a GPU of a compute capability; without one like what it is."""
    found = (capability[0], capability[1]) if capability else None
    return DeviceInfo("cpu", 0, "a GPU in disguise", found, 132, 2**20, 2**34)


@pytest.fixture
def peers(monkeypatch):
    """The fakes' modules, with no real library in reach."""
    for name in [name for name in sys.modules if name.partition(".")[0] in PEERS]:
        monkeypatch.delitem(sys.modules, name)
    for name in PEERS:
        monkeypatch.setitem(sys.modules, name, None)  # importing it says that there is no such module
    monkeypatch.setattr("mlakit.backends.flashinfer_common._WORKSPACE_BYTES", 2**20)
    return SimpleNamespace(**{**vars(fake_peers), "flashinfer": flashinfer})


@pytest.fixture
def install(monkeypatch, peers):
    """Makes fake modules importable under their own names."""

    def make(*modules):
        for module in modules:
            top = module.__name__.partition(".")[0]
            if top != module.__name__ and sys.modules.get(top) is None:
                monkeypatch.setitem(sys.modules, top, peers._module(top, "0.99"))
            monkeypatch.setitem(sys.modules, module.__name__, module)
            for name in ("mla", "prefill", "decode"):  # FlashInfer's submodules
                if hasattr(module, name):
                    monkeypatch.setitem(sys.modules, f"{module.__name__}.{name}", getattr(module, name))

    return make


@pytest.fixture
def measure():
    """Measures a small row on a CPU that looks like a GPU of some compute capability (Hopper if none is given)."""

    def run(backend: str, batch_spec: str, *, capability=(9, 0), standard=False, **fields):
        model = {"model": "tiny-gqa", "block_size": 16} if standard else {"model": "deepseek-v2-lite", "num_q_heads": 3}
        small = {"num_layers": 2, "dtype": "bf16", "device": "cpu", "repeats": 1, "warmup_iters": 0, "l2": "hot"}
        config = BenchmarkConfig(backend=backend, batch_spec=batch_spec, **{**model, **small, **fields})
        with pretend(device(*capability)):
            return measure_row(config, CEILINGS)

    return run
