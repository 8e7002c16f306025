"""Loggers: metrics elsewhere than in metrics.jsonl."""
