"""What the values of a study's flags may be."""

from collections.abc import Iterable


def parse_device(name: str) -> str:
    """Resolve and check a device: "cuda:N" or "cpu".

    Raises:
        ValueError: no such device here.
    """
    import torch

    from mlakit.hardware import device_info

    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: expected cuda:0, cpu or auto, got {name!r}") from None
    info = device_info(device)
    return f"cuda:{info.index}" if info.is_cuda else "cpu"


def whole(flag: str, value: str | int, least: int) -> int:
    """A whole number of at least `least`, or a ValueError that names the flag."""
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise ValueError(f"{flag}: expected a whole number of at least {least}, got {value!r}")
    return number


def whole_numbers(flag: str, values: Iterable[str | int], least: int = 1, *, keep_order: bool = False) -> list[int]:
    """Whole numbers, each once, ascending unless their order is the user's."""
    found = list(dict.fromkeys(whole(flag, value, least) for value in values))
    return found if keep_order else sorted(found)


def positive(flag: str, value: str | float) -> float:
    """A number above 0, or a ValueError that names the flag."""
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"{flag}: expected a number above 0, got {value!r}")
    return number
