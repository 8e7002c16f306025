"""What turns a model and a corpus into a run. Stands above model/ and data/."""
