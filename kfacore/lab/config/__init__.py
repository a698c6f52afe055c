"""The configuration of a run: sources in their order of precedence, composed from the registered components.

`kfacore.lab.config.run` is the composed model, `kfacore.lab.config.resolve` the layers of precedence. No torch.
"""
