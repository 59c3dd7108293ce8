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
from mlakit.prefill.hopper_softmax import mask_block, narrowed, of_rows, softmax_block, widened


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
def _limits(
    work_s, slot, WHO: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Where each row's keys end, and how many blocks every row sees wholly."""
    k_len = get(work_s, slot, K_LEN)
    if CAUSAL:
        first = get(work_s, slot, LIMIT) + WHO * 64
        limit = gl.minimum(first + gl.arange(0, 64, LAYOUT), k_len)
        plain = gl.maximum(gl.minimum(first, k_len), 0) // BLOCK_N
    else:
        limit = gl.zeros([64], gl.int32, LAYOUT) + k_len
        plain = k_len // BLOCK_N
    return limit, plain


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
def _softmax(
    s, o, shift, total, scale_log2, DTYPE: gl.constexpr, FIRST: gl.constexpr, P_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """A block's weights as the left operand of a product, and what came before as it goes with them."""
    S_LAYOUT: gl.constexpr = s.type.layout
    wide = widened(o, s.shape[1], S_LAYOUT)
    p, wide, shift, total = softmax_block(s, wide, shift, total, scale_log2, DTYPE, FIRST)
    return gl.convert_layout(p, P_LAYOUT), narrowed(wide, o.shape[1], O_LAYOUT), shift, total


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
    blocks = get(work_s, 0, BLOCKS)
    # Where there is no tile at all, these are products of what shared memory happens to hold.
    mbarrier.wait(q_full.index(WHO), 0, pred=blocks > 0)
    mbarrier.wait(full.index(0), 0, pred=blocks > 0)
    _await_turn(WHO)
    s = _scores(q0, q1, k0_s.index(0), k1_s.index(0), BLOCK_N, D1, s_layout)
    _give_turn(1 - WHO)
    s = warpgroup_mma_wait(0, [s])
    mbarrier.arrive(empty.index(0), count=1)
    while blocks > 0:
        slot = done % SLOTS
        k_len = get(work_s, slot, K_LEN)
        limit, plain = _limits(work_s, slot, WHO, CAUSAL, BLOCK_N, row_layout)
        left = k_len - (blocks - 1) * BLOCK_N
        o = gl.zeros([64, DV], gl.float32, o_layout)
        shift = gl.full([64, BLOCK_N], float("inf"), gl.float32, s_layout)
        total = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
        # The first of several blocks is one of these in any case: their maximum is taken before their weights.
        masked = blocks - gl.maximum(gl.minimum(plain, blocks - 1), 1)
        for j in range(masked):
            s = mask_block(s, limit - (blocks - 1 - j) * BLOCK_N)
            p, o, shift, total = _softmax(s, o, shift, total, scale_log2, v_s.dtype, True, p_layout, o_layout)
            loaded += 1
            stage = loaded % STAGES
            mbarrier.wait(full.index(stage), (loaded // STAGES) & 1)
            if (j == 0) & (left < BLOCK_N):
                _clear_tail(v_s.index(stage), left, BLOCK_N)
            o, s = _advance(p, o, q0, q1, k0_s, k1_s, v_s, full, empty, loaded, WHO, BLOCK_N, D1, STAGES, s_layout)
        for _ in range(masked, blocks - 1):
            p, o, shift, total = _softmax(s, o, shift, total, scale_log2, v_s.dtype, False, p_layout, o_layout)
            loaded += 1
            mbarrier.wait(full.index(loaded % STAGES), (loaded // STAGES) & 1)
            o, s = _advance(p, o, q0, q1, k0_s, k1_s, v_s, full, empty, loaded, WHO, BLOCK_N, D1, STAGES, s_layout)
        mbarrier.arrive(q_empty.index(WHO), count=1)
        if plain == 0:
            limit, _ = _limits(work_s, slot, WHO, CAUSAL, BLOCK_N, row_layout)  # again: registers are scarce
            s = mask_block(s, limit)
        p, o, shift, total = _softmax(s, o, shift, total, scale_log2, v_s.dtype, False, p_layout, o_layout)

        # The last step of this tile is the first of the next.
        done += 1
        mbarrier.wait(w_full.index(done % SLOTS), (done // SLOTS) & 1)
        next_blocks = get(work_s, done % SLOTS, BLOCKS)
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
        l = gl.convert_layout(gl.sum(of_rows(total), 1), row_layout)
        m = gl.convert_layout(gl.max(-of_rows(shift), 1), row_layout)
        none = l == 0.0
        inverse = gl.where(none, 0.0, 1.0 / l)
        lse = gl.where(none, -float("inf"), (m + gl.log2(l)) * 0.6931471805599453)
        row0 = get(work_s, slot, ROW) + WHO * 64
        rows = get(work_s, slot, ROWS) - WHO * 64
        head = get(work_s, slot, HEAD)
        mbarrier.arrive(w_empty.index(slot), count=1)
        local = gl.arange(0, 64, row_layout)
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
        blocks = next_blocks
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
