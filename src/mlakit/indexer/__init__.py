"""The lightning indexer of DeepSeek Sparse Attention: score all keys cheaply, select the best for each query."""

from mlakit.indexer.api import indexer_logits as indexer_logits
from mlakit.indexer.api import indexer_logits_paged as indexer_logits_paged
from mlakit.indexer.api import select_topk as select_topk
from mlakit.indexer.layout import pack_index_cache as pack_index_cache
from mlakit.indexer.layout import quantize_queries as quantize_queries
from mlakit.indexer.layout import slots_of as slots_of
from mlakit.indexer.layout import unpack_index_cache as unpack_index_cache
