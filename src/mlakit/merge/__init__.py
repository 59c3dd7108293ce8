"""Merging attention over disjoint sets of keys: chunks of a context, splits of a cache, ranks of a context-parallel
group.
"""

from mlakit.merge.api import merge_states as merge_states
from mlakit.merge.reference import merge_states_reference as merge_states_reference

__all__ = ["merge_states", "merge_states_reference"]
