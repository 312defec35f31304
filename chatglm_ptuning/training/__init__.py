"""Training: arguments, trainer, what is shown and written on the way, and the workflow of a run."""
