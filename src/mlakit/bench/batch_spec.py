"""The batch grammar: `(<count>?) q<q_len>(k?) (s<seq_len>(k?))?`, segments joined by `_`.

    q2k               one prefill of 2048 tokens
    8q1s1k            8 decode requests with 1024 keys each
    q4s1k             4 new tokens on a sequence of 1024 (speculative decoding, chunked prefill)
    2q2k_32q1s1k      a mixed batch

`count` is the number of identical requests (1 if left out), `q_len` the new tokens, `seq_len` all tokens of the
sequence, the new ones included (`q_len` if left out: a prefill), and `k` multiplies by 1024. No torch here: a spec is
checked before anything slow starts.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

# Tables and lengths are int32 in every library's interface, ours too.
MAX_TOKENS = 2**31
# Up to this many new tokens at once an extend is called speculative decoding, as vLLM's suite has it.
SPEC_DECODE_TOKENS = 8

_SEGMENT = re.compile(r"(?P<count>\d{1,18})?q(?P<q>\d{1,18})(?P<qk>k?)(?:s(?P<s>\d{1,18})(?P<sk>k?))?", re.ASCII)
_KINDS = ("prefill", "extend", "decode")
_PRINTED = re.compile(r"\s*(?P<total>\d+) (?P<kind>prefill|extend|decode) \((?P<items>[^()]*)\)\s*")
_PRINTED_ITEM = re.compile(r"(?P<count>\d+)x(?:q(?P<q>\d+k?)kv)?(?P<size>\d+k?)")


@dataclass(frozen=True, order=True)
class BatchRequest:
    """One request: `q_len` new tokens on a sequence that holds `kv_len` tokens with them."""

    q_len: int
    kv_len: int

    def __post_init__(self) -> None:
        if self.q_len < 1:
            raise ValueError(f"q_len must be at least 1, got {self.q_len}")
        if self.kv_len < self.q_len:
            raise ValueError(f"kv_len must be at least q_len = {self.q_len}, got {self.kv_len}")

    @property
    def is_decode(self) -> bool:
        """One new token."""
        return self.q_len == 1

    @property
    def is_prefill(self) -> bool:
        """Several new tokens and nothing before them."""
        return self.q_len == self.kv_len and not self.is_decode

    @property
    def is_extend(self) -> bool:
        """Several new tokens on a context: speculative decoding or chunked prefill."""
        return 1 < self.q_len < self.kv_len

    @property
    def context_len(self) -> int:
        """Tokens that were there before the new ones."""
        return self.kv_len - self.q_len

    @property
    def kind(self) -> str:
        """Which of "decode", "prefill" and "extend" it is: exactly one applies."""
        return "decode" if self.is_decode else "prefill" if self.is_prefill else "extend"

    def as_tuple(self) -> tuple[int, int]:
        """(q_len, kv_len)."""
        return self.q_len, self.kv_len


def parse_batch_spec(spec: str) -> list[BatchRequest]:
    """Requests of a batch spec, in order. Also reads back what `format_batch_spec` prints.

    Raises:
        ValueError: the spec cannot be meant (no segment, a malformed one, `q0`, count 0, a sequence shorter than its
            query, more than
            2^31 tokens); the message points at the segment and says what would be right.
    """
    if _PRINTED.match(spec):
        return _parse_printed(spec)
    requests: list[BatchRequest] = []
    total = 0
    for number, segment in enumerate(spec.split("_"), start=1):
        count, q_len, kv_len = _parse_segment(spec, number, segment)
        total += count * kv_len
        if total > MAX_TOKENS:
            _fail(
                spec, number, segment, f"brings the batch to {total} tokens; at most 2^31 = {MAX_TOKENS} are possible"
            )
        requests += [BatchRequest(q_len, kv_len)] * count
    return requests


def _parse_segment(spec: str, number: int, segment: str) -> tuple[int, int, int]:
    if not segment:
        _fail(spec, number, segment, 'is empty; segments are joined by single underscores, as in "2q2k_32q1s1k"')
    match = _SEGMENT.fullmatch(segment)
    if not match:
        hint = ""
        lower = segment.strip().lower()
        if lower != segment and _SEGMENT.fullmatch(lower):
            hint = f'; did you mean "{lower}"?'
        _fail(spec, number, segment, f'does not read as <count>q<q_len>s<seq_len>, for example "8q1s1k"{hint}')
    count = int(match["count"] or 1)
    q_len = int(match["q"]) * (1024 if match["qk"] else 1)
    kv_len = int(match["s"]) * (1024 if match["sk"] else 1) if match["s"] else q_len
    if count < 1:
        _fail(spec, number, segment, f'has count 0; leave the count out for one request: "{segment.lstrip("0")}"')
    if q_len < 1:
        _fail(spec, number, segment, "has q_len 0; a request has at least one new token: q1 for decode")
    if kv_len < q_len:
        q, s = format_size(q_len), format_size(kv_len)
        _fail(
            spec,
            number,
            segment,
            f"has a sequence of {s} shorter than its {q} new tokens, which it includes; "
            f'for {q} tokens on a context of {s} write "{match["count"] or ""}q{q}s{format_size(q_len + kv_len)}"',
        )
    return count, q_len, kv_len


def _fail(spec: str, number: int, segment: str, problem: str) -> NoReturn:
    raise ValueError(f'batch spec "{spec}": segment {number} ("{segment}") {problem}')


def _parse_printed(spec: str) -> list[BatchRequest]:
    requests: list[BatchRequest] = []
    position = 0
    while True:
        match = _PRINTED.match(spec, position)
        if not match:
            raise ValueError(f'batch spec "{spec}": "{spec[position:]}" does not read as "8 decode (8x1k)"')
        group: list[BatchRequest] = []
        for item in match["items"].split(", "):
            found = _PRINTED_ITEM.fullmatch(item)
            if not found or (match["kind"] == "extend") != bool(found["q"]):
                raise ValueError(f'batch spec "{spec}": "{item}" does not read as "8x1k", or "8xq4kv1k" of an extend')
            kv_len = parse_size(found["size"])
            q_len = {"prefill": kv_len, "decode": 1}.get(match["kind"]) or parse_size(found["q"])
            group += [BatchRequest(q_len, kv_len)] * int(found["count"])
        if len(group) != int(match["total"]):
            raise ValueError(f'batch spec "{spec}": says {match["total"]} {match["kind"]} and lists {len(group)}')
        requests += group
        position = match.end()
        if position == len(spec):
            return requests
        position += 1  # the comma; whatever else stands there fails to match


def parse_size(text: str) -> int:
    """A number with an optional `k` for 1024."""
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def format_size(size: int) -> str:
    """The shortest way the grammar writes a number: 2048 is `2k`, 1000 is `1000`."""
    return f"{size // 1024}k" if size and size % 1024 == 0 else str(size)


def format_batch_spec(requests: Iterable[BatchRequest]) -> str:
    """The batch in words, for people: "2 prefill (2x2k), 1 extend (1xq4kv1k), 32 decode (32x1k)"."""
    by_kind = split_by_type(requests)
    parts = []
    for kind in _KINDS:
        items = []
        for request, count in Counter(by_kind[kind]).items():
            size = format_size(request.kv_len)
            items.append(f"{count}xq{format_size(request.q_len)}kv{size}" if kind == "extend" else f"{count}x{size}")
        if items:
            parts.append(f"{len(by_kind[kind])} {kind} ({', '.join(items)})")
    return ", ".join(parts)


def to_batch_spec(requests: Sequence[BatchRequest]) -> str:
    """The batch in the grammar: neighbours that are equal share a segment, so that parsing gives the same list back.

    Raises:
        ValueError: no requests; the grammar has no empty batch.
    """
    if not requests:
        raise ValueError("a batch needs at least one request, got none")
    segments: list[tuple[BatchRequest, int]] = []
    for request in requests:
        if segments and segments[-1][0] == request:
            segments[-1] = (request, segments[-1][1] + 1)
        else:
            segments.append((request, 1))
    return "_".join(
        f"{count if count > 1 else ''}q{format_size(r.q_len)}"
        + ("" if r.kv_len == r.q_len else f"s{format_size(r.kv_len)}")
        for r, count in segments
    )


def multiply_batch(spec: str, batch_size: int) -> str:
    """The spec with each of its segments `batch_size` times.

    Raises:
        ValueError: the spec is malformed or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    segments = [parse_batch_spec(segment) for segment in spec.split("_")]
    return to_batch_spec([request for segment in segments for request in segment * batch_size])


def split_by_type(requests: Iterable[BatchRequest]) -> dict[str, list[BatchRequest]]:
    """Requests by kind, under the keys "decode", "prefill" and "extend", order kept."""
    result: dict[str, list[BatchRequest]] = {"decode": [], "prefill": [], "extend": []}
    for request in requests:
        result[request.kind].append(request)
    return result


def get_batch_stats(requests: Sequence[BatchRequest]) -> dict[str, int | float]:
    """Counts and sizes of a batch; averages are 0 for an empty one."""
    by_kind = split_by_type(requests)
    q_lens = [r.q_len for r in requests]
    kv_lens = [r.kv_len for r in requests]
    count = len(requests)
    return {
        "total_requests": count,
        "num_decode": len(by_kind["decode"]),
        "num_prefill": len(by_kind["prefill"]),
        "num_extend": len(by_kind["extend"]),
        "total_tokens": sum(q_lens),
        "total_kv_cache": sum(kv_lens),
        "max_q_len": max(q_lens, default=0),
        "max_kv_len": max(kv_lens, default=0),
        "avg_q_len": sum(q_lens) / count if count else 0,
        "avg_kv_len": sum(kv_lens) / count if count else 0,
    }


def get_batch_type(batch: str | Sequence[BatchRequest], spec_decode_threshold: int = SPEC_DECODE_TOKENS) -> str:
    """What a batch is: "prefill", "decode", "spec-decode", "extend", or "mixed (decode+prefill)" and the like.

    Args:
        batch: a spec or its requests.
        spec_decode_threshold: an extend of at most this many new tokens counts as speculative decoding.

    Raises:
        ValueError: the spec is malformed or holds no request.
    """
    requests = parse_batch_spec(batch) if isinstance(batch, str) else batch
    if not requests:
        raise ValueError("a batch needs at least one request, got none")
    kinds = sorted({"spec-decode" if r.is_extend and r.q_len <= spec_decode_threshold else r.kind for r in requests})
    return kinds[0] if len(kinds) == 1 else f"mixed ({'+'.join(kinds)})"
