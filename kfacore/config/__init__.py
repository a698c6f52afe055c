"""Configuration: pydantic models composed from the registered components. Imports no torch."""
