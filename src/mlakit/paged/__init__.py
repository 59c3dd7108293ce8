"""Standard attention over a paged cache of keys and values: decode, extend, prefill and mixtures in one call."""

from mlakit.paged.api import paged_attention as paged_attention
from mlakit.paged.reference import paged_attention_reference as paged_attention_reference
