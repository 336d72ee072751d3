"""Embeddings → text: sampling, decoders and their KV caches."""
