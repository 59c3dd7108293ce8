"""Attention of a few new tokens a request over the paged latent cache (MQA mode)."""
