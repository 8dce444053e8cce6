"""From a recipe to artifacts: the base, its token ids, and every variant, each made once."""
