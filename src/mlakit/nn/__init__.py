"""The layer: Multi-head Latent Attention as a module, with four implementations of one set of parameters."""

from mlakit.nn.args import ATTN_IMPLS as ATTN_IMPLS
from mlakit.nn.args import Args as Args
from mlakit.nn.caches import KVCache as KVCache
from mlakit.nn.caches import LatentCache as LatentCache
from mlakit.nn.checkpoint import args_from_hf_config as args_from_hf_config
from mlakit.nn.checkpoint import convert_hf_state_dict as convert_hf_state_dict
from mlakit.nn.checkpoint import load_checkpoint as load_checkpoint
from mlakit.nn.checkpoint import save_checkpoint as save_checkpoint
from mlakit.nn.linear import Linear as Linear
from mlakit.nn.mla import MultiheadLatentAttention as MultiheadLatentAttention
from mlakit.nn.mla import get_mla as get_mla
from mlakit.nn.norm import RMSNorm as RMSNorm
from mlakit.nn.rope import precompute_freqs_cis as precompute_freqs_cis
