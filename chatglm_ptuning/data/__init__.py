"""Text to batch: one pipeline for every model and every tuner."""
