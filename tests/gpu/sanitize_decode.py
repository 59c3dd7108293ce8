"""Small decodes of every kernel, checked: what test_decode_sanitizer.py runs under NVIDIA's compute-sanitizer.

compute-sanitizer --tool memcheck python tests/gpu/sanitize_decode.py hopper triton
compute-sanitizer --tool racecheck python tests/gpu/sanitize_decode.py few
"""

import sys

import torch

from mlakit.decode import mla_decode, mla_decode_reference
from mlakit.testing import assert_close, random_paged_cache

SCALE = 192**-0.5
# Pieces to merge, an empty request, a partly filled tile; one request; 16 rows (few heads) and two tiles of 64 (many).
CASES = {
    "few": ("hopper", [([70, 0, 200], 1, 16), ([300], 1, 16)]),
    "many": ("hopper", [([70, 0, 300], 1, 128)]),
    "causal": ("hopper", [([70, 3], 4, 32)]),
    "triton": ("triton", [([70, 0, 200], 2, 16), ([300], 1, 128)]),
}
GROUPS = {"hopper": ("few", "many", "causal")}


def main() -> None:
    for group in sys.argv[1:]:
        for name in GROUPS.get(group, (group,)):
            impl, cases = CASES[name]
            for lens, q_len, heads in cases:
                generator = torch.Generator("cuda").manual_seed(0)
                paged = random_paged_cache(
                    lens, (576,), page_size=64, dtype=torch.bfloat16, device="cuda", generator=generator
                )
                q = torch.randn((len(lens), q_len, heads, 576), generator=generator, device="cuda").bfloat16()
                inputs = (q, paged.pages, paged.block_table, paged.seq_lens)
                out, _ = mla_decode(*inputs, softmax_scale=SCALE, impl=impl)
                eager, _ = mla_decode_reference(*inputs, softmax_scale=SCALE)
                expected, _ = mla_decode_reference(q.double(), paged.pages, *inputs[2:], softmax_scale=SCALE)
                assert_close(out, expected, eager)
                print(f"right: {name} {lens} {q_len} {heads}", flush=True)


if __name__ == "__main__":
    main()
