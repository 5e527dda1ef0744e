"""One page of what other commands made, for people: their results read back, never models or images anew."""
