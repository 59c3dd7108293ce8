"""Small products of few rows by every kernel of `hopper_linear` and `nn.hopper_query`, checked against float64: what
test_nn_hopper.py runs under NVIDIA's compute-sanitizer.

compute-sanitizer --tool memcheck python tests/gpu/sanitize_linear.py
"""

import torch

from mlakit.hopper_linear import launch_by_head, launch_linear
from mlakit.nn.hopper_query import launch_query
from mlakit.quant import act_quant, weight_quant
from mlakit.quant.reference import fp8_gemm_reference
from mlakit.rope.reference import apply_rope_reference
from mlakit.testing import poison_


def new(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def room(*shape: int) -> torch.Tensor:
    return poison_(torch.empty(shape, device="cuda", dtype=torch.bfloat16))


def check(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.double() - expected).norm() / expected.norm()
    print(f"{'right' if error < 2**-7 else 'wrong'}: {what} {float(error):.2g}", flush=True)


def main() -> None:
    """Rows, columns and ranks that fill no tile; tiles in parts; two weights; heads apart."""
    torch.manual_seed(0)
    x, w0, w1 = new(5, 1096), new(200, 1096), new(72, 1096)
    out0, out1 = room(5, 200), room(5, 72)
    launch_linear(x, (w0, w1), (out0, out1))
    check(
        "two weights",
        torch.cat((out0, out1), 1),
        torch.cat((x.double() @ w0.double().T, x.double() @ w1.double().T), 1),
    )

    codes, scale = weight_quant(new(330, 400).float())
    x8, x_scale = act_quant(new(20, 512))
    x8 = x8[:, :400].contiguous()
    out = room(20, 330)
    launch_linear(x8, (codes,), (out,), (x_scale, scale), overlap=True)
    check("float8", out, fp8_gemm_reference(x8, x_scale, codes, scale, torch.float64))

    up, latent, values = new(3, 256, 512), new(17, 3, 512), room(17, 3, 128)
    launch_by_head(latent, up[:, 128:], values, overlap=True)
    check("by head", values, torch.einsum("mhc,hdc->mhd", latent.double(), up[:, 128:].double()))

    low, gain, wq_b, absorbed = new(3, 448), new(448), new(2 * 192, 448) * 0.05, room(3, 2, 576)
    angles = torch.randn(100, 32, device="cuda")
    cos, sin = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).unbind(-1)
    positions = torch.tensor([99, 0, 5], device="cuda")
    launch_query(low, gain, wq_b, up[:2, :128], cos, sin, positions, absorbed, q_len=1, eps=1e-6)
    normal = low.double() * (low.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain.double()
    q = (normal @ wq_b.double().T).view(3, 2, 192)
    latent_q = torch.einsum("mhd,hdc->mhc", q[..., :128], up[:2, :128].double())
    turned = apply_rope_reference(q[..., 128:], cos, sin, positions=positions)
    check("query", absorbed, torch.cat((latent_q, turned), dim=-1))


if __name__ == "__main__":
    main()
