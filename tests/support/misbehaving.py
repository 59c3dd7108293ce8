"""Backends that go wrong, each in one way; for tests only. Named on the command line as misbehaving:Segfaults and so
on.
"""

import ctypes
import os
import signal
import threading
import time

import torch

from mlakit.backends.base import Available, Backend, Parameter, Unavailable
from mlakit.backends.torch_absorb import TorchAbsorb


class _Like(TorchAbsorb):
    """Right, but for what a subclass does."""

    def prepare_mqa(self, problem, **parameters):
        attend = super().prepare_mqa(problem)
        return lambda q, cache, out: self.spoil(attend(q, cache, out))

    def spoil(self, out):
        return out


class Right(_Like):
    name = "right"
    extra_parameters = (Parameter("chunk", int, "does nothing", minimum=1, maximum=64),)


class Segfaults(_Like):
    name = "segfaults"

    def spoil(self, out):
        return ctypes.string_at(0)


class Exits(_Like):
    name = "exits"

    def spoil(self, out):
        os._exit(7)


class KilledForMemory(_Like):
    """What the kernel's out-of-memory killer does."""

    name = "killed_for_memory"

    def spoil(self, out):
        os.kill(os.getpid(), signal.SIGKILL)


class Hangs(_Like):
    name = "hangs"

    def spoil(self, out):
        threading.Event().wait()


class OutOfMemory(_Like):
    name = "out_of_memory"

    def spoil(self, out):
        return torch.empty(2**55, dtype=torch.float32)


class LosesItsContext(_Like):
    """What a kernel that reads beyond its memory does to a process: this call fails, and so would every later one."""

    name = "loses_its_context"

    def known_limit(self, problem):
        return "the cache has more elements than this library can number"

    def spoil(self, out):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")


class Wrong(_Like):
    """A few percent off in one head of one token."""

    name = "wrong"

    def spoil(self, out):
        out[0, -1] *= 1.05
        return out


class Unwritten(_Like):
    """Leaves the last head of the last token as it found it."""

    name = "unwritten"

    def prepare_mqa(self, problem, **parameters):
        attend = super().prepare_mqa(problem)

        def run(q, cache, out):
            before = out[-1, -1].clone()
            attend(q, cache, out)
            out[-1, -1] = before
            return out

        return run


class FirstLayerOnly(_Like):
    """Keeps the first layer's cache, as a stale pointer would."""

    name = "first_layer_only"

    def prepare_mqa(self, problem, **parameters):
        attend = super().prepare_mqa(problem)
        kept = []

        def run(q, cache, out):
            kept.append(cache)
            return attend(q, kept[0], out)

        return run


class WearsOut(_Like):
    """Right while it is checked, wrong once it has been timed."""

    name = "wears_out"
    calls = 0

    def spoil(self, out):
        self.calls += 1
        return out if self.calls < 4 else out * 1.5


class ReadsPadding(_Like):
    """Reads whole pages, and with them the poison past each sequence's end."""

    name = "reads_padding"

    def prepare_mqa(self, problem, **parameters):
        attend = super().prepare_mqa(problem)
        pages = problem.batch.block_table.long()
        return lambda q, cache, out: attend(q, cache, out) + 0 * cache[pages].sum()


class WrongShape(_Like):
    name = "wrong_shape"

    def spoil(self, out):
        return out[:, :1]


class WrongLse(_Like):
    name = "wrong_lse"

    def spoil(self, out):
        return out, torch.zeros(out.shape[:2])


class Raises(_Like):
    name = "raises"

    def spoil(self, out):
        raise KeyError("what the library could not find")


class NotHere(_Like):
    name = "not_here"

    def availability(self, device):
        return Unavailable("needs compute capability 10.0, this is a CPU")


class Refuses(_Like):
    name = "refuses"

    def refusal(self, problem):
        return f"takes pages of 128 tokens, got {problem.batch.page_size}"


class Chatty(_Like):
    """Prints where the worker's own messages might be."""

    name = "chatty"

    def spoil(self, out):
        print("{not json")
        os.write(1, b"from C\n")
        return out


class NoBackend:
    """No Backend at all."""


class Standard(Backend):
    """Cannot do MLA."""

    name = "standard"
    attention = frozenset({"standard"})

    def availability(self, device):
        return Available("1.0")


class Slower(_Like):
    """Right, and slower by what the environment says, as another version of it might be."""

    name = "slower"

    def spoil(self, out):
        time.sleep(float(os.environ.get("SLOWER_BY", "0")))
        return out


class IllegalAddress(_Like):
    """An index far outside, on the GPU: every later CUDA call of the process fails."""

    name = "illegal_address"

    def spoil(self, out):
        out.flatten()[torch.tensor([2**40], device=out.device)]
        torch.cuda.synchronize()
        return out
