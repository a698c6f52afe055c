"""What runs experiments: configuration, data, training, diagnostics, studies. Only the command imports it."""
