"""The table of rotations, plain and YaRN's."""

import math

import pytest
import torch

from mlakit.nn import Args, get_mla, precompute_freqs_cis
from tests.support.deepseek_layer import rotation_table


# As served (no YaRN within the original context), stretched 40 times, a narrow rope part whose ramp is a step.
@pytest.mark.parametrize(
    "args",
    [
        Args(max_seq_len=1000),
        Args(max_seq_len=16384),
        Args(max_seq_len=8192, qk_rope_head_dim=2, rope_factor=4.0),
        Args(max_seq_len=5000, rope_theta=50000.0, beta_fast=64, beta_slow=2, qk_rope_head_dim=128),
    ],
    ids=["plain", "yarn", "narrow", "other betas"],
)
def test_against_deepseeks(args):
    actual, expected = precompute_freqs_cis(args), rotation_table(args)
    assert actual.dtype == torch.complex64
    assert actual.shape == (args.max_seq_len, args.qk_rope_head_dim // 2)
    # DeepSeek's angles are float32: off by half a unit in the last place of the angle.
    assert (actual - expected).abs().max() < args.max_seq_len * 2**-23


def test_positions_turn_by_their_angle():
    table = precompute_freqs_cis(Args(max_seq_len=64, qk_rope_head_dim=4))
    assert table[5, 0] == pytest.approx(complex(math.cos(5), math.sin(5)), abs=1e-6)
    assert table[5, 1] == pytest.approx(complex(math.cos(0.05), math.sin(0.05)), abs=1e-6)


def test_yarn_in_the_softmax_scale():
    assert Args(max_seq_len=4096).softmax_scale == 192**-0.5
    stretched = Args(max_seq_len=16384)
    assert stretched.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert Args(max_seq_len=16384, yarn=False).softmax_scale == 192**-0.5
    assert Args(max_seq_len=64, yarn=True).softmax_scale == stretched.softmax_scale
    assert Args(yarn=True, mscale=0.707).softmax_scale == pytest.approx(192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)


def test_two_mscales_as_in_hugging_faces_configs():
    """The rope part gets the ratio of the two, all of the score the second's square."""
    args = Args(yarn=True, mscale=1.0, mscale_all_dim=0.5, max_seq_len=32)
    strong, weak = 0.1 * math.log(40) + 1, 0.05 * math.log(40) + 1
    assert args.softmax_scale == pytest.approx(192**-0.5 * weak**2)
    torch.testing.assert_close(precompute_freqs_cis(args).abs(), torch.full((32, 32), strong / weak))


def test_the_layers_table_is_where_the_layer_is():
    layer = get_mla("naive", Args(dim=8, n_heads=1, max_seq_len=4)).to("meta")
    assert layer.precompute_freqs_cis().is_meta
    assert layer.precompute_freqs_cis(Args(max_seq_len=9)).shape == (9, 32)
