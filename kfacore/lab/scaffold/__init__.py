"""New distributions from templates, for authors of plug-ins. Imports no torch."""

from kfacore.lab.scaffold.plugin import NewPlugin, write_plugin

__all__ = ["NewPlugin", "write_plugin"]
