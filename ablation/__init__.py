"""Comparing runs: sweeps over settings at matched budgets, and the report that ends them."""
