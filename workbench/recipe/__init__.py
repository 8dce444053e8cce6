"""From YAML to a validated, frozen recipe. Loading one touches nothing but the file itself."""
