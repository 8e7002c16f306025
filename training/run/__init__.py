"""A run: its settings, its folder, its checkpoints, how it starts, resumes and is loaded."""
