import argparse
import math

import pytest
import torch

from mlakit.studies import layer_options, layer_steps, layers
from mlakit.studies.command import progress
from mlakit.studies.layer_difference import difference
from mlakit.studies.layer_steps import Layers, Step, reason_of


@pytest.fixture
def options(small):
    parser = argparse.ArgumentParser()
    layers.add_arguments(parser)
    return layer_options.parse_common(parser.parse_args(small))


@pytest.fixture
def built(options):
    return Layers(options.shapes[0], options, 2, 24)


def test_a_difference_in_numbers():
    expected = torch.tensor([[[3.0, 4.0], [0.0, 10.0]]])
    found = difference(expected + torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]), expected)
    assert (found.max_abs, found.mean_abs) == (1.0, 0.25)
    assert found.relative == pytest.approx(1 / math.sqrt(125))
    assert found.worst_token == pytest.approx(1 / 5)
    assert found.cosine == pytest.approx((3 * 3 + 4 * 5 + 100) / math.sqrt(125 * 134))
    assert difference(expected, expected).agrees(1e-9)


def test_one_wrong_token_among_thousands_disagrees():
    expected = torch.randn(2, 8192, 8, generator=torch.Generator().manual_seed(0))
    actual = expected.clone()
    actual[1, 77] = -actual[1, 77]
    found = difference(actual, expected)
    assert found.relative < 0.02
    assert found.worst_token == pytest.approx(2)
    assert not found.agrees(0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_agrees_with_nothing(value):
    expected = torch.ones(1, 3, 4)
    actual = expected.clone()
    actual[0, 1, 2] = value
    found = difference(actual, expected)
    assert not found.agrees(1e9)
    assert found.as_json()["relative"] is None
    assert not difference(actual, actual).agrees(1e9)


def test_outputs_of_another_shape_are_no_comparison():
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2, 3\) and \(1, 3, 2\)"):
        difference(torch.ones(1, 2, 3), torch.ones(1, 3, 2))


def test_all_implementations_have_one_set_of_weights(built):
    states = [built.model(name).state_dict() for name in layer_options.IMPLEMENTATIONS]
    for state in states[1:]:
        assert all(state[name].data_ptr() == tensor.data_ptr() for name, tensor in states[0].items())
    again = Layers(built.shape, built.options, 2, 24).model("fused").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in states[0].items())


@torch.no_grad()
def test_the_reference_is_float64_and_the_same_in_chunks(built, monkeypatch):
    x = built.inputs(2, 24)
    whole = built.reference(x)
    assert whole.dtype == torch.float64
    monkeypatch.setattr(layer_steps, "available_bytes", lambda device: 20_000)
    assert len(list(built._chunks(2, 24, 48))) > 3
    torch.testing.assert_close(built.reference(x), whole, rtol=1e-12, atol=1e-12)
    everything = built.reference(x, causal=False)
    torch.testing.assert_close(everything[:, -1], whole[:, -1], rtol=1e-12, atol=1e-12)
    assert not difference(everything, whole).agrees(0.1)
    assert difference(built.model("naive", fast_path_tokens=0)(x, 0, built.freqs()[:24], "causal"), whole).agrees(0.015)


# A position on the host, as in eager use, and in a tensor with the whole rope table, as under a CUDA graph.
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("name", layer_options.IMPLEMENTATIONS)
@torch.no_grad()
def test_a_decode_step_is_the_last_token_of_a_prefill(built, name, table):
    x = built.inputs(2, 23)
    expected = built.reference(x)
    prefill = Step(built, built.model(name), x, "prefill")
    assert difference(prefill(), expected).agrees(0.015)
    decode = Step(built, built.model(name), x, "decode", table=table)
    for _ in range(2):  # calling it again changes nothing
        assert difference(decode(), expected[:, -1:]).agrees(0.015)
    assert torch.equal(decode.last(), decode())


def test_an_adopted_layer_gets_the_weights(built):
    class Theirs(torch.nn.Module):
        def __init__(self, args):
            super().__init__()
            self.args = args
            for name, tensor in built.model("naive").state_dict().items():
                part, _, leaf = name.partition(".")
                module = torch.nn.Module()
                module.register_parameter(leaf, torch.nn.Parameter(torch.zeros_like(tensor)))
                self.add_module(part, module)

    theirs = built.adopt(Theirs, fast_path_tokens=0)
    assert theirs.args.fast_path_tokens == 0
    assert torch.equal(theirs.wo.weight, built.model("naive").wo.weight)


def test_a_cpu_refuses_what_cannot_fit(options, monkeypatch):
    monkeypatch.setattr(layer_steps, "available_bytes", lambda device: 2**30)
    device = torch.device("cpu")
    layer_steps.require_memory(options.shapes[0], device, 1, 2048, 2048)
    with pytest.raises(MemoryError, match=r"the scores take 5\.7 GiB, 1\.0 GiB are free"):
        layer_steps.require_memory(options.shapes[0], device, 1, 2**14, 15625)


def test_reasons():
    assert reason_of(torch.OutOfMemoryError("CUDA out of memory. Tried")) == "out of memory"
    assert reason_of(RuntimeError("DefaultCPUAllocator: can't allocate memory")) == "out of memory"
    assert reason_of(MemoryError("the scores take 3 GiB")) == "out of memory (the scores take 3 GiB)"
    assert reason_of(ValueError("no such width\nas 3")) == "no such width"
    assert reason_of(RuntimeError("no kernel")) == "RuntimeError: no kernel"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        reason_of(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_progress_is_silent_where_there_is_no_terminal(capsys):
    with progress(2) as begin:
        begin("one")
        begin("two")
    assert capsys.readouterr() == ("", "")
