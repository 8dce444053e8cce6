"""What follows from rows: differences, a choice, the state of a night, steps in a history."""
