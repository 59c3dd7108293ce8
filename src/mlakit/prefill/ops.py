"""`mlakit::mla_prefill` and its relatives as torch.library operators; Triton is imported when one first runs.

The reference runs inside of them too: it reads the sequences' bounds, which torch.compile could not look through.
"""

import torch

from mlakit.concat.api import concat_k
from mlakit.prefill.hopper_config import why_not_aligned, why_not_hopper
from mlakit.prefill.reference import mla_prefill_backward_reference, mla_prefill_reference


def run_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    max_seqlen_q: int,
    k_pe: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as `mlakit.prefill.mla_prefill` defines them; a negative `max_seqlen_q` means that it is not known.

    `impl` is "triton", "hopper", "auto" for the faster of these that can run these very tensors, or "reference".
    """
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    return out, _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, out, softmax_scale, causal, max_seqlen_q, k_pe, impl)


mla_prefill = torch.library.custom_op("mlakit::mla_prefill", run_prefill, mutates_args=())


@mla_prefill.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, max_seqlen_q, k_pe=None, impl="auto"):
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    return out, _lse_like(q)


def run_prefill_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    max_seqlen_q: int,
    k_pe: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Like `run_prefill`, with `out` filled in place and lse returned; no gradients."""
    lse = _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, out, softmax_scale, causal, max_seqlen_q, k_pe, impl)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return lse


mla_prefill_out = torch.library.custom_op("mlakit::mla_prefill_out", run_prefill_out, mutates_args=("out",))


@mla_prefill_out.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, out, softmax_scale, causal, max_seqlen_q, k_pe=None, impl="auto"):
    return _lse_like(q)


@torch.library.custom_op("mlakit::mla_prefill_backward", mutates_args=())
def mla_prefill_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous. `dlse` is like lse, or None if nothing depends on it. From "reference" come its own
    gradients, from any other `impl` Triton's.
    """
    if impl == "reference":
        return mla_prefill_backward_reference(
            dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale=softmax_scale, causal=causal
        )

    from mlakit.prefill.config import backward_configs
    from mlakit.prefill.triton_backward import _launch_backward

    dq = q.new_empty(q.shape)
    dk = k.new_empty(k.shape)
    dv = v.new_empty(v.shape)
    config_kv, config_q = backward_configs(q.shape[2], v.shape[2], _capability(q))
    _launch_backward(
        q,
        k,
        v,
        out,
        lse,
        dout if dout.stride(-1) == 1 else dout.contiguous(),  # a broadcast gradient has stride 0
        None if dlse is None else dlse.contiguous(),
        cu_seqlens_q,
        cu_seqlens_k,
        dq,
        dk,
        dv,
        softmax_scale=softmax_scale,
        causal=causal,
        config_kv=config_kv,
        config_q=config_q,
    )
    return dq, dk, dv


@mla_prefill_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, impl="auto"):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, _, k_pe, impl = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, k_pe, out, lse, cu_seqlens_q, cu_seqlens_k)
    ctx.softmax_scale = softmax_scale
    ctx.causal = causal
    ctx.impl = impl
    ctx.set_materialize_grads(False)  # a gradient of zeros for lse would cost a pass over it


def _backward(ctx, dout, dlse):
    q, k, v, k_pe, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 10
    if dout is None:
        dout = torch.zeros_like(out)
    keys = _keys(k, k_pe)
    dq, dk, dv = mla_prefill_backward(
        dout, dlse, q, keys, v, out, lse, cu_seqlens_q, cu_seqlens_k, ctx.softmax_scale, ctx.causal, ctx.impl
    )
    dk_pe = None
    if k_pe is not None:
        dk, dk_pe = dk[..., : k.shape[-1]], dk[..., k.shape[-1] :]
        if k_pe.shape[1] != k.shape[1]:  # every head used the one row; PyTorch's sum accumulates in float32
            dk_pe = dk_pe.sum(dim=1, keepdim=True)
    return dq, dk, dv, None, None, None, None, None, dk_pe, None


mla_prefill.register_autograd(_backward, setup_context=_setup_context)


def _lse_like(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _keys(k: torch.Tensor, k_pe: torch.Tensor | None) -> torch.Tensor:
    """The keys in one tensor."""
    if k_pe is None:
        return k
    if k_pe.shape[1] != 1:
        return torch.cat([k, k_pe], dim=-1)
    return concat_k(k, k_pe)


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    max_seqlen_q: int,
    k_pe: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    if impl == "reference":
        result, lse = mla_prefill_reference(
            q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=softmax_scale, causal=causal, k_pe=k_pe
        )
        out.copy_(result)
        return lse
    lse = _lse_like(q)
    if impl != "triton" and takes_hopper(q, k, v, k_pe, cu_seqlens_q, max_seqlen_q, impl == "hopper"):
        from mlakit.prefill.hopper_launch import _launch_hopper

        _launch_hopper(
            q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, softmax_scale=softmax_scale, causal=causal, k_pe=k_pe
        )
        return lse

    from mlakit.prefill.config import forward_config
    from mlakit.prefill.triton_forward import _launch_forward

    k = _keys(k, k_pe)
    rows = _rows(q, cu_seqlens_q, max_seqlen_q)
    config = forward_config(q.shape[2], v.shape[2], _capability(q), rows)
    _launch_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        out,
        lse,
        softmax_scale=softmax_scale,
        causal=causal,
        config=config,
    )
    return lse


def takes_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pe: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    named: bool,
) -> bool:
    """Whether the Hopper kernel runs these very tensors; `named`: the caller asked for it.

    Raises:
        RuntimeError: it was asked for and cannot.
    """
    reason = why_not_hopper(q, k, v, k_pe, cu_seqlens_q.numel() - 1) or why_not_aligned(q, k, v, k_pe)
    if named and reason is not None:
        raise RuntimeError(f"mla_prefill: impl='hopper' cannot run: {reason}")
    # Its tiles have 128 rows, where the portable kernel has tiles of 64 for sequences that short.
    return reason is None and (named or _rows(q, cu_seqlens_q, max_seqlen_q) > 64)


def _rows(q: torch.Tensor, cu_seqlens_q: torch.Tensor, max_seqlen_q: int) -> int:
    """A bound of a sequence's length; without a hint the mean length is the best guess at hand."""
    return max_seqlen_q if max_seqlen_q >= 0 else q.shape[0] // max(cu_seqlens_q.numel() - 1, 1)


def _capability(x: torch.Tensor) -> tuple[int, int]:
    from mlakit.hardware import capability

    return capability(x.device) or (8, 0)  # the interpreter runs what an A100 would
