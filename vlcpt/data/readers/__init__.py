"""Rows become Documents: one module a schema, and ``files`` for how rows are stored."""
