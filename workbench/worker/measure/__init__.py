"""One job inside its engine's process: the order of its steps, its clocks, its meters."""
