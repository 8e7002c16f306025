"""Folders of other formats, and adapters to other tools."""
