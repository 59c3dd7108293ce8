"""Attention of a few new tokens a request over the paged latent cache (MQA mode)."""

from mlakit.decode.api import mla_decode as mla_decode
from mlakit.decode.reference import mla_decode_reference as mla_decode_reference
