"""How time is taken: clocks, interleaved rounds, a watch on other programs, and the roof that memory sets."""
