"""Products for training: another weight, or fewer gradients, in the backward pass."""
