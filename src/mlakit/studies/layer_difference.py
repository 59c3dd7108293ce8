"""How far two outputs of a layer are apart, and whether that is rounding."""

import math
from dataclasses import asdict, dataclass

import torch

from mlakit.studies.layer_options import WORST_TOKEN


@dataclass(frozen=True)
class Difference:
    """How far two outputs [..., dim] are apart; NaN and infinity anywhere make everything infinite.

    Attributes:
        max_abs: largest absolute difference.
        mean_abs: mean absolute difference.
        relative: |a - b| / |b|, Euclidean norms over everything: unlike an absolute difference it does not depend on
            the outputs' size.
        worst_token: the largest |a - b| / |b| of a token: one wrong token among thousands shows in no norm over all.
        cosine: similarity of the two as one vector.
    """

    max_abs: float
    mean_abs: float
    relative: float
    worst_token: float
    cosine: float

    def agrees(self, tolerance: float) -> bool:
        """Whether the two are the same up to rounding."""
        return self.relative <= tolerance and self.worst_token <= WORST_TOKEN * tolerance

    def as_json(self) -> dict[str, float | None]:
        """Plain values; what is not finite, which JSON does not have, as None."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


def difference(actual: torch.Tensor, expected: torch.Tensor) -> Difference:
    """Compare in float64, a request at a time.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"outputs must have one shape, got {tuple(actual.shape)} and {tuple(expected.shape)}")
    largest = total = squares = worst = dot = aa = bb = 0.0
    for mine, other in zip(actual, expected, strict=True):
        a, b = mine.double(), other.double()
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            return Difference(math.inf, math.inf, math.inf, math.inf, 0.0)
        error = (a - b).abs()
        norms = b.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        largest, total = max(largest, float(error.max())), total + float(error.sum())
        worst = max(worst, float((error.norm(dim=-1) / norms).max()))
        squares += float(error.square().sum())
        dot, aa, bb = dot + float((a * b).sum()), aa + float(a.square().sum()), bb + float(b.square().sum())
    relative = math.sqrt(squares / bb) if bb else math.inf if squares else 0.0
    cosine = dot / math.sqrt(aa * bb) if aa and bb else float(aa == bb)
    return Difference(largest, total / max(actual.numel(), 1), relative, worst, cosine)
