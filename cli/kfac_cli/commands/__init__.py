"""The commands, one a module, each with ``register(app)`` and without torch at import."""
