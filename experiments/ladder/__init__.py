"""The comparison of all methods with equal budgets, tuned on a validation split."""
