"""Where a model comes from: hub, folders, GGUF files; what is in it."""
