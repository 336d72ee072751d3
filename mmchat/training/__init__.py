"""Trains a projector and an adapter: data, trainer, evaluation. It runs the same model modules as chat."""
