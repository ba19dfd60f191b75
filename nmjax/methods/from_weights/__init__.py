"""Methods whose masks follow from the weights and the step."""
