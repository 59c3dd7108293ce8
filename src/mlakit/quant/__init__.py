"""Blockwise float8, as DeepSeek-V3 uses it: quantize activations, dequantize weights, multiply the two."""

from mlakit.quant.api import act_quant as act_quant
from mlakit.quant.api import fp8_gemm as fp8_gemm
from mlakit.quant.api import weight_dequant as weight_dequant
from mlakit.quant.reference import weight_quant as weight_quant
