"""One call of a layer: where its tokens stand, how they are rotated, what they may see."""

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

from mlakit.nn.caches import Cache, Start
from mlakit.rope import apply_rope

Mask = torch.Tensor | str | None


@dataclass(frozen=True)
class Step:
    """What the implementations need to know of a call beside its tokens.

    Attributes:
        bsz: requests.
        seqlen: new tokens a request.
        start: tokens before them: one number for all, or an integer tensor [bsz].
        end: keys to look at, on the host: start + seqlen, or the cache's capacity where start is a tensor.
        cos: rotations, [rows, rope / 2]: those of the new tokens, or of all positions where start is a tensor.
        sin: as cos.
        positions: [bsz, seqlen], the row of each token; None where token i of every request takes row i.
        causal: new token i sees the keys up to its own.
        mask: an additive [seqlen, end] or [bsz, seqlen, end] that is not causal.
        cache: None while training, when nothing is kept.
    """

    bsz: int
    seqlen: int
    start: Start
    end: int
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor | None
    causal: bool
    mask: torch.Tensor | None
    cache: Cache | None

    @property
    def begins(self) -> bool:
        """Whether nothing comes before the new tokens, as far as the host knows."""
        return isinstance(self.start, int) and self.start == 0

    def rotate(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rope of [bsz, seqlen, heads, rope]."""
        return apply_rope(x, self.cos, self.sin, positions=self.positions, out=out)

    def seq_lens(self, device: torch.device) -> torch.Tensor:
        """Keys of each request, the new ones included, [bsz] int32."""
        if isinstance(self.start, int):
            return torch.full((self.bsz,), self.end, device=device, dtype=torch.int32)
        return torch.add(self.start, self.seqlen).to(torch.int32)

    def additive_mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """What to add to scores [bsz, seqlen, heads, end], as [1 or bsz, seqlen, 1, end]; None to add nothing."""
        if self.mask is not None:
            mask = self.mask.to(dtype)
            return (mask if mask.ndim == 3 else mask[None])[:, :, None]
        if isinstance(self.start, int) and not (self.causal and self.seqlen > 1):
            return None
        key = torch.arange(self.end, device=device)
        if isinstance(self.start, int):
            limit = torch.arange(self.start, self.end, device=device)[None]
        else:
            steps = torch.arange(self.seqlen, device=device) if self.causal else self.seqlen - 1
            limit = (self.start[:, None] + steps).expand(self.bsz, self.seqlen)
        hidden = key > limit[..., None]
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)[:, :, None]

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        """What scores [bsz, seqlen, heads, end], already scaled, make of keys: masked, and their softmax taken."""
        mask = self.additive_mask(scores.dtype, scores.device)
        return softmax(scores if mask is None else scores + mask)

    def only_live(self, rows: torch.Tensor) -> torch.Tensor:
        """A cache's [bsz, end, ...] with zeros where a request has no token, if the host does not know where.

        A weight of 0 does not silence a NaN that lies in an unused place.
        """
        if isinstance(self.start, int):
            return rows
        position = torch.arange(self.end, device=rows.device)
        dead = position >= self.seq_lens(rows.device)[:, None]
        return rows.masked_fill(dead.view(self.bsz, self.end, *[1] * (rows.ndim - 2)), 0)


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """Over the last dimension in float32 (float64 if the scores are), rounded back."""
    compute = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(dim=-1, dtype=compute).to(scores.dtype)


def positions_from(start: Start, seqlen: int) -> torch.Tensor | None:
    """Where the new tokens of each request stand, [bsz, seqlen]; None where start is a number."""
    if isinstance(start, int):
        return None
    if seqlen == 1:
        return start[:, None]
    return start[:, None] + torch.arange(seqlen, device=start.device, dtype=start.dtype)


def rope_rows(freqs_cis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines and sines of a complex table, views [rows, rope / 2]."""
    cos, sin = torch.view_as_real(freqs_cis).unbind(-1)
    return cos, sin


def resolve_mask(mask: Mask, bsz: int, seqlen: int, end: int) -> tuple[bool, torch.Tensor | None]:
    """Is the mask causal, and if it is another one, which?

    A causal tensor is recognised by its values; a tensor is looked at once (the host waits for it) and remembered.

    Raises:
        ValueError: a mask of another kind or shape.
    """
    if mask is None:
        return False, None
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f"mask must be None, 'causal' or an additive tensor, got {mask!r}")
        return True, None
    shapes = ((seqlen, seqlen), (seqlen, end), (bsz, seqlen, end))
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"mask must have shape {expected}, got {list(mask.shape)}")
    if not mask.is_floating_point():
        raise ValueError(f"mask must be floating point and is added to the scores, got {mask.dtype}")
    if mask.ndim == 2 and is_causal(mask):
        return True, None
    if mask.shape[-1] < end:  # of the new tokens among one another: all see what came before
        mask = torch.nn.functional.pad(mask, (end - mask.shape[-1], 0))
    return False, mask


def is_causal(mask: torch.Tensor) -> bool:
    """Whether an additive mask [seqlen, end] is 0 up to each token's own key and -inf after it."""
    if mask.is_meta or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    version = 0 if mask.is_inference() else mask._version
    known = _CAUSAL.get(mask)
    if known is None or known[0] != version:
        seqlen, end = mask.shape
        hidden = torch.ones(seqlen, end, dtype=torch.bool, device=mask.device).triu_(end - seqlen + 1)
        expected = torch.zeros_like(mask).masked_fill_(hidden, -torch.inf)
        known = _CAUSAL[mask] = (version, torch.equal(mask, expected))
    return known[1]


# An attribute that torch.compiler.disable would set; that one imports torch._dynamo, and with it triton, on the spot.
is_causal._torchdynamo_disable = True  # type: ignore[attr-defined]

_CAUSAL: WeakIdKeyDictionary = WeakIdKeyDictionary()
