"""Forward pass of `mla_prefill` on Hopper, in Gluon: a producer warp, and two warpgroups in turns.

Each warpgroup owns 64 query rows of a tile. It issues the product of a block's weights with its values together with
the next block's scores, and computes that block's softmax while the other warpgroup's products run. The last step of a
tile is the first of the next: nothing runs dry between tiles. docs/kernels-prefill.md tells what else was tried.
"""

# Kernel arguments have no Python type; only the constexprs among them are annotated.
# mypy: disallow-incomplete-defs=False

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mlakit.prefill.hopper_producer import BLOCKS, HEAD, K_LEN, LIMIT, ROW, ROWS, SLOTS, WORK_FIELDS, get, produce


@gluon.constexpr_function
def _output_layout(dim):
    """Each thread holds 8 neighbouring columns of [64, dim], so that it stores 16 bytes at once; from the product's
    layout it is an exchange within each warp.
    """
    wide = [[0, 32 << i] for i in range((dim // 32).bit_length() - 1)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [0, 4], *wide, [8, 0]], lanes, [[16, 0], [32, 0]], [], [64, dim])


@gluon.jit
def _await_turn(WHO: gl.constexpr):
    # Named barriers: one instruction where an mbarrier is several. Triton's own have the ids below 8.
    if WHO == 0:
        gl.inline_asm_elementwise("bar.sync 8, 256; mov.u32 $0, $1;", "=r,r", [0], gl.int32, is_pure=False, pack=1)
    else:
        gl.inline_asm_elementwise("bar.sync 9, 256; mov.u32 $0, $1;", "=r,r", [0], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _give_turn(WHO: gl.constexpr):
    if WHO == 0:
        gl.inline_asm_elementwise("bar.arrive 8, 256; mov.u32 $0, $1;", "=r,r", [0], gl.int32, is_pure=False, pack=1)
    else:
        gl.inline_asm_elementwise("bar.arrive 9, 256; mov.u32 $0, $1;", "=r,r", [0], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _scores(q0, q1, k0, k1, BLOCK_N: gl.constexpr, D1: gl.constexpr, LAYOUT: gl.constexpr):
    s = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    s = warpgroup_mma(q0, k0.permute((1, 0)), s, use_acc=False, is_async=True)
    if D1 > 0:
        s = warpgroup_mma(q1, k1.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _mask(s, limit, first, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    cols = gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    return gl.where(cols[None, :] < (limit - first)[:, None], s, -float("inf"))


@gluon.jit
def _row_max(s):
    """The maximum of each row. Pairs first: what a thread holds, one after the other, is a chain of 32 instructions."""
    rows: gl.constexpr = s.shape[0]
    half = s
    for level in gl.static_range(s.shape[1].bit_length() - 4):
        lower, upper = gl.split(gl.permute(gl.reshape(half, [rows, 2, s.shape[1] >> (level + 1)]), (0, 2, 1)))
        half = gl.maximum(lower, upper)
    return gl.convert_layout(gl.max(half, 1), gl.SliceLayout(1, s.type.layout))


@gluon.jit
def _softmax(s, o, m, l, scale_log2, DTYPE: gl.constexpr, P_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr):
    """A block's weights, what came before scaled to them, the new running maximum (in units of log2) and sum."""
    m_new = gl.maximum(m, _row_max(s) * scale_log2)
    # A row that has seen no key yet: exp2(-inf - 0) is 0 where exp2(-inf - -inf) would be NaN.
    shift = gl.where(m_new == -float("inf"), 0.0, m_new)
    weights = gl.exp2(s * scale_log2 - shift[:, None])
    alpha = gl.exp2(m - shift)
    l = l * alpha + gl.sum(weights, 1)
    o = o * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
    return gl.convert_layout(weights.to(DTYPE), P_LAYOUT), o, m_new, l


@gluon.jit
def _clear_tail(v, left, BLOCK_N: gl.constexpr):
    """Zero the rows of a value tile from `left` on.

    What follows the sequence may be NaN, and 0 * NaN is NaN: no weight can undo it. Both warpgroups write these zeros,
    which spares them a meeting.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for part in gl.static_range(BLOCK_N // 16):
        piece = v.slice(part * 16, 16, 0)
        values = piece.load(layout)
        rows = part * 16 + gl.arange(0, 16, gl.SliceLayout(1, layout))
        piece.store(gl.where(rows[:, None] < left, values, 0.0))
    fence_async_shared()


@gluon.jit
def _advance(
    p, o, q0, q1, k0_s, k1_s, v_s, full, empty, loaded, WHO: gl.constexpr, BLOCK_N: gl.constexpr, D1: gl.constexpr,
    STAGES: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Add the block before `loaded`, whose weights are p, to o, and compute the scores of block `loaded`."""
    stage = loaded % STAGES
    _await_turn(WHO)
    o = warpgroup_mma(p, v_s.index(stage), o, is_async=True)
    s = _scores(q0, q1, k0_s.index(stage), k1_s.index(stage), BLOCK_N, D1, S_LAYOUT)
    _give_turn(1 - WHO)
    o, s = warpgroup_mma_wait(0, [o, s])
    mbarrier.arrive(empty.index(stage), count=1)
    return o, s


@gluon.jit
def _consume(
    q0_s, q1_s, k0_s, k1_s, v_s, work_s, q_full, q_empty, full, empty, w_full, w_empty, out_ptr, lse_ptr,
    scale_log2, stride_ot, stride_oh, stride_lt, WHO: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr,
    D1: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    out_layout: gl.constexpr = _output_layout(DV)
    q0 = q0_s.index(WHO)
    q1 = q1_s.index(WHO)
    done = 0
    loaded = 0
    if WHO == 1:
        _give_turn(0)
    mbarrier.wait(w_full.index(0), 0)
    row0 = get(work_s, 0, ROW) + WHO * 64
    rows = get(work_s, 0, ROWS) - WHO * 64
    head = get(work_s, 0, HEAD)
    k_len = get(work_s, 0, K_LEN)
    limit0 = get(work_s, 0, LIMIT) + WHO * 64
    blocks = get(work_s, 0, BLOCKS)
    mbarrier.arrive(w_empty.index(0), count=1)
    # Where there is no tile at all, these are products of what shared memory happens to hold.
    mbarrier.wait(q_full.index(WHO), 0, pred=blocks > 0)
    mbarrier.wait(full.index(0), 0, pred=blocks > 0)
    _await_turn(WHO)
    s = _scores(q0, q1, k0_s.index(0), k1_s.index(0), BLOCK_N, D1, s_layout)
    _give_turn(1 - WHO)
    s = warpgroup_mma_wait(0, [s])
    mbarrier.arrive(empty.index(0), count=1)
    while blocks > 0:
        local = gl.arange(0, 64, row_layout)
        if CAUSAL:
            limit = gl.minimum(limit0 + local, k_len)
            plain = gl.maximum(gl.minimum(limit0, k_len), 0) // BLOCK_N  # blocks that need no mask
        else:
            limit = gl.zeros([64], gl.int32, row_layout) + k_len
            plain = k_len // BLOCK_N
        left = k_len - (blocks - 1) * BLOCK_N
        o = gl.zeros([64, DV], gl.float32, o_layout)
        m = gl.full([64], -float("inf"), gl.float32, row_layout)
        l = gl.zeros([64], gl.float32, row_layout)
        masked = gl.maximum(blocks - gl.maximum(plain, 1), 0)
        for j in range(masked):
            s = _mask(s, limit, (blocks - 1 - j) * BLOCK_N, BLOCK_N, s_layout)
            p, o, m, l = _softmax(s, o, m, l, scale_log2, v_s.dtype, p_layout, o_layout)
            loaded += 1
            stage = loaded % STAGES
            mbarrier.wait(full.index(stage), (loaded // STAGES) & 1)
            if (j == 0) & (left < BLOCK_N):
                _clear_tail(v_s.index(stage), left, BLOCK_N)
            o, s = _advance(p, o, q0, q1, k0_s, k1_s, v_s, full, empty, loaded, WHO, BLOCK_N, D1, STAGES, s_layout)
        for _ in range(masked, blocks - 1):
            p, o, m, l = _softmax(s, o, m, l, scale_log2, v_s.dtype, p_layout, o_layout)
            loaded += 1
            mbarrier.wait(full.index(loaded % STAGES), (loaded // STAGES) & 1)
            o, s = _advance(p, o, q0, q1, k0_s, k1_s, v_s, full, empty, loaded, WHO, BLOCK_N, D1, STAGES, s_layout)
        mbarrier.arrive(q_empty.index(WHO), count=1)
        if plain == 0:
            s = _mask(s, limit, 0, BLOCK_N, s_layout)
        p, o, m, l = _softmax(s, o, m, l, scale_log2, v_s.dtype, p_layout, o_layout)

        # The last step of this tile is the first of the next.
        done += 1
        slot = done % SLOTS
        mbarrier.wait(w_full.index(slot), (done // SLOTS) & 1)
        next_blocks = get(work_s, slot, BLOCKS)
        loaded += 1
        stage = loaded % STAGES
        mbarrier.wait(full.index(stage), (loaded // STAGES) & 1)
        if (blocks == 1) & (left < BLOCK_N):
            _clear_tail(v_s.index(stage), left, BLOCK_N)
        mbarrier.wait(q_full.index(WHO), done & 1, pred=next_blocks > 0)
        _await_turn(WHO)
        o = warpgroup_mma(p, v_s.index(stage), o, is_async=True)
        s = _scores(q0, q1, k0_s.index(stage), k1_s.index(stage), BLOCK_N, D1, s_layout)
        _give_turn(1 - WHO)
        none = l == 0.0
        inverse = gl.where(none, 0.0, 1.0 / l)
        lse = gl.where(none, -float("inf"), (m + gl.log2(l)) * 0.6931471805599453)
        lse_base = lse_ptr + row0 * stride_lt + head
        gl.store(lse_base + local * stride_lt.to(gl.int32), lse, mask=local < rows)
        o = warpgroup_mma_wait((1 if D1 == 0 else 2), [o])
        o = o * gl.convert_layout(inverse, gl.SliceLayout(1, o_layout))[:, None]
        result = gl.convert_layout(o.to(out_ptr.dtype.element_ty), out_layout)
        r = gl.arange(0, 64, gl.SliceLayout(1, out_layout))
        c = gl.arange(0, DV, gl.SliceLayout(0, out_layout))
        out_base = out_ptr + row0 * stride_ot + head * stride_oh
        gl.store(out_base + r[:, None] * stride_ot.to(gl.int32) + c[None, :], result, mask=r[:, None] < rows)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(empty.index(stage), count=1)
        row0 = get(work_s, slot, ROW) + WHO * 64
        rows = get(work_s, slot, ROWS) - WHO * 64
        head = get(work_s, slot, HEAD)
        k_len = get(work_s, slot, K_LEN)
        limit0 = get(work_s, slot, LIMIT) + WHO * 64
        blocks = next_blocks
        mbarrier.arrive(w_empty.index(slot), count=1)
    if WHO == 0:
        _await_turn(0)  # the other's last word to this one


# Nothing that changes with a batch's lengths may specialize the kernel: a new length must not recompile.
@gluon.jit(do_not_specialize=["total_q", "batch", "tiles", "num_heads", "heads_at_once", "k1_col"])
def _prefill_hopper_kernel(
    q0_desc, q1_desc, k0_desc, k1_desc, v_desc, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, counter_ptr, total_q, batch,
    tiles, num_heads, heads_at_once, scale_log2, stride_qh, stride_kh, stride_k1h, k1_col, stride_vh,
    stride_ot: gl.int64, stride_oh: gl.int64, stride_lt: gl.int64, GROUPS: gl.constexpr, CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = D1 if D1 > 0 else 64
    dtype: gl.constexpr = k0_desc.dtype
    q0_s = gl.allocate_shared_memory(dtype, [2, 64, D0], q0_desc.layout)
    k0_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D0], k0_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DV], v_desc.layout)
    if D1 > 0:
        q1_s = gl.allocate_shared_memory(dtype, [2, 64, R], q1_desc.layout)
        k1_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, R], k1_desc.layout)
    else:
        q1_s = q0_s
        k1_s = k0_s
    work_s = gl.allocate_shared_memory(gl.int32, [SLOTS * WORK_FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(SLOTS):
        mbarrier.init(w_full.index(i), count=1)
        mbarrier.init(w_empty.index(i), count=2)
    fence_async_shared()
    # Constants keep being constants only in tuples that are written where they are used.
    gl.warp_specialize(
        [
            (_consume, (
                q0_s, q1_s, k0_s, k1_s, v_s, work_s, q_full, q_empty, full, empty, w_full, w_empty,
                out_ptr, lse_ptr, scale_log2, stride_ot, stride_oh, stride_lt, 0, CAUSAL, BLOCK_N, D1, DV, STAGES,
            )),
            (_consume, (
                q0_s, q1_s, k0_s, k1_s, v_s, work_s, q_full, q_empty, full, empty, w_full, w_empty,
                out_ptr, lse_ptr, scale_log2, stride_ot, stride_oh, stride_lt, 1, CAUSAL, BLOCK_N, D1, DV, STAGES,
            )),
            (produce, (
                q0_desc, q1_desc, k0_desc, k1_desc, v_desc, q0_s, q1_s, k0_s, k1_s, v_s, work_s,
                q_full, q_empty, full, empty, w_full, w_empty, cu_q_ptr, cu_k_ptr,
                counter_ptr, total_q, batch, tiles, num_heads, heads_at_once, stride_qh, stride_kh,
                stride_k1h, k1_col, stride_vh, GROUPS, CAUSAL, BLOCK_N, D0, D1, DV, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGS, PRODUCER_REGS],
    )  # fmt: skip
