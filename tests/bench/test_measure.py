"""Backends, workload, check and limit together, in this process."""

import pytest
import torch

from mlakit.backends import registry
from mlakit.backends.pipeline import absorb_query, expand, gather
from mlakit.bench.check import compute_expectation, judge
from mlakit.bench.limits import Ceilings, measure_ceilings
from mlakit.bench.measure import limit_of, measure_row
from mlakit.bench.workload import build, estimate_bytes, split_requests

# Odd lengths around page ends (16), one token, a request that fills its pages, several of one shape and one of its own.
KINDS = {
    "decode": "3q1s70_q1_2q1s16_q1s33",
    "spec-decode": "3q4s70_q8s9_q2s17",
    "extend": "2q20s50_q11s12_q33s64",
    "prefill": "q16_2q37_q9",
    "mixed": "q40_2q20s50_3q4s33_q1s70_2q1s5",
}
CEILINGS = Ceilings("a CPU", "float32", 1e10, 1.1e10, 1e11)


@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("scope", ["attention", "pipeline"])
@pytest.mark.parametrize("backend", ["torch_naive", "torch_absorb", "sdpa"])
def test_mla_backends_are_right(row, backend, scope, spec):
    result = measure_row(row(backend, spec, scope=scope), CEILINGS)
    assert result.success, result.error
    assert result.check.max_error <= result.check.max_error_allowed


@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("backend", ["torch_naive", "sdpa"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (5, 1)], ids=["gqa", "mha", "mqa"])
def test_standard_backends_are_right(row, backend, heads, spec):
    config = row(backend, spec, model="tiny-gqa", num_q_heads=heads[0], num_kv_heads=heads[1])
    result = measure_row(config, CEILINGS)
    assert result.success, result.error
    assert result.modes == {"all": "standard"}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("backend", ["torch_naive", "torch_absorb", "sdpa"])
def test_half_precision(row, backend, dtype):
    result = measure_row(row(backend, KINDS["mixed"], dtype=dtype), CEILINGS)
    assert result.success, result.error


# A threshold below, between, at and above the query lengths of the batch, and the two forced pipelines.
@pytest.mark.parametrize(
    ("fields", "modes"),
    [
        ({"reorder_batch_threshold": 0}, {"prefill": "mha"}),
        ({"reorder_batch_threshold": 1}, {"decode": "mqa", "prefill": "mha"}),
        ({"reorder_batch_threshold": 4}, {"decode": "mqa"}),
        ({"reorder_batch_threshold": "auto"}, {"decode": "mqa"}),
        ({"pipeline": "decode"}, {"decode": "mqa"}),
        ({"pipeline": "prefill"}, {"prefill": "mha"}),
    ],
)
def test_reorder_batch_threshold(row, fields, modes):
    result = measure_row(row("sdpa", "3q1s70_2q4s33", **fields), CEILINGS)
    assert result.success, result.error
    assert result.modes == modes


def _parts(config):
    return build(config, split_requests(config, 8), torch.device("cpu"))


def test_both_modes_of_the_pipeline_expect_the_same_output(row):
    """Absorbed and expanded attention are one function: the float64 expectations must agree to float32's last bits."""
    config = row("sdpa", "3q1s70_2q4s33", scope="pipeline")
    (part,) = _parts(config)
    mqa, mha = (compute_expectation(part.problem, part.layers[0], mode) for mode in ("mqa", "mha"))
    torch.testing.assert_close(mqa.out, mha.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mqa.lse, mha.lse, rtol=1e-5, atol=1e-6)


def test_expectation_in_pieces_equals_expectation_in_one(row, monkeypatch):
    from mlakit.bench import check

    config = row("sdpa", "q40_q33s64_2q1s70")
    whole = [compute_expectation(p.problem, p.layers[0], m) for p in _parts(config) for m in ("mqa", "mha")]
    monkeypatch.setattr(check, "_SCORE_BUDGET", {"cpu": 300})
    pieces = [compute_expectation(p.problem, p.layers[0], m) for p in _parts(config) for m in ("mqa", "mha")]
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a.out, b.out)
        torch.testing.assert_close(a.lse, b.lse)


def test_projections_are_the_real_ones(row):
    """Against einsums written out: k = c W_uk, v = c W_uv, and the absorbed query scores like the plain one."""
    config = row("sdpa", "q9_2q1s30", dtype="fp32")
    for part in _parts(config):
        layer, dims, slots = part.layers[0], part.problem.dims, part.problem.batch.slots
        latent = gather(layer.cache, slots)
        k, v = expand(latent, layer)
        c, rope = latent[:, : dims.kv_lora_rank], latent[:, dims.kv_lora_rank :]
        nope = torch.einsum("nr,hdr->nhd", c, layer.w_uk)
        torch.testing.assert_close(k[..., : dims.qk_nope_head_dim], nope, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(k[..., dims.qk_nope_head_dim :], rope[:, None].expand(-1, dims.num_heads, -1))
        torch.testing.assert_close(v, torch.einsum("nr,hrd->nhd", c, layer.w_uv), rtol=1e-4, atol=1e-5)
        plain = torch.einsum("thd,nhd->htn", layer.q, k)
        absorbed = torch.einsum("thd,nd->htn", absorb_query(layer.q, layer.w_uk, dims.qk_nope_head_dim), latent)
        torch.testing.assert_close(plain, absorbed, rtol=1e-3, atol=1e-3)
        if part.name == "prefill":
            torch.testing.assert_close(layer.k, k)
            torch.testing.assert_close(layer.v, v)


def test_workload_is_poisoned_shuffled_random_and_repeatable(row):
    config = row("sdpa", "3q1s70_q1s33")
    (part,) = _parts(config)
    batch, (first, second) = part.problem.batch, part.layers
    # 3 requests of 70 tokens take 5 pages of 16, one of 33 takes 3; three pages more are unused.
    assert first.cache.shape == (3 * 5 + 3 + 3, 16, 80)
    tokens = gather(first.cache, batch.slots)
    assert torch.isfinite(tokens).all()
    assert tokens.std() > 0.5
    assert torch.isnan(first.cache).any(-1).sum() == first.cache.shape[0] * 16 - batch.keys
    assert not torch.equal(tokens, gather(second.cache, batch.slots))
    assert batch.slots.tolist() != sorted(batch.slots.tolist())
    # Dead slots of the table point at a page that nobody owns.
    owned = set((batch.slots // 16).tolist())
    assert not owned & set(batch.block_table[3, 3:].tolist())
    (again,) = _parts(config)
    assert torch.equal(gather(again.layers[1].cache, batch.slots), gather(second.cache, batch.slots))
    (other,) = _parts(row("sdpa", "3q1s70_q1s33", seed=1))
    assert not torch.equal(other.layers[0].q, part.layers[0].q)


@pytest.mark.parametrize("scope", ["attention", "pipeline"])
@pytest.mark.parametrize("fields", [{}, {"model": "tiny-gqa"}], ids=["mla", "standard"])
def test_estimate_is_close_to_what_the_workload_takes(row, fields, scope):
    config = row("sdpa", "q400_50q1s300", scope=scope, **fields)
    requests = split_requests(config, 8)
    layers = [layer for part in build(config, requests, torch.device("cpu")) for layer in part.layers]
    tensors = {
        id(t): t for layer in layers for name, t in vars(layer).items() if t is not None and not name.startswith("w_")
    }
    taken = sum(t.numel() * t.element_size() for t in tensors.values())
    assert estimate_bytes(config, requests) == pytest.approx(taken, rel=0.05)


def test_judge_sees_what_is_wrong(row):
    config = row("sdpa", "3q1s70")
    (part,) = _parts(config)
    expected = compute_expectation(part.problem, part.layers[0], "mqa")
    assert judge(expected.eager, expected.lse, expected, "decode").status == "ok"
    assert "dtype" in judge(expected.eager.double(), None, expected, "decode").reason
    off = expected.eager.clone()
    off[1] = 0
    assert judge(off, None, expected, "decode").status == "wrong"
    nan = expected.eager.clone()
    nan[0, 0, 0] = torch.nan
    assert "1 of" in judge(nan, None, expected, "decode").reason
    shifted = judge(expected.eager, expected.lse + 2e-3, expected, "decode")
    assert "lse error" in shifted.reason


def test_expected_output_is_kept_for_the_next_backend(row, tmp_path, monkeypatch):
    from mlakit.bench import check

    first = measure_row(row("torch_absorb"), CEILINGS, tmp_path)
    assert first.success
    assert list(tmp_path.glob("expected-*.safetensors"))
    monkeypatch.setattr(check, "compute_expectation", None)  # a second computation would fail
    assert measure_row(row("sdpa", pipeline="decode"), CEILINGS, tmp_path).success


def test_stages_are_told(row):
    stages = []
    measure_row(row(profile_memory=True), CEILINGS, stage=stages.append)
    assert stages == ["building", "preparing", "checking", "timing", "measuring memory"]


def test_cuda_graph_on_a_cpu_is_refused(row):
    result = measure_row(row(cuda_graph=True), CEILINGS)
    assert (result.status, result.error) == ("unsupported", "CUDA graphs need a GPU")


def test_limit_takes_the_cheaper_mode(row):
    config = row("sdpa", "64q1s1k", model="deepseek-v3", dtype="bf16")
    limit = limit_of(config, split_requests(config, 8), Ceilings("x", "bf16", 4.26e12, 4.42e12, 807e12))
    # One read of the cache, and q and out, against two products of 576 and 512 for every head and key.
    flops = 2 * 64 * 1024 * 128 * (576 + 512)
    moved = 2 * (64 * 1024 * 576 + 64 * 128 * (576 + 512))
    assert (limit.flops, limit.bytes) == (flops, moved)
    assert limit.seconds == pytest.approx(max(flops / 807e12, moved / 4.42e12))
    assert limit.bound == "compute"


def test_measured_ceilings_are_of_this_machine():
    ceilings = measure_ceilings("cpu", torch.float32)
    assert 1e8 < ceilings.copy_bytes_per_s < 1e13
    assert 1e8 < ceilings.read_bytes_per_s < 1e13
    assert 1e8 < ceilings.flops_per_s < 1e14
    assert ceilings.bytes_per_s == max(ceilings.copy_bytes_per_s, ceilings.read_bytes_per_s)


def test_all_own_backends_can_be_loaded():
    assert [registry.load(name).name for name in registry.names()] == registry.names()
