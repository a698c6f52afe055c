"""Work that is divided: over cores, and over the steps of training beside it."""
