"""Monitoring of a training run: metrics, progress, statistics, loss curves."""
