"""Running averages of second moments, the factors made of them, and the inverse that acts on gradients."""
