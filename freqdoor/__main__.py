"""`python -m freqdoor`."""

from freqdoor.cli import main

main()
