"""From text to token ids: sources, windows that never overlap, tasks with expected answers."""
