"""Rows without a worker: a made-up device, and times from a function of the config."""

from collections.abc import Callable

from mlakit.bench.config import BenchmarkConfig
from mlakit.bench.results import BenchmarkResult, LimitRow, TimingRow
from mlakit.bench.runner import Device

CEILINGS = {"copy_bytes_per_s": 4e12, "read_bytes_per_s": 4.4e12, "flops_per_s": 8e14}
ENVIRONMENT = {"device": {"name": "a made-up GPU"}}

# Seconds; or a status with its reason.
Outcome = float | tuple[str, str]


def timing(median: float, half: float) -> TimingRow:
    """Times whose 95% interval is `half` wide on either side of the median."""
    return TimingRow(
        median=median, mean=median, std=0, min=median, max=median, p20=median, p80=median,
        ci95=(median - half, median + half), samples=[median],
    )  # fmt: skip


def fake_rows(
    monkeypatch, outcome: Callable[[BenchmarkConfig], Outcome], *, device: str = "cuda:0", noise: float = 0.002
) -> list[BenchmarkConfig]:
    """From now on a study's rows come from `outcome`; gives the list of those measured."""
    measured = []

    def measure(meter, config):
        measured.append(config)
        found = outcome(config)
        if isinstance(found, tuple):
            return BenchmarkResult(config=config, status=found[0], error=found[1])
        limit = LimitRow(flops=1, bytes=1, seconds=found / 2, bound="memory")
        return BenchmarkResult(config=config, timing=timing(found, noise * found), limit=limit)

    fake_device(monkeypatch, device)
    monkeypatch.setattr("mlakit.bench.runner.Meter._measure", measure)
    return measured


def fake_device(monkeypatch, device: str) -> None:
    """From now on studies take a device's word for what it is, and nobody measures its ceilings."""

    def probe(name, dtypes, listener):
        found = {dtype: {"device": device, "dtype": dtype, **CEILINGS} for kind in dtypes.values() for dtype in kind}
        return Device(device, ENVIRONMENT, found)

    monkeypatch.setattr("mlakit.studies.bench_rows.probe", probe)
