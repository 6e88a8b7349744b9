"""Number formats and what linears multiply with."""
