"""The producer warp of the Hopper prefill kernel: which tile is next, and bulk loads of what it needs.

A thread block stays on its multiprocessor and takes tiles of 128 query rows of one head until none are left. The
producer tells the two consuming warpgroups what a tile is, and keeps two tiles of keys and two of values on their way.
"""

# Kernel arguments have no Python type; only the constexprs among them are annotated.
# mypy: disallow-incomplete-defs=False

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# What the producer tells the consumers of a tile.
ROW, ROWS, HEAD, K_LEN, LIMIT, BLOCKS = (gl.constexpr(i) for i in range(6))
WORK_FIELDS = gl.constexpr(8)
SLOTS = gl.constexpr(2)


@gluon.jit
def put(work_s, slot, field: gl.constexpr, value):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    work_s.index(slot * WORK_FIELDS + field).store(gl.full([1], value, gl.int32, one))


@gluon.jit
def get(work_s, slot, field: gl.constexpr):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(work_s.index(slot * WORK_FIELDS + field).load(one), 0)


@gluon.jit
def produce(
    q0_desc, q1_desc, k0_desc, k1_desc, v_desc, q0_s, q1_s, k0_s, k1_s, v_s, work_s, q_full, q_empty, full, empty,
    w_full, w_empty, cu_q_ptr, cu_k_ptr, counter_ptr, total_q, batch, tiles, num_heads, heads_at_once, stride_qh,
    stride_kh, stride_k1h, k1_col, stride_vh, GROUPS: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr,
    D0: gl.constexpr, D1: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = 128
    SIZE: gl.constexpr = k0_s.dtype.primitive_bitwidth // 8
    pid = gl.program_id(0)
    step = gl.num_programs(0)
    total = tiles * num_heads
    heads_left = num_heads % heads_at_once
    index = pid
    ticket = 0
    done = 0  # tiles worked on
    loaded = 0  # key blocks loaded
    v_row = 0  # of the block whose values are due
    v_col = 0
    while index < total:
        # Heads go in groups whose keys and values fit L2; within a group every head's longest tile comes first. What is
        # left of a whole number of groups goes first: a small last group has too few tiles to keep every multiprocessor
        # at work until its longest one ends.
        behind = index - heads_left * tiles
        first_head = gl.where(behind < 0, 0, heads_left + behind // (tiles * heads_at_once) * heads_at_once)
        heads_here = gl.where(behind < 0, heads_left, heads_at_once)
        within = index - first_head * tiles
        tile = within // heads_here
        head = first_head + within - tile * heads_here
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

            slot = done % SLOTS
            mbarrier.wait(w_empty.index(slot), ((done // SLOTS) & 1) ^ 1)
            put(work_s, slot, ROW, q_start + m0)
            put(work_s, slot, ROWS, q_len - m0)
            put(work_s, slot, HEAD, head)
            put(work_s, slot, K_LEN, k_len)
            put(work_s, slot, LIMIT, limit)
            put(work_s, slot, BLOCKS, blocks)
            mbarrier.arrive(w_full.index(slot), count=1)

            kv_head = head // GROUPS
            k_col = kv_head * stride_kh
            r_col = kv_head * stride_k1h + k1_col
            q_col = head * stride_qh
            q_row = q_start + m0
            for j in range(blocks):
                stage = loaded % STAGES
                row = k_start + (blocks - 1 - j) * BLOCK_N
                mbarrier.wait(empty.index(stage), ((loaded // STAGES) & 1) ^ 1)
                bar = full.index(stage)
                mbarrier.expect(bar, BLOCK_N * (D0 + D1 + DV) * SIZE)
                tma.async_copy_global_to_shared(k0_desc, [row, k_col], bar, k0_s.index(stage))
                if D1 > 0:
                    tma.async_copy_global_to_shared(k1_desc, [row, r_col], bar, k1_s.index(stage))
                # The first step of all has no use for values; it gets some, which spares a case.
                tma.async_copy_global_to_shared(v_desc, [v_row, v_col], bar, v_s.index(stage))
                v_row = row
                v_col = kv_head * stride_vh
                loaded += 1
                if j == 0:
                    for w in gl.static_range(2):
                        mbarrier.wait(q_empty.index(w), (done & 1) ^ 1)
                        mbarrier.expect(q_full.index(w), 64 * (D0 + D1) * SIZE)
                        tma.async_copy_global_to_shared(
                            q0_desc, [q_row + w * 64, q_col], q_full.index(w), q0_s.index(w)
                        )
                        if D1 > 0:
                            tma.async_copy_global_to_shared(
                                q1_desc, [q_row + w * 64, q_col + D0], q_full.index(w), q1_s.index(w)
                            )
                if j == gl.maximum(blocks - 2, 0):
                    # As late as an answer, which takes a microsecond, is not waited for: who draws early holds a tile
                    # that others could begin sooner.
                    ticket = gl.atomic_add(counter_ptr, 1, sem="relaxed")
            done += 1
        else:
            ticket = gl.atomic_add(counter_ptr, 1, sem="relaxed")
        index = step + ticket
    # Every block has now drawn one ticket too many; the last to say so leaves the counters as it found them.
    finished = gl.atomic_add(counter_ptr + 1, 1)
    if finished == step - 1:
        gl.store(counter_ptr, 0)
        gl.store(counter_ptr + 1, 0)
    slot = done % SLOTS
    mbarrier.wait(w_empty.index(slot), ((done // SLOTS) & 1) ^ 1)
    put(work_s, slot, BLOCKS, 0)
    mbarrier.arrive(w_full.index(slot), count=1)
    if loaded > 0:
        stage = loaded % STAGES
        mbarrier.wait(empty.index(stage), ((loaded // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), BLOCK_N * DV * SIZE)
        tma.async_copy_global_to_shared(v_desc, [v_row, v_col], full.index(stage), v_s.index(stage))
