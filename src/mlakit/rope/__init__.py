"""Rotary position embedding: pairs of elements turned by an angle that grows with the token's position."""

from mlakit.rope.api import apply_rope as apply_rope
from mlakit.rope.reference import apply_rope_reference as apply_rope_reference
