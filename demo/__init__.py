"""The playground: ask about a text and compare what the methods answer. `make demo` or `ptv2 demo` starts it."""
