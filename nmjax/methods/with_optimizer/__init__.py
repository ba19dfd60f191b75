"""Methods that bring their own part of the optimizer."""
