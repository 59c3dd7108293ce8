"""Attention of ragged sequences with keys and values of their own (MHA mode)."""
