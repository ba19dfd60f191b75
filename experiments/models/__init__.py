"""Networks in Flax linen that the tasks train."""
