"""Methods that remember masks or scales from one step to the next."""
