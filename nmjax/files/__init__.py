"""Reading and writing packed weights, checkpoints and other libraries' layouts."""
