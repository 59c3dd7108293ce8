"""What the studies of several methods on one job keep of each, and read back from a record. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self


@dataclass
class MethodResult:
    """One method on one job: seconds, or why there are none. `peak_mib` is what a call took on top of its inputs."""

    mean: float | None = None
    median: float | None = None
    std: float | None = None
    ci95: tuple[float, float] | None = None
    peak_mib: float | None = None
    reason: str = ""


@dataclass
class MethodRow:
    """All methods on one job; what the job is, a subclass says in fields of its own."""

    methods: dict[str, MethodResult] = field(default_factory=dict, kw_only=True)

    def mean(self, method: str) -> float | None:
        """Mean seconds of a method, None if it has no time."""
        return self.methods[method].mean if method in self.methods else None

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """What a record holds of a row."""
        own = {name.name: found[name.name] for name in fields(cls)}
        names = [name.name for name in fields(MethodResult)]
        own["methods"] = {
            method: MethodResult(**{name: result[name] for name in names})
            for method, result in found["methods"].items()
        }
        return cls(**own)
