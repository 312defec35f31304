"""The networks, their tokenizers, and what reads them from disk."""
