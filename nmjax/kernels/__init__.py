"""Products with packed weights: their definition, plain XLA, and C++ behind XLA's FFI."""
