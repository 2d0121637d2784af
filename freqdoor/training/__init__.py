"""Training: settings, the run directory, and the loop that codec training and planting share."""
