"""What the study `sparse-prefill` compares: test data, and attention naive, dense and sparse.

The names and arguments are those of the demonstration notebook that the study comes from.
"""

import importlib
from collections.abc import Callable

import torch

from mlakit.bench.memory import available_bytes
from mlakit.bench.timing import time_calls

FAR = 2147480000  # pads rows of indices, and is no key's
NEAR_KEYS = 20000  # most indices lie in the last so many keys
_FLASH_MLA = ("flash_mla", "vllm.third_party.flashmla.flash_mla_interface")

SparseKernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]
]


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def generate_sparse_test_data(
    b: int,
    s_q: int,
    s_kv: int,
    topk: int,
    h_q: int,
    h_kv: int,
    d_qk: int,
    seed: int = 42,
    *,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random queries and keys in bfloat16, and for each query the keys to attend to: 31 of 32 among the last 20000,
    with repetitions as the draw has them, the others anywhere, in random order; padded with an index that is no key's
    where `topk` is more than there are.

    No step is taken token by token: 4096 x 2048 indices into 131072 keys take a GPU a second.

    Returns:
        q [b, s_q, h_q, d_qk], kv [b, s_kv, h_kv, d_qk], indices [b, s_q, h_kv, topk] int32.
    """
    device = default_device() if device is None else torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    q = _normal((b, s_q, h_q, d_qk), generator)
    kv = _normal((b, s_kv, h_kv, d_qk), generator)
    rows, drawn = b * s_q * h_kv, min(topk, s_kv)
    indices = torch.full((rows, topk), FAR, dtype=torch.int32, device=device)
    newest = max(0, s_kv - NEAR_KEYS)
    # A random order of all keys for each row is a sort of random numbers; a few rows at a time, as that takes memory.
    step = max(1, 2**25 // max(s_kv, topk, 1))
    for first in range(0, rows, step):
        part = indices[first : first + step]
        count = part.shape[0]
        anywhere = torch.rand((count, s_kv), device=device, generator=generator).argsort(dim=1)[:, :drawn]
        near = torch.randint(newest, max(s_kv - 1, newest + 1), (count, drawn), device=device, generator=generator)
        is_near = torch.randint(0, 32, (count, drawn), device=device, generator=generator) < 31
        part[:, :drawn] = torch.where(is_near, near, anywhere).int()
        if drawn < topk:
            order = torch.rand((count, topk), device=device, generator=generator).argsort(dim=1)
            part.copy_(part.gather(1, order))
    return q, kv, indices.view(b, s_q, h_kv, topk)


def generate_dense_test_data(
    b: int,
    s_q: int,
    s_kv: int,
    h_q: int,
    d_qk: int,
    d_v: int,
    seed: int = 42,
    *,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q [b, s_q, h_q, d_qk], k [b, s_kv, h_q, d_qk] and v [b, s_kv, h_q, d_v] in bfloat16: every query head has
    keys and values of its own.
    """
    device = default_device() if device is None else torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    q, k = _normal((b, s_q, h_q, d_qk), generator), _normal((b, s_kv, h_q, d_qk), generator)
    return q, k, _normal((b, s_kv, h_q, d_v), generator)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(shape, dtype=torch.bfloat16, device=generator.device, generator=generator)
    return x.div_(10).clamp_(-10, 10)


def benchmark_function(
    func: Callable[[], object], warmup: int = 10, rep: int = 50, *, device: torch.device | str | None = None
) -> float:
    """Mean milliseconds of a call, from memory and not from the L2 cache.

    Raises:
        ValueError: `rep` is below 1 or `warmup` below 0.
    """
    device = default_device() if device is None else device
    return time_calls([func], device, l2="cold", repeats=rep, warmup=warmup).mean * 1e3


def tokens_a_chunk(q: torch.Tensor, topk: int) -> int:
    """How many queries `naive_sparse_attention` takes at a time: their keys and scores fill a quarter of the memory
    that is free, and 8 GiB at most.
    """
    heads, width = q.shape[1], q.shape[2]
    a_token = topk * (width * q.element_size() + heads * (2 * 4 + 2 * q.element_size()))
    return max(1, min(q.shape[0], min(available_bytes(q.device) // 4, 2**33) // max(a_token, 1)))


def naive_sparse_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    *,
    chunk: int | None = None,
) -> torch.Tensor:
    """Attention over the keys that `indices` name, in plain PyTorch: gather, product, softmax, product.

    Gathering for all queries at once takes s_q * topk * d_qk elements, so it is done for `chunk` queries at a time.
    A query without a valid index gets zeros.

    Args:
        q: [s_q, h_q, d_qk].
        kv: [s_kv, h_kv, d_qk], h_kv dividing h_q.
        indices: [s_q, h_kv, topk]; those outside of [0, s_kv) are ignored.
        sm_scale: multiplies the scores.
        d_v: the first so many entries of a key are its value.
        chunk: queries at a time; None for `tokens_a_chunk`.

    Returns:
        [s_q, h_q, d_v] in q's dtype.
    """
    s_q, h_q, _ = q.shape
    s_kv, h_kv, _ = kv.shape
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros((s_q, h_q, d_v))
    if s_kv == 0 or indices.shape[-1] == 0:
        return out
    chunk = chunk or tokens_a_chunk(q, indices.shape[-1])
    group = h_q // h_kv
    for first in range(0, s_q, chunk):
        for head in range(h_kv):
            rows, heads = slice(first, first + chunk), slice(head * group, (head + 1) * group)
            chosen = indices[rows, head]
            invalid = (chosen < 0) | (chosen >= s_kv)
            selected = kv[chosen.masked_fill(invalid, 0).long(), head]  # [chunk, topk, d_qk]
            scores = torch.matmul(q[rows, heads], selected.transpose(1, 2)).to(compute)
            scores = scores.mul_(sm_scale).masked_fill_(invalid[:, None], -torch.inf)
            weights = torch.softmax(scores, dim=-1).masked_fill_(invalid.all(dim=-1)[:, None, None], 0.0)
            out[rows, heads] = torch.matmul(weights.to(q.dtype), selected[..., :d_v])
    return out


def dense_mla_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float) -> torch.Tensor:
    """Attention of every query to every key, by mlakit's dense prefill kernel (on a CPU its reference).

    Args:
        q: [b, s_q, h_q, d_qk].
        k: [b, s_kv, h_kv, d_qk]; one head for all queries (MQA) or one for each (MHA).
        v: [b, s_kv, h_kv, d_v].
        sm_scale: multiplies the scores.

    Returns:
        [b, s_q, h_q, d_v].
    """
    from mlakit.prefill import mla_prefill

    b, s_q = q.shape[:2]
    starts = torch.arange(b + 1, dtype=torch.int32, device=q.device)
    out, _ = mla_prefill(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        starts * s_q,
        starts * k.shape[1],
        softmax_scale=sm_scale,
        causal=False,
        max_seqlen_q=s_q,
    )
    return out.view(b, s_q, *out.shape[1:])


def sparse_mla_attention(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, sm_scale: float, d_v: int = 512
) -> torch.Tensor:
    """Attention over the keys that `indices` name, by mlakit's sparse kernel (on a CPU its reference); arguments and
    result as `naive_sparse_attention`.
    """
    from mlakit.sparse import mla_sparse_prefill

    return mla_sparse_prefill(q, kv, indices, softmax_scale=sm_scale, d_v=d_v)[0]


def find_flash_mla() -> SparseKernel | str:
    """FlashMLA's sparse prefill, or why it is not there."""
    found = "not installed"
    for name in _FLASH_MLA:
        try:
            return importlib.import_module(name).flash_mla_sparse_fwd
        except ModuleNotFoundError:
            continue
        except Exception as error:  # an extension built for another PyTorch may fail in any way
            found = f"cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return found


def flash_mla_attention(
    kernel: SparseKernel, q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, sm_scale: float, d_v: int = 512
) -> torch.Tensor:
    """The same by FlashMLA's kernel, as `find_flash_mla` found it."""
    return kernel(q, kv, indices, sm_scale, d_v)[0]
