"""Orders of channels under which N:M patterns keep more of a network."""
