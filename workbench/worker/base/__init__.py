"""The unquantized model as files: where it comes from, what its headers say, and its rewritten form."""
