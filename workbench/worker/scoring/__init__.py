"""From logits to sums: log-likelihood, divergence from the reference, agreement."""
