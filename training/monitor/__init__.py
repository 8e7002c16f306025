"""What is observed of a run while it trains: metrics, progress, statistics, pictures."""
