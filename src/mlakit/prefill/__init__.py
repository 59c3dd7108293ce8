"""Attention of ragged sequences with keys and values of their own (MHA mode)."""

from mlakit.prefill.api import mla_prefill as mla_prefill
from mlakit.prefill.reference import mla_prefill_reference as mla_prefill_reference

__all__ = ["mla_prefill", "mla_prefill_reference"]
