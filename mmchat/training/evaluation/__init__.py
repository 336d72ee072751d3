"""Evaluation: answers to test questions, metrics, samples, recordings."""
