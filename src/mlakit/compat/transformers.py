"""mlakit as an attention implementation of Hugging Face transformers: `attn_implementation="mlakit"`.

    from mlakit.compat.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="mlakit")

transformers expands the keys and values of MLA before it attends, so what it runs is `mla_prefill`, in MHA mode, for
DeepSeek's models and for any other decoder with plain causal attention. `mlakit.nn` is the layer that keeps the latent.
"""

from typing import Any

import torch

from mlakit.prefill import mla_prefill


def register(name: str = "mlakit") -> None:
    """Make `attn_implementation=name` known to transformers. Calling it again does no harm.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "mlakit.compat.transformers needs transformers 5: pip install 'mlakit[transformers]'"
        ) from error
    AttentionInterface.register(name, attention)
    # Without this one transformers makes no mask at all, and padding would be attended to.
    AttentionMaskInterface.register(name, padding_mask)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """What transformers hands to `attention` as its mask: which tokens are no padding, bool [batch, keys], or None if
    all are.

    Raises:
        ValueError: something else than causal attention to all earlier tokens is asked for (a sliding window, packed
            sequences, a static cache).
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function not in (None, causal_mask_function):
        raise ValueError(
            "mlakit attends causally to all earlier tokens: expected the causal mask, got another one (a window, "
            "packed sequences, both directions or one of the caller's own)"
        )
    if kv_offset or kv_length != int(q_offset) + q_length:
        raise ValueError(
            f"mlakit attends to a cache that holds just the tokens so far (DynamicCache): expected {int(q_offset)} + "
            f"{q_length} keys from 0 on, got {kv_length} from {kv_offset} on"
        )
    if attention_mask is None:
        return None
    live = attention_mask[:, :kv_length].bool()
    return None if bool(live.all()) else live


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' attention functions do, by `mla_prefill`.

    Args:
        module: the attention layer; its `is_causal` counts where the argument is None.
        query: [batch, heads, queries, qk_head_dim], the last ones of the keys' positions.
        key: [batch, kv_heads, keys, qk_head_dim]; heads is a multiple of kv_heads.
        value: [batch, kv_heads, keys, v_head_dim].
        attention_mask: of `padding_mask`.
        scaling: of the scores; None is 1/sqrt(qk_head_dim).
        dropout: must be 0.
        is_causal: a query sees the keys up to its own position.
        kwargs: what else transformers passes on; a window, a soft cap, sinks or a bias of positions are refused.

    Returns:
        [batch, queries, heads, v_head_dim], zeros for padding, and None for the weights, which are never there.

    Raises:
        ValueError: an option or mask that the kernel does not have.
    """
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"mlakit has no {name}, got {name}={kwargs[name]!r}")
    if dropout:
        raise ValueError(f"mlakit has no dropout: expected attention_dropout 0, got {dropout}")
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    if attention_mask is not None and attention_mask.shape != (batch, keys):
        raise ValueError(
            f"mlakit takes a padding mask [{batch}, {keys}], got a mask of shape {list(attention_mask.shape)}"
        )
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    scale = dim**-0.5 if scaling is None else scaling
    q, k, v = (tensor.transpose(1, 2).reshape(-1, tensor.shape[1], tensor.shape[3]) for tensor in (query, key, value))
    if attention_mask is None:
        bounds_q, bounds_k = (
            torch.arange(0, (batch + 1) * each, each, device=query.device, dtype=torch.int32)
            if each
            else torch.zeros(batch + 1, device=query.device, dtype=torch.int32)
            for each in (queries, keys)
        )
        out, _ = mla_prefill(q, k, v, bounds_q, bounds_k, softmax_scale=scale, causal=causal, max_seqlen_q=queries)
        return out.view(batch, queries, heads, -1), None

    # Padding may be on either side: what is left of each request is a sequence of its own.
    live_q, live_k = attention_mask[:, keys - queries :], attention_mask
    rows_q, rows_k = live_q.flatten().nonzero()[:, 0], live_k.flatten().nonzero()[:, 0]
    bounds_q, bounds_k = (
        torch.nn.functional.pad(live.sum(dim=1).cumsum(0, dtype=torch.int32), (1, 0)) for live in (live_q, live_k)
    )
    found, _ = mla_prefill(
        q[rows_q], k[rows_k], v[rows_k], bounds_q, bounds_k, softmax_scale=scale, causal=causal, max_seqlen_q=queries
    )
    out = found.new_zeros(batch * queries, heads, v.shape[-1]).index_copy(0, rows_q, found)
    return out.view(batch, queries, heads, -1), None
