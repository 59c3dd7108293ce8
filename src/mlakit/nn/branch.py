"""Work beside work: while a CUDA graph is captured, kernels that do not need one another become branches of it."""

from contextlib import AbstractContextManager, nullcontext

import torch

_SIDES: dict[torch.device, torch.cuda.Stream] = {}


class Branch:
    """A second stream beside the current one, until `join`.

    Only while a graph is captured: launched one by one, a decode step's kernels wait for the host and not for one
    another, and a second stream would only cost it more. Elsewhere everything stays on the one stream.

    What is allocated inside may be used after `join`; what was allocated before must live until then.

        branch = Branch(device)
        with branch.inside():
            ...  # beside what follows
        ...
        branch.join()
    """

    def __init__(self, device: torch.device) -> None:
        self._side: torch.cuda.Stream | None = None
        if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_current_stream_capturing():
            return
        if device not in _SIDES:
            _SIDES[device] = torch.cuda.Stream(device)
        self._side = _SIDES[device]

    def inside(self) -> AbstractContextManager[object]:
        """A context whose kernels are the branch's; they come after what was launched before it, here and there."""
        if self._side is None:
            return nullcontext()
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        return torch.cuda.stream(self._side)

    def join(self) -> None:
        """Let what follows wait for the branch."""
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
            self._side = None
