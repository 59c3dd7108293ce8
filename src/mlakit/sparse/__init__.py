"""Token-level sparse attention (DeepSeek Sparse Attention): every query token attends to the keys that indices name."""

from mlakit.sparse.api import mla_sparse_decode as mla_sparse_decode
from mlakit.sparse.api import mla_sparse_prefill as mla_sparse_prefill
from mlakit.sparse.reference import mla_sparse_decode_reference as mla_sparse_decode_reference
from mlakit.sparse.reference import mla_sparse_prefill_reference as mla_sparse_prefill_reference
