"""Embeddings to text: sampling, decoders and their caches."""
