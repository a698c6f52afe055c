"""Configuration: pydantic models composed from the registered components. Imports no torch.

`kfacore.config.slots` has the base models of components, `kfacore.config.run` the configuration of a run,
`kfacore.config.resolve` the layers of precedence, `kfacore.config.presets` the named sets of values.
"""
