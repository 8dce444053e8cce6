"""What llama.cpp's files hold: block types, mixtures of them, importance matrices, encoded blocks."""
