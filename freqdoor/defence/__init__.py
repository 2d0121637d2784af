"""The defender's side: populations of encoders that a verdict is calibrated and judged on."""
