"""The pages that people read in a browser: one report, or a static site with history."""
