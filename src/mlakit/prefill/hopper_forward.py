"""Forward pass of `mla_prefill` on Hopper, in Gluon: a producer warp, and two warpgroups in turns.

A thread block stays on its multiprocessor and takes tiles of 128 query rows of one head, longest first. The producer
draws the tiles and fills rings of key and value tiles by bulk loads; each warpgroup owns 64 rows. A warpgroup issues
the product of a block's weights with its values together with the next block's scores, and computes that block's
softmax while the other warpgroup's products run.
"""

# Kernel arguments have no Python type; only the constexprs among them are annotated.
# mypy: disallow-incomplete-defs=False

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# What the producer tells the consumers of a tile.
_ROW, _ROWS, _HEAD, _K_LEN, _LIMIT, _BLOCKS = (gl.constexpr(i) for i in range(6))
_WORK_FIELDS = gl.constexpr(8)
_SLOTS = gl.constexpr(2)


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
def _put(work_s, slot, field: gl.constexpr, value):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    work_s.index(slot * _WORK_FIELDS + field).store(gl.full([1], value, gl.int32, one))


@gluon.jit
def _get(work_s, slot, field: gl.constexpr):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(work_s.index(slot * _WORK_FIELDS + field).load(one), 0)


@gluon.jit
def _produce(
    q0_desc,
    q1_desc,
    k0_desc,
    k1_desc,
    v_desc,
    q0_s,
    q1_s,
    k0_s,
    k1_s,
    v_s,
    work_s,
    q_bars,
    k_full,
    k_empty,
    v_full,
    v_empty,
    w_full,
    w_empty,
    cu_q_ptr,
    cu_k_ptr,
    counter_ptr,
    total_q,
    batch,
    tiles,
    num_heads,
    heads_at_once,
    stride_qh,
    stride_kh,
    stride_k1h,
    k1_col,
    stride_vh,
    GROUPS: gl.constexpr,
    CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D0: gl.constexpr,
    D1: gl.constexpr,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
    SCHEDULE: gl.constexpr,
):
    BLOCK_M: gl.constexpr = 128
    SIZE: gl.constexpr = k0_s.dtype.primitive_bitwidth // 8
    pid = gl.program_id(0)
    step = gl.num_programs(0)
    total = tiles * num_heads
    index = pid
    turn = 0  # rounds through the list of tiles
    done = 0  # tiles worked on
    loaded = 0  # key blocks loaded
    while index < total:
        # Heads go in groups whose keys and values fit L2; within a group every head's longest tile comes first.
        group = index // (tiles * heads_at_once)
        within = index - group * tiles * heads_at_once
        heads_here = gl.minimum(heads_at_once, num_heads - group * heads_at_once)
        tile = within // heads_here
        head = group * heads_at_once + within - tile * heads_here
        if CAUSAL:
            tile = tiles - 1 - tile
        # Sequence i owns tiles cu[i] // BLOCK_M + i and on, as many as it needs; rows past the last one's end belong
        # to sequence `batch`, which has no keys.
        seq = 0
        above = batch
        while seq < above:
            middle = (seq + above + 1) // 2
            if gl.load(cu_q_ptr + middle) // BLOCK_M + middle <= tile:
                seq = middle
            else:
                above = middle - 1
        q_start = gl.load(cu_q_ptr + seq)
        q_end = gl.load(cu_q_ptr + seq + 1, mask=seq < batch, other=total_q)
        m0 = (tile - q_start // BLOCK_M - seq) * BLOCK_M
        q_len = q_end - q_start
        if m0 < q_len:
            k_start = gl.load(cu_k_ptr + seq)
            k_len = gl.load(cu_k_ptr + seq + 1, mask=seq < batch, other=k_start) - k_start
            # Row r of the tile sees the keys before limit + r, or all where it is not causal.
            limit = k_len - q_len + 1 + m0
            seen = k_len
            if CAUSAL:
                seen = gl.minimum(k_len, limit + gl.minimum(BLOCK_M, q_len - m0) - 1)
            # A tile without keys still takes one block, all masked.
            blocks = gl.maximum(gl.cdiv(seen, BLOCK_N), 1)

            slot = done % _SLOTS
            mbarrier.wait(w_empty.index(slot), ((done // _SLOTS) & 1) ^ 1)
            _put(work_s, slot, _ROW, q_start + m0)
            _put(work_s, slot, _ROWS, q_len - m0)
            _put(work_s, slot, _HEAD, head)
            _put(work_s, slot, _K_LEN, k_len)
            _put(work_s, slot, _LIMIT, limit)
            _put(work_s, slot, _BLOCKS, blocks)
            mbarrier.arrive(w_full.index(slot), count=1)

            kv_head = head // GROUPS
            k_col = kv_head * stride_kh
            r_col = kv_head * stride_k1h + k1_col
            v_col = kv_head * stride_vh
            q_col = head * stride_qh
            q_row = q_start + m0
            for j in range(blocks + 1):
                # Keys run a block ahead of values, and the queries come with the first.
                if j < blocks:
                    stage = loaded % STAGES
                    row = k_start + (blocks - 1 - j) * BLOCK_N
                    mbarrier.wait(k_empty.index(stage), ((loaded // STAGES) & 1) ^ 1)
                    full = k_full.index(stage)
                    mbarrier.expect(full, BLOCK_N * (D0 + D1) * SIZE)
                    tma.async_copy_global_to_shared(k0_desc, [row, k_col], full, k0_s.index(stage))
                    if D1 > 0:
                        tma.async_copy_global_to_shared(k1_desc, [row, r_col], full, k1_s.index(stage))
                if j == 0:
                    mbarrier.wait(q_bars.index(1), (done & 1) ^ 1)
                    mbarrier.expect(q_bars.index(0), BLOCK_M * (D0 + D1) * SIZE)
                    for w in gl.static_range(2):
                        tma.async_copy_global_to_shared(
                            q0_desc, [q_row + w * 64, q_col], q_bars.index(0), q0_s.index(w)
                        )
                        if D1 > 0:
                            tma.async_copy_global_to_shared(
                                q1_desc, [q_row + w * 64, q_col + D0], q_bars.index(0), q1_s.index(w)
                            )
                else:
                    before = loaded - 1
                    stage = before % STAGES
                    row = k_start + (blocks - j) * BLOCK_N
                    mbarrier.wait(v_empty.index(stage), ((before // STAGES) & 1) ^ 1)
                    mbarrier.expect(v_full.index(stage), BLOCK_N * DV * SIZE)
                    tma.async_copy_global_to_shared(v_desc, [row, v_col], v_full.index(stage), v_s.index(stage))
                if j < blocks:
                    loaded += 1
            done += 1
        turn += 1
        if SCHEDULE == 0:
            index += step
        elif SCHEDULE == 1:
            # There and back: whoever had the longest tile of one round has the shortest of the next.
            index = turn * step + gl.where(turn % 2 == 1, step - 1 - pid, pid)
        else:
            index = step + gl.atomic_add(counter_ptr, 1)
    if SCHEDULE == 2:
        # Every block has now drawn one ticket too many; the last to say so leaves the counters as it found them.
        finished = gl.atomic_add(counter_ptr + 1, 1)
        if finished == step - 1:
            gl.store(counter_ptr, 0)
            gl.store(counter_ptr + 1, 0)
    slot = done % _SLOTS
    mbarrier.wait(w_empty.index(slot), ((done // _SLOTS) & 1) ^ 1)
    _put(work_s, slot, _BLOCKS, 0)
    mbarrier.arrive(w_full.index(slot), count=1)


@gluon.jit
def _scores(q0, q1, k0, k1, BLOCK_N: gl.constexpr, D1: gl.constexpr, LAYOUT: gl.constexpr):
    s = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    s = warpgroup_mma(q0, k0.permute((1, 0)), s, use_acc=False, is_async=True)
    if D1 > 0:
        s = warpgroup_mma(q1, k1.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _mask(s, limit, first, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    cols = first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    return gl.where(cols[None, :] < limit[:, None], s, -float("inf"))


@gluon.jit
def _softmax(s, o, m, l, scale_log2, DTYPE: gl.constexpr, P_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr):
    """A block's weights, what came before scaled to them, the new running maximum (in units of log2) and sum."""
    m_new = gl.maximum(m, gl.max(s, 1) * scale_log2)
    # A row that has seen no key yet: exp2(-inf - 0) is 0 where exp2(-inf - -inf) would be NaN.
    shift = gl.where(m_new == -float("inf"), 0.0, m_new)
    weights = gl.exp2(s * scale_log2 - shift[:, None])
    alpha = gl.exp2(m - shift)
    l = l * alpha + gl.sum(weights, 1)
    o = o * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
    return gl.convert_layout(weights.to(DTYPE), P_LAYOUT), o, m_new, l


@gluon.jit
def _advance(
    p, o, q0, q1, k0_s, k1_s, v_s, k_full, k_empty, v_full, v_empty, loaded, WHO: gl.constexpr, BLOCK_N: gl.constexpr,
    D1: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Add block `loaded - 1`, whose weights are p, to o, and compute the scores of block `loaded`."""
    stage = loaded % STAGES
    before = (loaded - 1) % STAGES
    mbarrier.wait(v_full.index(before), ((loaded - 1) // STAGES) & 1)
    mbarrier.wait(k_full.index(stage), (loaded // STAGES) & 1)
    if TURNS:
        _await_turn(WHO)
    o = warpgroup_mma(p, v_s.index(before), o, is_async=True)
    s = _scores(q0, q1, k0_s.index(stage), k1_s.index(stage), BLOCK_N, D1, S_LAYOUT)
    if TURNS:
        _give_turn(1 - WHO)
    o, s = warpgroup_mma_wait(0, [o, s])
    mbarrier.arrive(v_empty.index(before), count=1)
    mbarrier.arrive(k_empty.index(stage), count=1)
    return o, s


@gluon.jit
def _consume(
    q0_s,
    q1_s,
    k0_s,
    k1_s,
    v_s,
    work_s,
    q_bars,
    k_full,
    k_empty,
    v_full,
    v_empty,
    w_full,
    w_empty,
    out_ptr,
    lse_ptr,
    num_heads,
    scale_log2,
    stride_ot,
    stride_oh,
    WHO: gl.constexpr,
    CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D1: gl.constexpr,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
    TURNS: gl.constexpr,
):
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    out_layout: gl.constexpr = _output_layout(DV)
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    q0 = q0_s.index(WHO)
    q1 = q1_s.index(WHO)
    done = 0
    loaded = 0
    if TURNS and WHO == 1:
        _give_turn(0)
    working = True
    while working:
        slot = done % _SLOTS
        mbarrier.wait(w_full.index(slot), (done // _SLOTS) & 1)
        row0 = _get(work_s, slot, _ROW) + WHO * 64
        rows = _get(work_s, slot, _ROWS) - WHO * 64
        head = _get(work_s, slot, _HEAD)
        k_len = _get(work_s, slot, _K_LEN)
        limit0 = _get(work_s, slot, _LIMIT) + WHO * 64
        blocks = _get(work_s, slot, _BLOCKS)
        mbarrier.arrive(w_empty.index(slot), count=1)
        working = blocks > 0
        if working:
            local = gl.arange(0, 64, row_layout)
            if CAUSAL:
                limit = gl.minimum(limit0 + local, k_len)
                full = gl.maximum(gl.minimum(limit0, k_len), 0) // BLOCK_N  # blocks that need no mask
            else:
                limit = gl.zeros([64], gl.int32, row_layout) + k_len
                full = k_len // BLOCK_N
            o = gl.zeros([64, DV], gl.float32, o_layout)
            m = gl.full([64], -float("inf"), gl.float32, row_layout)
            l = gl.zeros([64], gl.float32, row_layout)

            stage = loaded % STAGES
            phase = (loaded // STAGES) & 1
            mbarrier.wait(q_bars.index(0), done & 1)
            mbarrier.wait(k_full.index(stage), phase)
            if TURNS:
                _await_turn(WHO)
            s = _scores(q0, q1, k0_s.index(stage), k1_s.index(stage), BLOCK_N, D1, s_layout)
            if TURNS:
                _give_turn(1 - WHO)
            s = warpgroup_mma_wait(0, [s])
            mbarrier.arrive(k_empty.index(stage), count=1)
            left = k_len - (blocks - 1) * BLOCK_N
            if left < BLOCK_N:
                # What follows the sequence may be NaN, and 0 * NaN is NaN: no weight can undo it. Both warpgroups
                # write these zeros, which spares them a meeting.
                mbarrier.wait(v_full.index(stage), phase)
                for part in gl.static_range(BLOCK_N // 32):
                    piece = v_s.index(stage).slice(part * 32, 32, 0)
                    values = piece.load(copy)
                    which = part * 32 + gl.arange(0, 32, gl.SliceLayout(1, copy))
                    piece.store(gl.where(which[:, None] < left, values, 0.0))
                fence_async_shared()

            masked = gl.maximum(blocks - gl.maximum(full, 1), 0)
            for j in range(masked):
                s = _mask(s, limit, (blocks - 1 - j) * BLOCK_N, BLOCK_N, s_layout)
                p, o, m, l = _softmax(s, o, m, l, scale_log2, v_s.dtype, p_layout, o_layout)
                loaded += 1
                o, s = _advance(
                    p, o, q0, q1, k0_s, k1_s, v_s, k_full, k_empty, v_full, v_empty, loaded, WHO, BLOCK_N, D1, STAGES,
                    TURNS, s_layout,
                )  # fmt: skip
            for _ in range(masked, blocks - 1):
                p, o, m, l = _softmax(s, o, m, l, scale_log2, v_s.dtype, p_layout, o_layout)
                loaded += 1
                o, s = _advance(
                    p, o, q0, q1, k0_s, k1_s, v_s, k_full, k_empty, v_full, v_empty, loaded, WHO, BLOCK_N, D1, STAGES,
                    TURNS, s_layout,
                )  # fmt: skip
            mbarrier.arrive(q_bars.index(1), count=1)
            if full == 0:
                s = _mask(s, limit, 0, BLOCK_N, s_layout)
            p, o, m, l = _softmax(s, o, m, l, scale_log2, v_s.dtype, p_layout, o_layout)
            stage = loaded % STAGES
            mbarrier.wait(v_full.index(stage), (loaded // STAGES) & 1)
            if TURNS:
                _await_turn(WHO)
            o = warpgroup_mma(p, v_s.index(stage), o, is_async=True)
            if TURNS:
                _give_turn(1 - WHO)
            empty = l == 0.0
            inverse = gl.where(empty, 0.0, 1.0 / l)
            lse = gl.where(empty, -float("inf"), (m + gl.log2(l)) * 0.6931471805599453)
            lse_base = lse_ptr + row0.to(gl.int64) * num_heads + head
            gl.store(lse_base + local * num_heads, lse, mask=local < rows)
            o = warpgroup_mma_wait(0, [o])
            mbarrier.arrive(v_empty.index(stage), count=1)
            o = o * gl.convert_layout(inverse, gl.SliceLayout(1, o_layout))[:, None]
            result = gl.convert_layout(o.to(out_ptr.dtype.element_ty), out_layout)
            r = gl.arange(0, 64, gl.SliceLayout(1, out_layout))
            c = gl.arange(0, DV, gl.SliceLayout(0, out_layout))
            out_base = out_ptr + row0.to(gl.int64) * stride_ot + head.to(gl.int64) * stride_oh
            gl.store(out_base + r[:, None] * stride_ot + c[None, :], result, mask=r[:, None] < rows)
            loaded += 1
            done += 1
    if TURNS and WHO == 0:
        _await_turn(0)  # the other's last word to this one


# Nothing that changes with a batch's lengths may specialize the kernel: a new length must not recompile.
@gluon.jit(do_not_specialize=["total_q", "batch", "tiles", "num_heads", "heads_at_once", "k1_col"])
def _prefill_hopper_kernel(
    q0_desc,
    q1_desc,
    k0_desc,
    k1_desc,
    v_desc,
    out_ptr,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    counter_ptr,
    total_q,
    batch,
    tiles,
    num_heads,
    heads_at_once,
    scale_log2,
    stride_qh,
    stride_kh,
    stride_k1h,
    k1_col,
    stride_vh,
    stride_ot,
    stride_oh,
    GROUPS: gl.constexpr,
    CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D0: gl.constexpr,
    D1: gl.constexpr,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
    SCHEDULE: gl.constexpr,
    TURNS: gl.constexpr,
    CONSUMER_REGS: gl.constexpr,
    PRODUCER_REGS: gl.constexpr,
    num_warps: gl.constexpr,
):
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
    work_s = gl.allocate_shared_memory(gl.int32, [_SLOTS * _WORK_FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [_SLOTS, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [_SLOTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_bars.index(0), count=1)
    mbarrier.init(q_bars.index(1), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    for i in gl.static_range(_SLOTS):
        mbarrier.init(w_full.index(i), count=1)
        mbarrier.init(w_empty.index(i), count=2)
    fence_async_shared()
    # Constants keep being constants only in tuples that are written where they are used.
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    q0_s,
                    q1_s,
                    k0_s,
                    k1_s,
                    v_s,
                    work_s,
                    q_bars,
                    k_full,
                    k_empty,
                    v_full,
                    v_empty,
                    w_full,
                    w_empty,
                    out_ptr,
                    lse_ptr,
                    num_heads,
                    scale_log2,
                    stride_ot,
                    stride_oh,
                    0,
                    CAUSAL,
                    BLOCK_N,
                    D1,
                    DV,
                    STAGES,
                    TURNS,
                ),
            ),
            (
                _consume,
                (
                    q0_s,
                    q1_s,
                    k0_s,
                    k1_s,
                    v_s,
                    work_s,
                    q_bars,
                    k_full,
                    k_empty,
                    v_full,
                    v_empty,
                    w_full,
                    w_empty,
                    out_ptr,
                    lse_ptr,
                    num_heads,
                    scale_log2,
                    stride_ot,
                    stride_oh,
                    1,
                    CAUSAL,
                    BLOCK_N,
                    D1,
                    DV,
                    STAGES,
                    TURNS,
                ),
            ),
            (
                _produce,
                (
                    q0_desc,
                    q1_desc,
                    k0_desc,
                    k1_desc,
                    v_desc,
                    q0_s,
                    q1_s,
                    k0_s,
                    k1_s,
                    v_s,
                    work_s,
                    q_bars,
                    k_full,
                    k_empty,
                    v_full,
                    v_empty,
                    w_full,
                    w_empty,
                    cu_q_ptr,
                    cu_k_ptr,
                    counter_ptr,
                    total_q,
                    batch,
                    tiles,
                    num_heads,
                    heads_at_once,
                    stride_qh,
                    stride_kh,
                    stride_k1h,
                    k1_col,
                    stride_vh,
                    GROUPS,
                    CAUSAL,
                    BLOCK_N,
                    D0,
                    D1,
                    DV,
                    STAGES,
                    SCHEDULE,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGS, PRODUCER_REGS],
    )
