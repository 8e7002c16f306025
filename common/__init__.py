"""Shared by every package: errors, files, the command line. Imports no torch."""
