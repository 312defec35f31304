"""Chat with a model and its adapters: engine, web page, OpenAI-style API, terminal."""
