"""Servers that speak the OpenAI API, asked over HTTP: one answer, an answer's tokens, many at once."""
