"""The latent kept in pages, and our kernels through the whole step."""

from typing import TYPE_CHECKING

import torch

from mlakit.cache import append_latent
from mlakit.merge import merge_states
from mlakit.nn import hopper_step
from mlakit.nn.branch import Branch
from mlakit.nn.caches import LatentCache, join_key
from mlakit.nn.flash import attend_in_parts, batched_attention, has_kernel, refuse_mask
from mlakit.nn.linear import Linear
from mlakit.nn.project import rotate_query, wants_grad
from mlakit.nn.step import Step
from mlakit.quant import act_quant

if TYPE_CHECKING:
    from mlakit.nn.mla import MultiheadLatentAttention

# Up to this many new tokens behind a context are attended to in MQA mode, more in MHA mode. A head's product with a key
# costs 2 * (576 + 512) operations there and 2 * (192 + 128) here, where the key must first be expanded, 2 * 512 * 256
# for all the new tokens together: the two are equal at 171 tokens.
MQA_TOKENS = 128

# Tokens of a context that are expanded at a time, over all requests: 0.5 GiB of keys and values of 128 heads.
CONTEXT_TOKENS = 8192


def forward(layer: "MultiheadLatentAttention", x: torch.Tensor, step: Step) -> torch.Tensor:
    """[bsz, seqlen, dim] to the same."""
    refuse_mask(layer.attn_impl, step)
    if _absorbs(step) and hopper_step.suits(layer, x, step):
        return _step_on_hopper(layer, x, step)
    return layer.wo(_attend(layer, x, step))


def _absorbs(step: Step) -> bool:
    """Whether new tokens attend in MQA mode, where no gradient is wanted.

    Keys and values can be expanded from tokens that are here; those of a cache in pieces are attended to where they
    lie.
    """
    few = step.seqlen <= MQA_TOKENS or (isinstance(step.cache, LatentCache) and not step.cache.is_whole)
    return not isinstance(step.start, int) or (not step.begins and few)


def _attend(layer: "MultiheadLatentAttention", x: torch.Tensor, step: Step) -> torch.Tensor:
    """[bsz, seqlen, dim] to heads' outputs side by side, [bsz, seqlen, n_heads * v_head_dim]."""
    branch = Branch(x.device)  # the query's two projections take longer than all that the cache needs
    with branch.inside():
        kv = layer.wkv_a(x)
        if step.cache is not None:
            _append(layer, kv.detach(), step)
    q = layer.query(x)
    if not isinstance(step.start, int) or (_absorbs(step) and not wants_grad(q, kv)):
        return _attend_in_mqa_mode(layer, q, step, branch).flatten(2)
    branch.join()
    return _attend_in_mha_mode(layer, q, kv, step).flatten(2)


def _append(layer: "MultiheadLatentAttention", kv: torch.Tensor, step: Step) -> None:
    """Normalize, rotate and write the new tokens' latents, in one kernel."""
    cache, args = step.cache, layer.args
    assert isinstance(cache, LatentCache)
    positions = None if step.positions is None else step.positions.flatten()
    cos, sin = step.cos, step.sin
    if positions is None and step.bsz > 1:
        if step.seqlen == 1:
            cos, sin = cos.expand(step.bsz, -1), sin.expand(step.bsz, -1)
        else:
            positions = torch.arange(step.seqlen, device=kv.device).repeat(step.bsz)
    append_latent(
        kv.flatten(0, 1),
        layer.kv_norm.weight.detach(),
        cos,
        sin,
        cache.pages,
        cache.slots(step.start, step.bsz, step.seqlen),
        positions=positions,
        eps=args.eps,
        scale_fmt=args.scale_fmt,
    )
    if isinstance(step.start, int):
        cache.filled = step.end


def _attend_in_mqa_mode(layer: "MultiheadLatentAttention", q: torch.Tensor, step: Step, branch: Branch) -> torch.Tensor:
    """Absorb the keys' up-projection into the query, attend to the latent, project the values up."""
    cache, args = step.cache, layer.args
    assert isinstance(cache, LatentCache)
    if wants_grad(q):
        raise ValueError(
            "fused has no gradient where start_pos is a tensor; call it under torch.no_grad(), or give a number"
        )
    tokens, heads, rank = step.bsz * step.seqlen, args.n_heads, args.kv_lora_rank
    up_k, up_v = layer.up_projections(q.dtype)
    absorbed = _absorb(q, up_k, step, branch)
    with branch.inside():
        seq_lens = step.seq_lens(q.device)
    branch.join()
    out = cache.attend(absorbed, seq_lens, softmax_scale=layer.softmax_scale, causal=step.causal)
    result = q.new_empty(tokens, heads, args.v_head_dim)
    _bmm(out.view(tokens, heads, rank).transpose(0, 1), up_v.transpose(1, 2), result.transpose(0, 1))
    return result.view(step.bsz, step.seqlen, heads, args.v_head_dim)


def _absorb(q: torch.Tensor, up_k: torch.Tensor, step: Step, branch: Branch) -> torch.Tensor:
    """Queries [bsz, seqlen, heads, qk_head_dim] to [bsz, seqlen, heads, latent_dim]; the branch rotates them."""
    heads, nope, rank = up_k.shape
    q_nope, q_pe = q.split((nope, q.shape[-1] - nope), dim=-1)
    absorbed = q.new_empty(step.bsz, step.seqlen, heads, rank + q_pe.shape[-1])
    with branch.inside():
        step.rotate(q_pe, out=absorbed[..., rank:])
    by_head = absorbed.flatten(0, 1)[..., :rank].transpose(0, 1)
    _bmm(q_nope.flatten(0, 1).transpose(0, 1), up_k, by_head)
    return absorbed


def _step_on_hopper(layer: "MultiheadLatentAttention", x: torch.Tensor, step: Step) -> torch.Tensor:
    """The same, from hidden state to hidden state, by kernels that load their weights while the one before still runs.

    The first of them does not, so that whoever wrote to the weights is done.
    """
    from mlakit.hopper_linear import launch_by_head
    from mlakit.nn.hopper_query import launch_query

    cache, args = step.cache, layer.args
    assert isinstance(cache, LatentCache)
    bsz, seqlen, heads = step.bsz, step.seqlen, args.n_heads
    tokens = bsz * seqlen
    low, kv = _project(x.contiguous().view(tokens, args.dim), layer.wq_a, layer.wkv_a)
    branch = Branch(x.device)
    with branch.inside():
        _append(layer, kv.unflatten(0, (bsz, seqlen)), step)
        seq_lens = step.seq_lens(x.device)
    up_k, up_v = layer.up_projections(x.dtype)
    if layer.wq_b.is_fp8:
        q = layer.wq_b(layer.q_norm(low))  # so wide a product has a tile for every multiprocessor: 14 us, here 21
        absorbed = _absorb(q.view(bsz, seqlen, heads, args.qk_head_dim), up_k, step, branch)
    else:
        absorbed = x.new_empty(bsz, seqlen, heads, args.latent_dim)
        positions = None if step.positions is None else step.positions.flatten()
        launch_query(
            low, layer.q_norm.weight, layer.wq_b.weight, up_k, step.cos, step.sin, positions, absorbed.flatten(0, 1),
            q_len=seqlen, eps=args.eps,
        )  # fmt: skip
    branch.join()
    latent = cache.attend(absorbed, seq_lens, softmax_scale=layer.softmax_scale, causal=step.causal)
    values = x.new_empty(tokens, heads, args.v_head_dim)
    launch_by_head(latent.flatten(0, 1), up_v, values, overlap=True)
    (out,) = _project(values.flatten(1), layer.wo, overlap=True)
    return out.view(bsz, seqlen, args.dim)


def _project(x: torch.Tensor, *maps: Linear, overlap: bool = False) -> list[torch.Tensor]:
    """Rows of x through one linear map or two."""
    from mlakit.hopper_linear import launch_linear

    outs = [x.new_empty(x.shape[0], linear.out_features) for linear in maps]
    weights, scales = [linear.weight for linear in maps], []
    if maps[0].is_fp8:
        x, x_scales = act_quant(x, scale_fmt=maps[0].scale_fmt)
        scales = [x_scales, *[linear.scale for linear in maps]]
    elif x.data_ptr() % 16:  # what bulk loads cannot read
        x = x.clone()
    launch_linear(x, weights, outs, scales, overlap=overlap)
    return outs


def _bmm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    # Straight into the strided result: torch.bmm would give a tensor that has to be transposed.
    if torch.compiler.is_compiling():  # which takes no strided result
        out.copy_(torch.bmm(a, b))
    else:
        torch.bmm(a, b, out=out)


def _attend_in_mha_mode(
    layer: "MultiheadLatentAttention", q: torch.Tensor, kv: torch.Tensor, step: Step
) -> torch.Tensor:
    """Expand keys and values: of the new tokens, then of what came before, some of it at a time."""
    args, scale = layer.args, layer.softmax_scale
    widths = (args.kv_lora_rank, args.qk_rope_head_dim)
    latent, k_pe = kv.split(widths, dim=-1)
    q, k_pe = rotate_query(layer, q, step), step.rotate(k_pe.unsqueeze(2))
    k_nope, v = layer.expand(layer.kv_norm(latent))
    if step.begins and not has_kernel(q):  # plain PyTorch has no use for ragged requests
        return batched_attention(q, join_key(k_nope, k_pe), v, scale, causal=step.causal)
    out, lse = attend_in_parts(q, k_nope, k_pe, v, scale, causal=step.causal)
    assert isinstance(step.start, int)
    if step.start:
        cache = step.cache
        assert isinstance(cache, LatentCache)
        outs, lses = [out], [lse]
        each = max(CONTEXT_TOKENS // step.bsz, 1)
        for begin in range(0, step.start, each):
            end = min(begin + each, step.start)
            rows = cache.gather(step.bsz, begin, end).unflatten(0, (step.bsz, end - begin))
            latent, k_pe = rows.split(widths, dim=-1)
            k_nope, v = layer.expand(latent)
            out, lse = attend_in_parts(q, k_nope, k_pe.unsqueeze(2), v, scale, causal=False)
            outs.append(out)
            lses.append(lse)
        out, _ = merge_states(outs, lses)
    return out.view(step.bsz, step.seqlen, args.n_heads, args.v_head_dim)
