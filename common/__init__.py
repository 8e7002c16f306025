"""What every room may use: errors, files, the command line. Knows no torch."""
