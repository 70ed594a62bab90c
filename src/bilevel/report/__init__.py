"""The output of a run: files, progress bars, plots, and the page of a run."""
