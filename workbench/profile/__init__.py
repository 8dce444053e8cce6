"""From artifacts to rows: which jobs there are, in which order they run, what each row records."""
