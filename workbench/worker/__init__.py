"""All that runs beside an engine, in the engine's own interpreter.

Modules here import only the standard library and `workbench.records`/`workbench.errors` at top level; engines
and torch are imported inside the functions that need them.
"""
