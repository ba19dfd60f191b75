"""Methods of sparse training, one file each."""
