"""Corpora: sources of documents."""
