"""Scores of pictures: feature networks, metrics, baselines, figures."""
