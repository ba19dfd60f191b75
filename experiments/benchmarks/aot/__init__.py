"""What Google's and NVIDIA's compilers make of this library, without a TPU or a GPU."""
