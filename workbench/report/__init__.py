"""From stored rows to what people read: pure functions, with files touched only in `store.py`."""
