"""Speed of `apply_rope` on a GPU: checked against float64, then timed beside eager PyTorch.

    python benchmarks/h200/rope.py results.json            # the default configuration and the baselines
    python benchmarks/h200/rope.py results.json --tune     # and every launch configuration worth a try

Queries of DeepSeek-V3 as the layer holds them: the last 64 columns of [T, 128, 192], turned in place or written to the
last columns of [T, 128, 576]; and the shared key, [T, 1, 64] out of rows of 192. Angles are the parts of a complex
table. Cold L2. TB/s counts what must be read and written.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from common import CUDA, Job, Tensors, parse_arguments, run

from mlakit.rope import apply_rope, apply_rope_reference
from mlakit.rope.triton_rope import RopeConfig, launch_rope
from mlakit.testing import compare

ROPE, HALF = 64, 32


def complex_product(x: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """As DeepSeek's own code turns: pairs as complex numbers in float32."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], HALF, 2))
    return out.copy_(torch.view_as_real(pairs * table[:, None]).flatten(-2))


def configs(tokens: int, heads: int) -> Iterator[RopeConfig]:
    for rows in (4, 8, 16, 32, 64, 128, 256):
        for num_warps in (1, 2, 4, 8):
            if rows <= tokens * heads and 8 * 32 * num_warps <= rows * ROPE <= 64 * 32 * num_warps:
                block_heads = min(rows, heads)
                yield RopeConfig(rows // block_heads, block_heads, num_warps)


def jobs(tune: bool) -> Iterator[Job]:
    rows = [("out", 1, 128), ("out", 32, 128), ("out", 4096, 128), ("in_place", 4096, 128), ("in_place", 32, 1)]
    for into, tokens, heads in [*rows, ("in_place", 4096, 1)]:
        for layout in ("interleaved", "half"):
            yield job(into, tokens, heads, layout, tune)


def job(into: str, tokens: int, heads: int, layout: str, tune: bool) -> Job:
    wide = torch.randn(tokens, heads, 192, device=CUDA, dtype=torch.bfloat16)
    x = wide[..., 128:]
    angles = torch.randn(tokens, HALF, device=CUDA, dtype=torch.float64) * 3
    table = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    cos, sin = table.real, table.imag
    exact = apply_rope_reference(x.double(), cos, sin, layout=layout)
    eager = apply_rope_reference(x, cos, sin, layout=layout)
    # What is turned in place once is turned again by the next call: only a copy can be checked.
    source = wide.clone()[..., 128:]
    out = source if into == "in_place" else torch.empty(tokens, heads, 576, device=CUDA, dtype=x.dtype)[..., 512:]

    def checked(call: Callable[[], object]) -> Callable[[], Tensors]:
        fresh = iter([True, True])

        def again() -> Tensors:
            if next(fresh, False):  # the two calls whose result is looked at
                source.copy_(x)
                call()
                return (out.clone(),)
            call()
            return (out,)

        return again

    def wrong(results: Tensors) -> str:
        return compare(results[0], exact, eager).reason

    def launch(config: RopeConfig) -> None:
        launch_rope(source, cos, sin, None, out, layout=layout, config=config)

    candidates: list[tuple[str, Callable[[], Tensors]]] = [
        ("triton", checked(partial(apply_rope, source, cos, sin, layout=layout, out=out))),
        ("eager", checked(partial(apply_rope_reference, source, cos, sin, layout=layout, out=out))),
    ]
    if layout == "interleaved":
        candidates.append(("complex product", checked(partial(complex_product, source, table, out))))
    for config in configs(tokens, heads) if tune and layout == "interleaved" else ():
        name = f"triton t{config.block_tokens} h{config.block_heads} w{config.num_warps}"
        candidates.append((name, checked(partial(launch, config))))
    return Job(
        op="apply_rope",
        name=f"{tokens}x{heads} {layout} {into}",
        fields={"tokens": tokens, "heads": heads, "dim": ROPE, "layout": layout, "into": into},
        flops=6.0 * tokens * heads * HALF,
        least_bytes=2 * x.numel() * x.element_size() + tokens * HALF * 8,
        wrong=wrong,
        candidates=candidates,
        peer="complex product" if layout == "interleaved" else "eager",
    )


def main() -> None:
    args = parse_arguments(__doc__, repeats=40)
    found = (one for one in jobs(args.tune) if not args.rows or one.name.startswith(args.rows))
    run(found, args.output, args.repeats)


if __name__ == "__main__":
    main()
