"""The Gluon kernel of `mla_prefill`, compiled for a Hopper that is not there."""

import re

import pytest
import torch

from mlakit.prefill.hopper_config import hopper_config
from mlakit.prefill.hopper_launch import _launch_hopper
from mlakit.testing.offline import CompiledKernel, offline

pytestmark = pytest.mark.compiled


def compiled_for(nope: int, rope: int, v_dim: int, causal: bool, apart: bool, tokens: int = 256) -> CompiledKernel:
    dtype = torch.float16 if apart else torch.bfloat16
    q = torch.empty((tokens, 16, nope + rope), dtype=dtype)
    kv = torch.empty((tokens, 16, nope + (0 if apart else rope) + v_dim), dtype=dtype)
    k_pe = torch.empty((tokens, 1, rope), dtype=dtype) if apart else None
    bounds = torch.tensor([0, 100, tokens], dtype=torch.int32)
    out, lse = torch.empty((tokens, 16, v_dim), dtype=dtype), torch.empty((tokens, 16))
    with offline(90) as compiled:
        _launch_hopper(
            q, kv[..., :-v_dim], kv[..., -v_dim:], bounds, bounds, out, lse, softmax_scale=0.1, causal=causal, k_pe=k_pe
        )  # fmt: skip
    (kernel,) = compiled
    return kernel


def overwritten_operands(sass: str) -> list[str]:
    """Instructions that write a register which a product in flight may still read.

    ptxas may take the registers of a left operand for free as soon as the product is issued.
    """
    found: list[str] = []
    groups: list[set[int]] = []  # of products in flight, by the order of their ends
    current: set[int] = set()
    for line in sass.splitlines():
        instruction = re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?(\S+) (.*?);", line)
        if instruction is None:
            continue
        name, operands = instruction[1], instruction[2].strip()
        if name.startswith("HGMMA"):
            if left := re.match(r"R\d+, R(\d+), gdesc", operands):
                current |= set(range(int(left[1]), int(left[1]) + 4))
            if "gsb0" in operands:
                groups.append(current)
                current = set()
        elif name.startswith("WARPGROUP.DEPBAR"):
            left_over = int(operands.split(",")[-1], 16)
            groups = groups[len(groups) - left_over :] if left_over else []
        elif not name.startswith(("ST", "RED", "BAR", "BRA", "SYNCS", "R2UR")) and (
            target := re.match(r"(?:U?PT?\d*, )*R(\d+)", operands)
        ):
            width = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
            if set().union(current, *groups) & set(range(int(target[1]), int(target[1]) + width)):
                found.append(line.strip())
    return found


def before_votes(sass: str) -> list[list[str]]:
    """The instructions since the last branch, where all of a warp must say that its weights are good."""
    names = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", sass)
    votes = [i for i, name in enumerate(names) if name == "VOTE.ALL"]
    return [names[max(i for i in range(vote) if names[i] == "BRA") : vote] for vote in votes]


# DeepSeek's dims with the keys in two parts and in one, and the narrowest: one part, values of half the columns.
@pytest.mark.parametrize(
    ("nope", "rope", "v_dim", "causal", "apart"),
    [(128, 64, 128, True, True), (128, 64, 128, False, False), (64, 0, 64, True, False)],
)
def test_products_run_side_by_side_and_nothing_spills(nope, rope, v_dim, causal, apart):
    kernel = compiled_for(nope, rope, v_dim, causal, apart)
    config = hopper_config(nope + rope, v_dim)
    assert kernel.spills == 0
    assert kernel.registers <= 168  # 12 warps
    assert kernel.shared_bytes <= 227 * 1024
    # For each warpgroup: scores of a first block; values and scores in two loops, and where one tile follows another.
    # Where ptxas gives up on keeping products in flight, it waits after each instruction.
    depth = (nope + rope) // 16 * 4 + config.block_n // 16 * 3
    assert len(re.findall(r"\bHGMMA\.", kernel.sass)) == 2 * depth
    assert len(re.findall(r"\bWARPGROUP\.DEPBAR\b", kernel.sass)) <= 10
    assert overwritten_operands(kernel.sass) == []
    assert "UTMALDG" in kernel.sass
    # In a loop and at a tile's end for each warpgroup: exponentials, and nothing of a maximum.
    votes = before_votes(kernel.sass)
    assert [names.count("MUFU.EX2") for names in votes] == [64] * 4
    assert not [name for names in votes for name in names if name.startswith(("FMNMX", "SHFL"))]


def test_overwritten_operands_are_found():
    lines = [
        "        /*0010*/                   HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR8].tnspB, R88 ;",
        "        /*0020*/                   FADD R156, R152, R3 ;",
        "        /*0030*/              @!P0 FMUL R155, R2, R3 ;",
        "        /*0040*/                   HGMMA.64x128x16.F32.BF16 R88, R160, gdesc[UR8].tnspB, R88, gsb0 ;",
        "        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;",
        "        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x2 ;",
        "        /*0070*/                   F2FP.BF16.F32.PACK_AB R163, R2, R3 ;",
        "        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;",
        "        /*0090*/                   FMUL R155, R2, R3 ;",
    ]
    assert overwritten_operands("\n".join(lines)) == [lines[2].strip(), lines[6].strip()]


def test_a_new_length_does_not_recompile():
    from mlakit.prefill.hopper_forward import _prefill_hopper_kernel

    def variants() -> int:
        return len(_prefill_hopper_kernel.device_caches[90][0])

    compiled_for(64, 0, 64, True, False)
    before = variants()
    for tokens in (333, 1024, 1001):
        compiled_for(64, 0, 64, True, False, tokens)
    assert variants() == before
