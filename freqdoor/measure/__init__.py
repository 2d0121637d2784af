"""Measuring: what an attack does to pictures, to networks behind the codec, and to the codec itself."""
