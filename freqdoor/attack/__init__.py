"""The attack: what it wants, the joint loss, planting, and the planted encoder as a file."""
