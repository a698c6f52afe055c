"""Configuration models of components and named sets of values. Pydantic only: nothing here imports torch."""
