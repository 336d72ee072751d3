"""Weights on disk: our folder, and other projects' checkpoints in and out."""
