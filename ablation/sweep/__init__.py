"""Sweeps: one command, a run of each combination of values, continued by the same command."""
