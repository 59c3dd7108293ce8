"""When a kernel's result counts as right: as close to float64 as eager PyTorch is, within a factor of two.

The bound is derived from the number format and the operation, not chosen: the same operation in eager PyTorch, in the
same dtype with a float32 softmax, is compared with float64 too, and its error is the yardstick (the method of
FlashAttention's own tests).
"""

import math
from dataclasses import dataclass

import torch

ERROR_RATIO = 2.0
COSINE_DISTANCE = 1e-5
LSE_ERROR = 1e-3
SUMMATION_ROUNDINGS = 8


@dataclass(frozen=True)
class Comparison:
    """How far a result is from the reference, and whether that is acceptable. `reason` is empty if it is."""

    max_error: float
    rms_error: float
    max_error_allowed: float
    rms_error_allowed: float
    cosine_distance: float
    reason: str = ""

    @property
    def ok(self) -> bool:
        """True if the result counts as right."""
        return not self.reason


def compare(actual: torch.Tensor, reference: torch.Tensor, eager: torch.Tensor) -> Comparison:
    """Compare a result with the float64 (or float32) reference, using eager PyTorch's error as the yardstick.

    Allowed are twice eager's largest and twice its root-mean-square error, each plus one rounding of the result's dtype
    (so that an eager result that happens to be exact leaves room for the last bit) and eight of float32 (in which all
    of them sum, each in an order of its own: with float32 inputs that is the whole error), and a cosine distance of
    1e-5 over the whole tensor, or twice eager's own where eager misses that: it rounds the scores to the dtype, which
    large scores feel.

    Raises:
        ValueError: the three tensors differ in shape.
    """
    if not actual.shape == reference.shape == eager.shape:
        raise ValueError(
            f"shapes must agree: result {tuple(actual.shape)}, reference {tuple(reference.shape)}, "
            f"eager {tuple(eager.shape)}"
        )
    if reference.numel() == 0:
        return Comparison(0.0, 0.0, 0.0, 0.0, 0.0)
    ref = reference.double()
    error = (actual.double() - ref).abs()
    eager_error = (eager.double() - ref).abs()
    rounding = torch.finfo(actual.dtype).eps / 2 + SUMMATION_ROUNDINGS * torch.finfo(torch.float32).eps / 2
    largest = float(ref.abs().max())
    scale = float(ref.square().mean().sqrt())
    max_allowed = ERROR_RATIO * float(eager_error.max()) + rounding * largest
    rms_allowed = ERROR_RATIO * float(eager_error.square().mean().sqrt()) + rounding * scale
    max_error = float(error.max())
    rms_error = float(error.square().mean().sqrt())
    distance = _cosine_distance(actual.double(), ref)
    distance_allowed = max(COSINE_DISTANCE, ERROR_RATIO * _cosine_distance(eager.double(), ref))

    not_finite = int((~torch.isfinite(actual) & torch.isfinite(reference)).sum())
    reason = ""
    if not_finite:
        reason = f"{not_finite} of {actual.numel()} values are NaN or infinite where the reference is finite"
    elif max_error > max_allowed:
        where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        reason = f"largest error {max_error:.3g} at {where}, allowed {max_allowed:.3g} (2x eager PyTorch's)"
    elif rms_error > rms_allowed:
        reason = f"root-mean-square error {rms_error:.3g}, allowed {rms_allowed:.3g} (2x eager PyTorch's)"
    elif not distance <= distance_allowed:
        reason = f"cosine distance {distance:.3g}, allowed {distance_allowed:.3g}"
    return Comparison(max_error, rms_error, max_allowed, rms_allowed, distance, reason)


def compare_lse(actual: torch.Tensor, reference: torch.Tensor, eager: torch.Tensor | None = None) -> Comparison:
    """Compare log-sum-exps (natural log): within 1e-3 absolute, -inf exactly where the reference has it.

    `eager` is given where a kernel may round more than the sums: keys to the query's dtype (then it is what float64
    makes of keys so rounded), or e4m3 products as tensor cores add them (`eager_e4m3_lse`). Twice as much as it is
    away is allowed too.

    Raises:
        ValueError: the shapes differ, or `actual` is not float32 or float64.
    """
    for given in (actual, eager):
        if given is not None and given.shape != reference.shape:
            raise ValueError(f"lse must have shape {tuple(reference.shape)}, got {tuple(given.shape)}")
    if actual.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"lse must be float32, got {actual.dtype}")
    actual, ref = actual.double(), reference.double()
    empty = torch.isneginf(ref)
    misplaced = int((torch.isneginf(actual) != empty).sum())
    error = _finite_difference(actual, ref)
    max_error = float(error.max()) if error.numel() else 0.0
    allowed = LSE_ERROR
    if eager is not None and eager.numel():
        largest = float(_finite_difference(eager.double(), ref).max())
        allowed = max(LSE_ERROR, ERROR_RATIO * largest)
    rms_error = float(error.square().mean().sqrt()) if error.numel() else 0.0
    reason = ""
    if misplaced:
        reason = f"lse is -inf in {misplaced} rows where the reference is finite, or the reverse"
    elif not max_error <= allowed:
        reason = f"lse error {max_error:.3g}, allowed {allowed:.3g}"
    return Comparison(max_error, rms_error, allowed, allowed, 0.0, reason)


def assert_close(actual: torch.Tensor, reference: torch.Tensor, eager: torch.Tensor, what: str = "out") -> None:
    """Raise AssertionError, with the numbers, unless `compare` finds the result right."""
    found = compare(actual, reference, eager)
    if not found.ok:
        raise AssertionError(f"{what}: {found.reason}")


def _finite_difference(actual: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """|actual - reference|, and 0 where the reference is -inf."""
    empty = torch.isneginf(reference)
    return torch.where(empty, 0.0, actual - torch.where(empty, 0.0, reference)).abs()


def _cosine_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    # 1 - 2<x,y>/(|x|^2+|y|^2): unlike the plain cosine it also sees a wrong length.
    norms = float(x.square().sum() + y.square().sum())
    if norms == 0:
        return 0.0
    distance = 1 - 2 * float((x * y).sum()) / norms
    return math.nan if math.isnan(distance) else max(distance, 0.0)
