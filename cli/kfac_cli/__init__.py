"""The `kfac` command: parses, calls the core, prints; no mathematics."""
