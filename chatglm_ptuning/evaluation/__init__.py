"""Scores: answers of a model to prompts with known answers, and how well they match."""
