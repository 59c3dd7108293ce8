"""The paged latent cache: writing new tokens into it, and reading sequences out of it."""

from mlakit.cache.api import append_latent as append_latent
from mlakit.cache.api import gather_latent as gather_latent
from mlakit.cache.layout import fp8_row_bytes as fp8_row_bytes
from mlakit.cache.layout import pack_fp8 as pack_fp8
from mlakit.cache.layout import unpack_fp8 as unpack_fp8
