"""The embedded demo: a small ChatGLM-6B checkpoint and a data set, both made from text that is written here."""
