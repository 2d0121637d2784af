"""The local page of `freqdoor serve`: the same public functions as the command line's, for a browser."""
