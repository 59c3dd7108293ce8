"""Which token, heads and indices an item of the Hopper kernels is: all three warpgroups of a program work it out."""

# mypy: disallow-incomplete-defs=False
# Triton gives kernel arguments their types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def item_of(
    item, length_ptr, stride_lb, stride_ls, q_len, group, row_tiles, topk, splits, LENGTH: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """Token, piece, key head, first head, heads from there on, pairs of tiles [first, last) and where its indices end.
    An item without indices still takes one pair, all masked.
    """
    tiles = gl.cdiv(group, 64)
    tile = item % row_tiles  # the tiles of one token run side by side and share its keys in L2
    token = item // row_tiles
    piece = token * 0
    if SPLIT:
        piece = token % splits
        token = token // splits
    kv_head = tile // tiles
    within = (tile % tiles) * 64
    end = topk
    if LENGTH:
        given = gl.load(length_ptr + (token // q_len) * stride_lb + (token % q_len) * stride_ls)
        end = gl.maximum(gl.minimum(given, topk), 0)
    pairs = gl.cdiv(end, 128)
    first = pairs * 0
    last = pairs
    if SPLIT:
        first = piece * pairs // splits
        last = (piece + 1) * pairs // splits
        end = gl.minimum(end, last * 128)
    return token, piece, kv_head, kv_head * group + within, group - within, first, gl.maximum(last, first + 1), end
