"""The indexer's paged cache: of each page all e4m3 codes first, then all float32 scales.

A page of `page_size` tokens is page_size * dim bytes of codes (a token's dim codes together) followed by page_size * 4
bytes of scales, seen as uint8 [page_size, dim + 4]: the layout that DeepGEMM's `fp8_paged_mqa_logits` reads. Rows of
codes stay aligned to their own size, which they would not if each were followed by its scale.
"""

import torch

from mlakit.dispatch import check_dtype, check_shape, unobserved, why_not_triton
from mlakit.quant import act_quant

SCALE_BYTES = 4


def pack_index_cache(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Pack codes [pages, page_size, dim] float8_e4m3fn and scales [pages, page_size] float32 into a cache [pages,
    page_size, dim + 4] uint8.
    """
    pages, page_size, dim = codes.shape
    parts = (codes.reshape(pages, page_size * dim), scales.reshape(pages, page_size))
    packed = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
    return packed.view(pages, page_size, dim + SCALE_BYTES)


def unpack_index_cache(cache: torch.Tensor, dim: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes [pages, page_size, dim] and scales [pages, page_size] of a cache; the inverse of `pack_index_cache`."""
    pages, page_size = cache.shape[:2]
    flat = cache.reshape(pages, -1)
    codes, scales = flat[:, : page_size * dim], flat[:, page_size * dim :]
    return (
        codes.contiguous().view(torch.float8_e4m3fn).view(pages, page_size, dim),
        scales.contiguous().view(torch.float32).view(pages, page_size),
    )


def quantize_queries(
    q: torch.Tensor, weights: torch.Tensor, scale_fmt: str | None = "ue8m0"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize queries for the indexer, each head of each token by a scale of its own, and put the scale into the
    weight, where it makes no difference: relu(s * x) = s * relu(x) for s > 0.

    Args:
        q: [..., heads, dim] of any floating dtype.
        weights: [..., heads].
        scale_fmt: "ue8m0" rounds scales up to powers of two, as DeepSeek-V3.2 does; None does not.

    Returns:
        float8_e4m3fn [..., heads, dim] and float32 weights [..., heads].
    """
    codes, scales = act_quant(q, q.shape[-1], scale_fmt)
    return codes, weights.float() * scales[..., 0]


def slots_of(indices: torch.Tensor, block_table: torch.Tensor, page_size: int) -> torch.Tensor:
    """Turn positions in a request into slots of the cache: page * page_size + offset, -1 for -1.

    Args:
        indices: [rows, k] int32 positions, as `select_topk` returns them.
        block_table: [rows, blocks] int32: the page table of each row's request.
        page_size: tokens a page.

    Returns:
        [rows, k] int32, contiguous.

    Raises:
        ValueError: a wrong shape or dtype.
    """
    check_shape("indices", indices, ("rows", "k"))
    check_shape("block_table", block_table, (indices.shape[0], "blocks"))
    for name, tensor in (("indices", indices), ("block_table", block_table)):
        check_dtype(name, tensor, torch.int32)
    on_gpu = indices.is_cuda and block_table.is_cuda and indices.stride(1) == block_table.stride(1) == 1
    if on_gpu and unobserved(indices, block_table) and why_not_triton(str(indices.device)) is None:
        from mlakit.indexer.triton_slots import launch_slots_of

        out = torch.empty(indices.shape, dtype=torch.int32, device=indices.device)
        launch_slots_of(indices, block_table, page_size, out)
        return out
    page = torch.gather(block_table, 1, (indices.clamp(min=0) // page_size).long())
    return torch.where(indices >= 0, page * page_size + indices % page_size, -1).to(torch.int32)
