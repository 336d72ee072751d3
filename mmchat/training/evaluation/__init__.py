"""Evaluation: answers to test questions, metrics, sample answers, and recordings."""
