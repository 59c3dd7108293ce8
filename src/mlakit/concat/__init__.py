"""Keys of MHA mode: each head's own part and the rotated part that all heads share, side by side."""

from mlakit.concat.api import concat_k as concat_k
from mlakit.concat.reference import concat_k_cat as concat_k_cat
from mlakit.concat.reference import concat_k_direct_copy as concat_k_direct_copy
