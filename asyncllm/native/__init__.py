"""A decoder's whole step on a CPU in C++: products of weights as files store them, paged attention, own threads."""
