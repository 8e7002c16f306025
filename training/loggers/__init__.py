"""Loggers: send metrics to other tools, besides metrics.jsonl."""
