"""What a program does with each weight, read off its jaxpr."""
